"""Two ranks train to the same weights as one with whole batches; a rank that dies ends the others."""

import json

import numpy as np
import pytest

from mlx_aimv2.learn import fit
from tests.programs import launched, needs_launch
from tests.small_training import CaptionWorkshop, Workshop, arrays

SETTINGS = {"iters": 20, "batch_size": 4, "steps_per_eval": 20, "patience": 0, "grad_accumulation_steps": 2}

pytestmark = [
    pytest.mark.slow,
    needs_launch,
]

DIES = """
import os, sys, threading, time
from pathlib import Path
from mlx_aimv2.cli import main

def die():
    while not Path(sys.argv[1]).exists():
        time.sleep(0.01)
    os._exit(9)

if os.environ["MLX_RANK"] == "1":
    threading.Thread(target=die, daemon=True).start()
sys.exit(main(sys.argv[2:]))
"""
"""The command, except that rank 1 dies when a file is there."""


def flags(settings: dict[str, object]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize(("kind", "file"), [("lora", "adapters.safetensors"), ("attentive", "head.safetensors")])
def test_two_ranks_with_half_batches_equal_one_with_whole_ones(kind, file, tmp_path):
    shop = Workshop(tmp_path)
    settings = SETTINGS | {"fine_tune_type": kind}
    settings["learning_rate"] = 3e-5  # Adam makes whole steps of gradients that are rounding alone, as LoRA's first are
    fit(shop.data["classify"], shop.encoder, tmp_path / "one", **settings)
    command = ["fit", shop.data["classify"], "-m", shop.encoder, "-o", tmp_path / "two", *flags(settings)]
    out, err = launched("-m", "mlx_aimv2", *command)
    assert out.count("on 3 test images") == 1, err
    infos = [json.loads((tmp_path / name / "head.json").read_text()) for name in ("one", "two")]
    assert [info["settings"]["step"] for info in infos] == [20, 20]
    one, two = (arrays(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert np.abs(array - two[name]).max() <= 1e-5 * max(1.0, np.abs(array).max()), name


@pytest.mark.parametrize("verb", ["fit", "pretrain"])
def test_a_rank_that_dies_ends_the_others_and_leaves_the_state(verb, tmp_path):
    output = tmp_path / "out"
    state = tmp_path / "out.training" / "state.safetensors"
    if verb == "fit":
        shop = Workshop(tmp_path)
        settings = SETTINGS | {"iters": 100_000, "steps_per_eval": 5, "fine_tune_type": "lora"}
        command = ["fit", shop.data["classify"], "-m", shop.encoder, "-o", output, *flags(settings)]
    else:
        steps = ["--iters", 100_000, "--save-every", 5, "--batch-size", 4]
        command = [*CaptionWorkshop(tmp_path).words("pretrain", *steps), "-o", output]
    launched("-c", DIES, state, *command)
    assert not output.exists()
    assert state.is_file()
