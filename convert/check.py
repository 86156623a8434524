"""Compares features with those of transformers on torch, for a whole checkpoint and real images.

    python -m convert.check apple/aimv2-large-patch14-224 --images DIR

Needs the extra `parity`. transformers reads the checkpoint itself where it can (its own layout, which `main` holds for
Apple's repositories), else an export of it, which is bit-exact but uses this package's own translation.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX: TensorFloat32 would cost five digits where there is any

import mlx.core as mx
import numpy as np

from mlx_aimv2 import load
from mlx_aimv2.cli.dispatch import one_line_errors
from mlx_aimv2.conversion.fidelity import choose_images
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import read_source

TOLERANCE = 1e-4
"""Largest relative error that passes, `|found - expected| / |expected|`; backends differ by about 1e-6 in float32."""


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convert.check", description="Compare with transformers on torch.")
    parser.add_argument("checkpoint", help="Hub name or folder, in any layout")
    parser.add_argument("--revision", help="branch, tag or commit read here (default: the pinned one)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="(default: the four bundled photographs)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="E", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    return one_line_errors(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Prints one line for each image and returns 1 if an error exceeds the tolerance."""
    paths = choose_images(arguments.images)
    errors = compare(arguments.checkpoint, paths, revision=arguments.revision)
    for path, error in zip(paths, errors, strict=True):
        print(f"{error:.2e}  {Path(path).name}")
    print(f"largest relative error {max(errors):.2e}, allowed {arguments.tolerance:.0e}")
    return int(max(errors) > arguments.tolerance)


def compare(checkpoint: str, images: Sequence[str | os.PathLike[str]], *, revision: str | None = None) -> list[float]:
    """Relative error of the last hidden state for each image, in float32: `checkpoint, B images -> [B errors]`.

    Raises ValueError without torch and transformers.
    """
    model, processor = load(checkpoint, revision=revision, dtype="float32")
    reference = _transformers_model(checkpoint, revision)
    return [_error(model.vision, reference, processor([image])) for image in images]


def _error(model: Any, reference: Any, pixels: mx.array) -> float:
    import torch

    with torch.no_grad():
        images = torch.from_numpy(np.array(pixels).transpose(0, 3, 1, 2).copy())
        expected = reference(images).last_hidden_state.numpy()
    found = np.array(model(pixels).last_hidden_state)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _transformers_model(checkpoint: str, revision: str | None) -> Any:
    """transformers' vision model of the same weights, in float32."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"{error.name} is needed here: pip install 'mlx-aimv2[parity]'") from None
    source = read_source(checkpoint, revision=revision)
    name = "Aimv2Model" if hasattr(source.config, "text_config") else "Aimv2VisionModel"
    from_pretrained = getattr(transformers, name).from_pretrained
    if source.layout == "transformers":
        model = from_pretrained(source.origin.folder, dtype=torch.float32)
    elif source.origin.repo and source.origin.repo.startswith("apple/"):
        model = from_pretrained(source.origin.repo, dtype=torch.float32)  # `main`, in transformers' own layout
    else:
        with tempfile.TemporaryDirectory() as place:
            exported = convert(checkpoint, Path(place) / "exported", export_layout="transformers", verify=False)
            model = from_pretrained(exported, dtype=torch.float32)
    return getattr(model, "vision_model", model).eval()


if __name__ == "__main__":
    sys.exit(main())
