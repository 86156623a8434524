"""Verifies that Apple's published weights give the published numbers on this machine: a report to paste into an issue.

    python -m convert.verify                                             the first checkpoint of the list
    python -m convert.verify aimv2-large-patch14-native aimv2-1B-patch14-448

For each: download at the pinned commit, count, compare with published values and with transformers (where torch is
installed), convert, check that attention is fused on the GPU, measure float16's range and the speed; then embed and fit
on ten images, and measure the speed from files to vectors, the peak memory, and on a Mac the energy, if powermetrics
needs no password. What cannot be done here is listed in the report. The exit code is 1 when something came out wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX: TensorFloat32 would cost five digits where there is any

import mlx.core as mx
from PIL import Image

from convert import machine, verify_numbers, verify_use
from convert.published import FILE, ReferenceImage, Row, choose, read
from convert.report import FAIL, Finding, Step, Subject, failed, run_steps, section
from mlx_aimv2 import bundled, load
from mlx_aimv2.cli.dispatch import one_line_errors

STEPS: dict[str, Step] = {
    "energy": verify_use.use_energy,  # first, as sudo forgets a password after five minutes
    **verify_numbers.STEPS,
    **verify_use.STEPS,
}
"""What is checked -> the step, in the order of the report."""

WHERE = "Paste all of {name}, this line too, into a new issue of the repository: template *Report of make verify*."

DESCRIPTION = """Verify published checkpoints on this machine: numbers, conversion, fused attention, embed and fit on
ten images, speed, peak memory, energy. The report is printed and written to a file, to be pasted into an issue."""


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.verify",
        description=DESCRIPTION,
        epilog="Energy needs powermetrics, which macOS lets root run alone: sudo -v && make verify. "
        "You are never asked for a password.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="checkpoints (default: the first of the list)")
    parser.add_argument("--list", type=Path, default=FILE, metavar="TOML", help="the list (default: published.toml)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a copy of the list's image (default: fetch it)")
    parser.add_argument("--report", type=Path, default=Path("verify.md"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs per speed (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return one_line_errors(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Verifies, prints the report, writes it to its file, and returns the exit code."""
    rows, image = read(arguments.list)
    chosen = choose(rows, arguments.names) if arguments.names else rows[:1]
    parts, wrong = [machine.section()], False
    with tempfile.TemporaryDirectory() as folder:
        path, note = find_image(image, arguments.image, Path(folder))
        for row in chosen:
            place = Path(folder) / row.name
            place.mkdir()
            findings = verify(row, path, place, note=note, repeats=arguments.repeats)
            wrong |= any(finding.verdict == FAIL for finding in findings)
            parts.append(section(row, findings))
            shutil.rmtree(place, ignore_errors=True)
            mx.clear_cache()
    report = "\n\n".join([*parts, WHERE.format(name=arguments.report.name)]) + "\n"
    print(report, end="")
    arguments.report.write_text(report, encoding="utf-8")
    _say(f"the report is in {arguments.report}; its last line says where to paste it")
    return int(wrong)


def find_image(reference: ReferenceImage, given: Path | None, place: Path) -> tuple[Path, str]:
    """An image file and a note, empty if it is the image the values were published for.

    Raises FileNotFoundError for a `given` file that is not there; without network a bundled photograph serves the steps
    that need no particular one.
    """
    path = given or place / "image.jpg"
    if given is None:
        _say(f"fetching {reference.url}")
        try:
            with urllib.request.urlopen(reference.url, timeout=30) as answer:
                path.write_bytes(answer.read())
        except OSError as error:
            return bundled.photographs()[0], f"{reference.url} could not be fetched ({error}); give it with --image"
    with Image.open(path) as image:
        if image.size != reference.size:
            wanted = "{} x {}".format(*reference.size)
            return path, f"{path.name} has {image.width} x {image.height} pixels, {reference.name} has {wanted}"
    return path, ""


def verify(row: Row, image: Path, place: Path, *, note: str = "", repeats: int = 5) -> list[Finding]:
    """All findings about one checkpoint; `note` says why published values cannot be compared."""
    what = "download and read"
    _say(f"{row.name}: {what}")
    try:
        findings = [verify_numbers.count_parameters(row)]
        model, processor = load(row.repo, revision=row.commit, dtype="float32")
        pixels = processor([image])
        features = model.vision(pixels).last_hidden_state
        mx.eval(features)
    except Exception as error:  # the other checkpoints go on
        return [failed(what, error)]
    subject = Subject(row, model, processor, image, pixels, features, note, place, repeats)
    return [*findings, *run_steps(STEPS, subject, _say)]


def _say(line: str) -> None:
    print(f"[verify] {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
