"""What a step of `make verify` takes and gives: a loaded checkpoint, and findings, the lines of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from convert.published import Row
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.loading import AnyModel

PASS, FAIL, NOT_DONE, MEASURED, COMPUTED = "pass", "**FAIL**", "not done", "measured", "computed"


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, the verdict, and the numbers."""

    what: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class Subject:
    """What the steps check: a checkpoint in float32 with the image, its pixels (1, H, W, 3) and features (1, N, D).

    `note` says why published values cannot be compared, empty where they can. `place` is a folder for whatever a step
    writes, and `repeats` are the runs of which a speed is the median.
    """

    row: Row
    model: AnyModel
    processor: Aimv2Processor
    image: Path
    pixels: mx.array
    features: mx.array
    note: str
    place: Path
    repeats: int


Step = Callable[[Subject], "list[Finding]"]


def run_steps(steps: Mapping[str, Step], subject: Subject, say: Callable[[str], None]) -> list[Finding]:
    """The findings of all steps, in their order. One that fails is a line of its own, and the others go on."""
    findings = []
    for what, step in steps.items():
        say(f"{subject.row.name}: {what}")
        try:
            findings += step(subject)
        except Exception as error:  # whatever it is, the reader's other numbers are worth having
            findings.append(failed(what, error))
    return findings


def failed(what: str, error: Exception) -> Finding:
    """The line of a step that was ended by an error; without the name of the user's own folder."""
    expected = isinstance(error, (ValueError, OSError, RuntimeError))
    text = " ".join(str(error).split()) if expected else f"{type(error).__name__}: {error}"
    return Finding(what, FAIL, text.replace(str(Path.home()), "~"))


def section(row: Row, findings: list[Finding]) -> str:
    """The findings about one checkpoint as a Markdown table."""
    rows = [(finding.what, finding.verdict, finding.detail) for finding in findings]
    lines = [f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([f"### {row.name}", "", "| | | |", "|---|---|---|", *lines])
