"""Asks powermetrics of macOS how much power the chip takes while something runs, if that needs no password."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

COMMAND = ("sudo", "-n", "powermetrics", "--samplers", "cpu_power,gpu_power", "-i", "1000", "-n")
"""The number of samples follows, after which it ends by itself: what root runs, a user cannot stop."""

LONGEST = 60.0
"""Seconds beyond one for each sample after which powermetrics counts as hung."""

SAMPLE = re.compile(r"^\*+ Sampled system activity .*\(([\d.]+)ms elapsed\)", re.MULTILINE)
POWER = re.compile(r"^(CPU|GPU|Combined) Power[^:\n]*: *([\d.]+) *mW", re.MULTILINE)


@dataclass(frozen=True)
class Power:
    """Average watts over so many seconds; `combined` is CPU, GPU and neural engine, without memory and display."""

    seconds: float
    cpu: float
    gpu: float
    combined: float


def parse(text: str) -> Power:
    """The average over all samples in powermetrics' text. Raises ValueError for a text without them."""
    pieces = SAMPLE.split(text)
    seconds, joules = 0.0, {"CPU": 0.0, "GPU": 0.0, "Combined": 0.0}
    for elapsed, body in zip(pieces[1::2], pieces[2::2], strict=True):
        found: dict[str, float] = {}
        for part, milliwatts in POWER.findall(body):
            found.setdefault(part, float(milliwatts))  # each sampler prints the GPU's
        if missing := [part for part in joules if part not in found]:
            raise ValueError(f"powermetrics gave no {missing[0]} Power in a sample of {elapsed} ms")
        length = float(elapsed) / 1e3
        seconds += length
        joules = {part: total + found[part] / 1e3 * length for part, total in joules.items()}
    if not seconds:
        raise ValueError(f"powermetrics gave no sample: {text.strip()[:80]!r}")
    return Power(seconds, *(total / seconds for total in joules.values()))


def measure(work: Callable[[], int], *, samples: int = 5) -> tuple[Power, float]:
    """Power while `work`, which returns how many images it did, runs again and again: `-> (Power, images a second)`.

    Raises PermissionError where sudo or powermetrics refuses, with what it said; FileNotFoundError without sudo;
    ValueError for an answer that is not understood. Nobody is asked for a password.
    """
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as complaint:  # a pipe could fill up
        process = subprocess.Popen(
            [*COMMAND, str(samples)], stdin=subprocess.DEVNULL, stdout=answer, stderr=complaint, text=True
        )
        began, images = time.perf_counter(), 0
        while process.poll() is None:
            images += work()
            if time.perf_counter() - began > samples + LONGEST:
                with contextlib.suppress(PermissionError):
                    process.kill()
                    process.wait()
                raise TimeoutError(f"powermetrics has not ended after {samples + LONGEST:.0f} s")
        seconds = time.perf_counter() - began
        answer.seek(0)
        complaint.seek(0)
        if process.returncode:
            said = complaint.read().split("\n")[0].strip()
            raise PermissionError(said or f"powermetrics ended with {process.returncode}")
        return parse(answer.read()), images / seconds
