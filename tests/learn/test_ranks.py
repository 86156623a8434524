"""Two ranks with half batches train to the same weights as one rank with whole ones."""

import json

import mlx.core as mx
import numpy as np
import pytest
from labelled import CHECKPOINT, write_digits

from mlx_aimv2.learn import fit
from tests.programs import launched, needs_launch

SETTINGS = {"iters": 20, "batch_size": 4, "steps_per_eval": 20, "patience": 0, "grad_accumulation_steps": 2}


@pytest.mark.slow
@needs_launch
@pytest.mark.parametrize(("kind", "file"), [("lora", "adapters.safetensors"), ("attentive", "head.safetensors")])
def test_two_ranks_with_half_batches_equal_one_with_whole_ones(kind, file, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    digits = write_digits(tmp_path / "digits")
    rate = 3e-5  # Adam makes whole steps of gradients that are rounding alone, as LoRA's first ones are
    fit(digits, CHECKPOINT, tmp_path / "one", fine_tune_type=kind, learning_rate=rate, **SETTINGS)
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = ["-m", "mlx_aimv2", "fit", str(digits), "-m", str(CHECKPOINT), "-o", str(tmp_path / "two"), *flags]
    command += ["--fine-tune-type", kind, "--learning-rate", str(rate)]
    out, err = launched(*command)
    assert out.count("on 6 test images") == 1, err
    infos = [json.loads((tmp_path / name / "head.json").read_text()) for name in ("one", "two")]
    assert [info["settings"]["step"] for info in infos] == [20, 20]
    one, two = (mx.load(str(tmp_path / name / file)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        largest = np.abs(np.array(array)).max()
        assert np.abs(np.array(array) - np.array(two[name])).max() <= 1e-5 * max(1.0, largest), name
