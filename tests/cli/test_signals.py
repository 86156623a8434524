"""Fifty conversions that a signal stops at random moments leave whole folders and nothing else."""

import contextlib
import os
import random
import signal
import sys
import time

import mlx.core as mx
import pytest

from mlx_aimv2 import load
from mlx_aimv2.cli.dispatch import SIGNALS
from tests.programs import running
from tests.small_encoder import small_encoder

RUNS, MOST = 50, 200
SOON = 30
"""Seconds after a signal in which a run has ended: the goal is one second, but not of a machine that is busy."""

# A fresh process of its own would take ten times as long to import everything: it is forked when all is imported.
CONVERTING = """
import os, sys
from mlx_aimv2.cli import main
import mlx_aimv2.convert, mlx_aimv2.conversion.model_card, huggingface_hub, PIL.Image
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(["convert", *line.split()]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_fifty_conversions_stopped_at_random_moments_leave_only_whole_folders(tmp_path):
    seed = random.randrange(1 << 30)
    dice, lasts, stopped = random.Random(seed), None, 0
    slowest = 0.0
    with running(sys.executable, "-c", CONVERTING) as run:
        for number in range(MOST):
            if stopped == RUNS:
                break
            target = tmp_path / f"mlx-{number}"
            flags = "-q --q-bits 8" if number % 2 else "--no-verify"
            begun = time.monotonic()
            print(f"--hf-path {small_encoder()} --mlx-path {target} {flags}", file=run.stdin, flush=True)
            child = int(run.stdout.readline())
            if lasts is not None:
                time.sleep(dice.uniform(0, lasts))
                sent = time.monotonic()
                with contextlib.suppress(ProcessLookupError):  # done already
                    os.kill(child, SIGNALS[number % 3])
            code = int(run.stdout.readline())
            if lasts is None:
                lasts = time.monotonic() - begun
            elif code == 0:
                lasts = min(lasts, time.monotonic() - begun)
            else:
                slowest = max(slowest, time.monotonic() - sent)
                # Before the command line has its handlers the signal ends the process as it always does.
                assert code in (128 + SIGNALS[number % 3], -SIGNALS[number % 3], 1), f"seed {seed}"
                stopped += 1
        _, errors = run.communicate()
    assert "Traceback" not in errors or "KeyboardInterrupt" in errors, f"{errors}, seed {seed}"
    assert stopped == RUNS, f"seed {seed}"
    assert slowest < SOON
    names = sorted(path.name for path in tmp_path.iterdir())
    assert all(not name.startswith(".") for name in names), f"{names}, seed {seed}"
    for path in tmp_path.iterdir():
        assert load(path)[0].encode_image(mx.zeros((1, 56, 56, 3))).shape == (1, 128), f"{path.name}, seed {seed}"
    print(f"{stopped} stopped, the slowest after {slowest:.2f} s; {len(names)} were whole before")


def test_the_signals_are_those_of_a_terminal_and_of_a_service_manager():
    assert SIGNALS == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
