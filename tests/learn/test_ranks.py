"""Two ranks train to the same weights as one with whole batches; a rank that dies ends the others."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_aimv2
from mlx_aimv2.learn import fit
from tests.small_training import CaptionWorkshop, Workshop, arrays

LAUNCH = Path(sys.executable).parent / "mlx.launch"
SETTINGS = {"iters": 20, "batch_size": 4, "steps_per_eval": 20, "patience": 0, "grad_accumulation_steps": 2}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed"),
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


def launch(*command: object) -> tuple[str, str]:
    """Runs Python with a command under mlx.launch, on two ranks: what they print and say."""
    launcher = [sys.executable, str(LAUNCH), "-n", "2", "--backend", "ring", "-p", str(random.randrange(20000, 60000))]
    environment = os.environ | {"PYTHONPATH": str(Path(mlx_aimv2.__file__).parents[1])}
    with subprocess.Popen(
        [*launcher, sys.executable, *map(str, command)],
        stdin=subprocess.PIPE,  # an end of input would keep the launcher busy
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            return process.communicate(timeout=200)
        finally:
            process.kill()


def flags(settings: dict[str, object]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize(("kind", "file"), [("lora", "adapters.safetensors"), ("attentive", "head.safetensors")])
def test_two_ranks_with_half_batches_equal_one_with_whole_ones(kind, file, tmp_path):
    shop = Workshop(tmp_path)
    settings = SETTINGS | {"fine_tune_type": kind}
    settings["learning_rate"] = 3e-5  # Adam makes whole steps of gradients that are rounding alone, as LoRA's first are
    fit(shop.data["classify"], shop.encoder, tmp_path / "one", **settings)
    command = ["fit", shop.data["classify"], "-m", shop.encoder, "-o", tmp_path / "two", *flags(settings)]
    out, err = launch("-m", "mlx_aimv2", *command)
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
        steps = ["--steps", 100_000, "--save-every", 5, "--batch", 4]
        command = [*CaptionWorkshop(tmp_path).words("pretrain", *steps), "-o", output]
    launch("-c", DIES, state, *command)
    assert not output.exists()
    assert state.is_file()
