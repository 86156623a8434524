"""Reports the fidelity of a model to its reference: cosines of the features, range of activations, size.

The reference runs in float32, the other model in its own dtype, on the same images.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_aimv2 import __version__
from mlx_aimv2.conversion.blockwise import BlockwiseRun, Floats, cosines, run_blockwise, token_cosines
from mlx_aimv2.device import FLOAT16_LARGEST, HEADROOM, REPORT
from mlx_aimv2.find_images import list_images
from mlx_aimv2.loading import Source, read_source

FILE = REPORT

LIMITS = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": FLOAT16_LARGEST}
"""The largest number of each dtype."""

MOST_IMAGES = 32
"""Of a folder with more images this many are taken, evenly spread over their sorted names."""


def compare(
    reference: str | os.PathLike[str],
    other: str | os.PathLike[str],
    *,
    images: Sequence[str | os.PathLike[str]] | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Compares a model with its reference on images: `two paths or Hub names -> the content of fidelity.json`.

    `images` None takes the four that are bundled; `revision` is the reference's. Neither model is ever in memory as a
    whole. Raises ValueError where the two give features of different shapes.
    """
    images = images if images is not None else choose_images(None)
    run = run_reference(read_source(reference, revision=revision), images)
    return report(run, run_blockwise(read_source(other), images), images)


def run_reference(source: Source, images: Sequence[str | os.PathLike[str]]) -> BlockwiseRun:
    """Runs the reference in float32, using up its weights.

    Raises ValueError, with the first block where it happens, for NaN or infinity.
    """
    run = run_blockwise(source, images, dtype="float32", inside=True)
    for block, peak in run.peaks.items():
        if not np.isfinite(peak):
            raise ValueError(
                f"{run.name}: {block} gives numbers that are not finite even in float32: "
                "its weights are damaged (NaN, infinite or huge); fetch them again"
            )
    return run


def report(reference: BlockwiseRun, other: BlockwiseRun, images: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Two runs on the same images as the content of fidelity.json."""
    _check_comparable(reference, other)
    tokens = token_cosines(reference.tokens, other.tokens)
    found: dict[str, Any] = {
        "reference": _about(reference),
        "model": _about(other),
        "images": [_text(Path(image).name) for image in images],
        "tokens": len(tokens),
        "token_cosine": _spread(tokens),
        "image_cosine": _spread(cosines(reference.vectors, other.vectors)),
    }
    if reference.text_vectors is not None and other.text_vectors is not None:
        found["text_cosine"] = _spread(cosines(reference.text_vectors, other.text_vectors))
        found["largest_logit_difference"] = _finite(np.abs(reference.logits - other.logits).max())  # type: ignore[operator]
    block = max(reference.peaks, key=lambda name: reference.peaks[name])
    found["largest_activation"] = {"block": block, "value": _finite(reference.peaks[block])}
    found["activations"] = {name: _finite(peak) for name, peak in reference.peaks.items()}
    found["limit"] = LIMITS[other.dtype]
    found["warnings"] = _warnings(reference, other)
    found["versions"] = {"mlx_aimv2": __version__, "mlx": version("mlx")}
    return found


def choose_images(folder: str | os.PathLike[str] | None) -> list[Path]:
    """The images to compare on: those of a folder, or the four that are bundled. Raises FileNotFoundError for none."""
    if folder is None:
        from mlx_aimv2 import bundled

        return bundled.photographs()
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: wanted a folder of images, there is none")
    files = [Path(file) for file in list_images([folder]).files]
    if not files:
        raise FileNotFoundError(f"{folder}: no images in this folder")
    if len(files) > MOST_IMAGES:
        files = [files[i * len(files) // MOST_IMAGES] for i in range(MOST_IMAGES)]
    return files


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The small table, `fidelity.json -> [(what, value), …]`, for the terminal and the model card."""
    model, largest = found["model"], found["largest_activation"]
    token, image = found["token_cosine"], found["image_cosine"]
    table = [
        ("token cosine, mean", _cosine(token["mean"])),
        ("token cosine, least", _cosine(token["min"])),
        ("image vector cosine, least", _cosine(image["min"])),
    ]
    if "text_cosine" in found:
        table += [
            ("text vector cosine, least", _cosine(found["text_cosine"]["min"])),
            ("largest difference of logits", f"{found['largest_logit_difference']:.4g}"),
        ]
    table += [
        (
            "largest activation",
            f"{largest['value']:.4g} in {largest['block']} ({model['dtype']} holds {found['limit']:.4g})",
        ),
        ("size", f"{_megabytes(model['bytes'])}, {model['bits_per_weight']:.3f} bits per weight"),
        ("size of the reference", f"{_megabytes(found['reference']['bytes'])}"),
        ("measured on", f"{_counted(len(found['images']), 'image')}, {found['tokens']} tokens, against float32"),
    ]
    return table


def table(found: Mapping[str, Any]) -> str:
    """`rows` as lines of text, each block's largest activation and the warnings after them."""
    peaks = " ".join(f"{peak:.3g}" for peak in found["activations"].values())
    lines = [*rows(found), ("block by block", peaks)]
    width = max(len(what) for what, _ in lines)
    return "\n".join([*(f"{what:<{width}}  {value}" for what, value in lines), *found["warnings"]])


def _check_comparable(reference: BlockwiseRun, other: BlockwiseRun) -> None:
    for a, b in zip(reference.tokens, other.tokens, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"{reference.name} makes {a.shape[0]} tokens of width {a.shape[1]} of an image, {other.name} makes "
                f"{b.shape[0]} of width {b.shape[1]}; models are compared token by token, so both must be equal"
            )
    if reference.vectors.shape != other.vectors.shape or (reference.text_vectors is None) != (
        other.text_vectors is None
    ):
        raise ValueError(
            f"one of {reference.name} and {other.name} has a text encoder; compare two vision models or two LiT models"
        )


def _warnings(reference: BlockwiseRun, other: BlockwiseRun) -> list[str]:
    warnings = []
    if not all(np.isfinite(array).all() for array in (*other.tokens, other.vectors)):
        remedy = "its weights are damaged" if other.dtype == "float32" else "use bfloat16 or float32"
        warnings.append(f"{other.name} gives features that are not finite in {other.dtype}; {remedy}")
    for name, peak in reference.peaks.items():
        if peak * HEADROOM > LIMITS["float16"]:
            times = LIMITS["float16"] / peak
            warnings.append(
                f"{name}: an activation of {peak:.4g} leaves float16 (up to 65504) a factor of {times:.2f}; "
                "prefer bfloat16 or float32"
            )
    return warnings


def _about(run: BlockwiseRun) -> dict[str, Any]:
    return {
        "name": run.name,
        "dtype": run.dtype,
        "parameters": run.parameters,
        "bytes": run.stored_bytes,
        "bits_per_weight": round(run.bits_per_weight, 4),
    }


def _spread(values: Floats) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(np.min(values))}


def _finite(value: float) -> float:
    """The value, or the largest float where it is not finite: JSON has no infinity."""
    return float(np.nan_to_num(float(value), nan=sys.float_info.max))


def _text(name: str) -> str:
    """A file's name as JSON can hold it, even where its bytes are no text."""
    return name.encode(errors="backslashreplace").decode()


def _cosine(value: float) -> str:
    return f"{value:.6f}"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
