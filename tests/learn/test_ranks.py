"""Two ranks with half batches train to the same weights as one rank with whole ones."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from labelled import CHECKPOINT, write_digits

import mlx_aimv2
from mlx_aimv2.learn import fit

LAUNCH = Path(sys.executable).parent / "mlx.launch"
SETTINGS = {"iters": 20, "batch_size": 4, "steps_per_eval": 20, "patience": 0, "grad_accumulation_steps": 2}


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
@pytest.mark.parametrize(("kind", "file"), [("lora", "adapters.safetensors"), ("attentive", "head.safetensors")])
def test_two_ranks_with_half_batches_equal_one_with_whole_ones(kind, file, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    digits = write_digits(tmp_path / "digits")
    rate = 3e-5  # Adam makes whole steps of gradients that are rounding alone, as LoRA's first ones are
    fit(digits, CHECKPOINT, tmp_path / "one", fine_tune_type=kind, learning_rate=rate, **SETTINGS)
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = ["-m", "mlx_aimv2", "fit", str(digits), "-m", str(CHECKPOINT), "-o", str(tmp_path / "two"), *flags]
    command += ["--fine-tune-type", kind, "--learning-rate", str(rate)]
    launcher = [sys.executable, str(LAUNCH), "-n", "2", "--backend", "ring", "-p", str(random.randrange(20000, 60000))]
    environment = os.environ | {"PYTHONPATH": str(Path(mlx_aimv2.__file__).parents[1])}
    with subprocess.Popen(
        [*launcher, sys.executable, *command],
        stdin=subprocess.PIPE,  # an end of input would keep the launcher busy
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        out, err = process.communicate(timeout=200)
    assert out.count("on 6 test images") == 1, err
    infos = [json.loads((tmp_path / name / "head.json").read_text()) for name in ("one", "two")]
    assert [info["settings"]["step"] for info in infos] == [20, 20]
    one, two = (mx.load(str(tmp_path / name / file)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        largest = np.abs(np.array(array)).max()
        assert np.abs(np.array(array) - np.array(two[name])).max() <= 1e-5 * max(1.0, largest), name
