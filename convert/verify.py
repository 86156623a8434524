"""Verifies that Apple's published weights give the published numbers on this machine: a report to paste into an issue.

    python -m convert.verify                                             the first checkpoint of the list
    python -m convert.verify aimv2-large-patch14-native aimv2-1B-patch14-448

For each: download at the pinned commit, count, compare with published values and with transformers (where torch is
installed), convert, check that attention is fused on the GPU, measure float16's range and the speed. What cannot be
done here is listed in the report. The exit code is 1 when something came out wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX: TensorFloat32 would cost five digits where there is any

import mlx.core as mx
import numpy as np
from PIL import Image

from convert import check, machine
from convert.checkpoints import FILE, ReferenceImage, Row, choose, read
from mlx_aimv2 import Aimv2Model, bundled, load
from mlx_aimv2.cli import one_line_errors
from mlx_aimv2.conversion import fidelity
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import AnyModel, read_source
from mlx_aimv2.processor import Aimv2Processor

ALLOWED = 1e-3
"""Difference to published values that passes; the test-suite they come from allows the same."""

PASS, FAIL, NOT_DONE, MEASURED = "pass", "**FAIL**", "not done", "measured"


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, the verdict, and the numbers."""

    what: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class Subject:
    """What the steps check: a row and the image, with a folder for whatever they write."""

    row: Row
    image: Path
    image_is_the_published: bool
    place: Path
    repeats: int


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convert.verify", description="Verify published checkpoints here.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="checkpoints (default: the first of the list)")
    parser.add_argument("--list", type=Path, default=FILE, metavar="TOML", help="the list (default: checkpoints.toml)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a copy of the list's image (default: fetch it)")
    parser.add_argument("--report", type=Path, default=Path("verify.md"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs per speed (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return one_line_errors(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Verifies, prints the report, writes it to its file, and returns the exit code."""
    rows, image = read(arguments.list)
    chosen = choose(rows, arguments.names) if arguments.names else rows[:1]
    parts, failed = [machine.section()], False
    with tempfile.TemporaryDirectory() as place:
        path, note = find_image(image, arguments.image, Path(place))
        for row in chosen:
            subject = Subject(row, path, not note, Path(place) / row.name, arguments.repeats)
            findings = verify(subject, note)
            failed |= any(finding.verdict == FAIL for finding in findings)
            parts.append(section(row, findings))
            shutil.rmtree(subject.place, ignore_errors=True)
    report = "\n\n".join(parts) + "\n"
    print(report, end="")
    arguments.report.write_text(report, encoding="utf-8")
    _say(f"the report is in {arguments.report}; paste it into an issue")
    return int(failed)


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


def verify(subject: Subject, note: str = "") -> list[Finding]:
    """All findings about one checkpoint; `note` says why published values cannot be compared."""
    _say(f"{subject.row.name}: download and read")
    try:
        findings = [_read(subject)]
        model, processor = load(subject.row.repo, revision=subject.row.commit, dtype="float32")
        pixels = processor([subject.image])
        features = model.vision(pixels).last_hidden_state
    except (ValueError, OSError) as error:
        return [Finding("download and read", FAIL, _line(error))]
    steps: dict[str, Callable[[], list[Finding]]] = {
        "published values": lambda: [_published(subject, features, note)],
        "zero-shot": lambda: _zero_shot(model, processor, pixels),
        "conversion": lambda: [_conversion(subject, features, pixels)],
        "transformers on torch": lambda: [_transformers(subject)],
        "fused attention": lambda: _fused(model, pixels),
        "float16": lambda: _halves(subject),
        "speed": lambda: _speed(model, pixels, subject.repeats),
    }
    for what, step in steps.items():
        _say(f"{subject.row.name}: {what}")
        try:
            findings += step()
        except (ValueError, OSError, RuntimeError) as error:
            findings.append(Finding(what, FAIL, _line(error)))
    return findings


def section(row: Row, findings: list[Finding]) -> str:
    """The findings about one checkpoint as a Markdown table."""
    lines = [f"| {finding.what} | {finding.verdict} | {finding.detail} |" for finding in findings]
    return "\n".join([f"### {row.name}", "", "| | | |", "|---|---|---|", *lines])


def _read(subject: Subject) -> Finding:
    source = read_source(subject.row.repo, revision=subject.row.commit)
    count = sum(array.size for array in source.weights.values())
    detail = f"{source.layout} layout, {count:,} parameters"
    if source.origin.commit:
        detail += f", commit {source.origin.commit[:12]}"
    if count != subject.row.parameters:
        return Finding("download and read", FAIL, f"{detail}, wanted {subject.row.parameters:,}")
    return Finding("download and read", PASS, detail)


def _published(subject: Subject, features: mx.array, note: str) -> Finding:
    what, row = "published values", subject.row
    if row.expected is None:
        return Finding(what, NOT_DONE, "none are published for this checkpoint")
    if note:
        return Finding(what, NOT_DONE, note)
    if tuple(features.shape) != row.expected_shape:
        return Finding(what, FAIL, f"shape {tuple(features.shape)}, published {row.expected_shape}")
    wanted = np.array(row.expected)
    found = np.array(features)[0, : wanted.shape[0], : wanted.shape[1]]
    error = float(np.abs(found - wanted).max())
    return Finding(what, PASS if error <= ALLOWED else FAIL, f"largest difference {error:.1e}, allowed {ALLOWED:.0e}")


def _zero_shot(model: AnyModel, processor: Aimv2Processor, pixels: mx.array) -> list[Finding]:
    if not isinstance(model, Aimv2Model):
        return []
    texts = ["a photo of a cat", "a photo of a dog"]
    logits = np.array(model(pixels, processor.tokenize(texts)).logits_per_image)[0]
    return [
        Finding(
            "zero-shot", MEASURED, ", ".join(f"{text}: {logit:.4f}" for text, logit in zip(texts, logits, strict=True))
        )
    ]


def _conversion(subject: Subject, features: mx.array, pixels: mx.array) -> Finding:
    folder = convert(subject.row.repo, subject.place / "mlx", revision=subject.row.commit, verify=False)
    again = load(folder, dtype="float32")[0].vision(pixels).last_hidden_state
    same = bool(mx.array_equal(features, again))
    detail = "the folder gives the same features to the bit" if same else "the folder gives other features"
    shutil.rmtree(folder)
    return Finding("conversion", PASS if same else FAIL, detail)


def _transformers(subject: Subject) -> Finding:
    what = "transformers on torch"
    try:
        import torch
        import transformers
    except ImportError as error:
        return Finding(what, NOT_DONE, f"{error.name} is not installed: pip install 'mlx-aimv2[parity]'")
    distance = check.compare(subject.row.repo, [subject.image], revision=subject.row.commit)[0]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, float32"
    verdict = PASS if distance <= check.TOLERANCE else FAIL
    return Finding(what, verdict, f"relative error {distance:.1e}, allowed {check.TOLERANCE:.0e} ({versions})")


def _fused(model: AnyModel, pixels: mx.array) -> list[Finding]:
    """That the model's own attention calls are fused, in each dtype, by forbidding MLX any other way."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return [Finding("fused attention", NOT_DONE, "no GPU here")]
    findings = []
    for dtype in ("float32", "float16", "bfloat16"):
        cast = _cast(model, dtype)
        try:
            with only_fused() as calls:
                mx.eval(cast.vision(pixels).last_hidden_state)
        except (ValueError, RuntimeError, TypeError) as error:
            findings.append(Finding(f"fused attention, {dtype}", FAIL, _line(error)))
        else:
            heads = len(cast.vision.blocks)
            verdict = PASS if len(calls) >= heads else FAIL
            findings.append(Finding(f"fused attention, {dtype}", verdict, f"{len(calls)} calls in {heads} blocks"))
    return findings


@contextmanager
def only_fused() -> Iterator[list[Any]]:
    """Within the block attention is fused or raises; gives the list of the shapes it was called with."""
    fast: Any = mx.fast
    original = fast.scaled_dot_product_attention
    calls: list[Any] = []

    def forced(queries: mx.array, *arguments: Any, **flags: Any) -> Any:
        calls.append(queries.shape)
        return original(queries, *arguments, **flags, force_fused=True)

    fast.scaled_dot_product_attention = forced
    try:
        yield calls
    finally:
        fast.scaled_dot_product_attention = original


def _halves(subject: Subject) -> list[Finding]:
    """Fidelity in float16, with the largest activations, as every conversion measures it."""
    folder = convert(subject.row.repo, subject.place / "half", revision=subject.row.commit, dtype="float16")
    found = json.loads((folder / fidelity.FILE).read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    findings = [Finding(f"float16: {what}", MEASURED, value) for what, value in fidelity.rows(found)]
    return [*findings, *(Finding("float16: warning", MEASURED, warning) for warning in found["warnings"])]


def _speed(model: AnyModel, pixels: mx.array, repeats: int) -> list[Finding]:
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    findings = []
    for dtype in ("float32", "float16", "bfloat16") if on_gpu else ("float32",):  # halves crawl on a CPU
        cast = _cast(model, dtype)
        rates = []
        for batch in (1, 8):
            many = mx.concatenate([pixels] * batch)
            seconds = machine.median_seconds(partial(_features, cast, many), repeats)
            rates.append(f"{batch / seconds:.2f} ({batch} at once)")
        findings.append(Finding(f"images a second, {dtype}", MEASURED, ", ".join(rates)))
    return findings


def _features(model: AnyModel, pixels: mx.array) -> mx.array:
    return model.vision(pixels).last_hidden_state


def _cast(model: AnyModel, dtype: str) -> AnyModel:
    """The same model in another dtype; the weights given are left as they are."""
    wanted = getattr(mx, dtype)
    if model.dtype == wanted:
        return model
    other = type(model)(model.config)  # type: ignore[arg-type]
    other.update(_tree(model.parameters(), wanted))
    return other


def _tree(tree: Any, dtype: mx.Dtype) -> Any:
    from mlx.utils import tree_map

    return tree_map(lambda array: array.astype(dtype), tree)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).replace("|", "\\|")


def _say(line: str) -> None:
    print(f"[verify] {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
