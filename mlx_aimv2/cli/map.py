"""`mlx-aimv2 map`: draws the dense features of images beside the images."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_aimv2 import plot
from mlx_aimv2.cli.flags import MODEL, PATCHES, add_dtype, add_policy_arguments, add_revision, policy_of
from mlx_aimv2.cli.output import Failures, show_progress
from mlx_aimv2.embed.encode import listed_files
from mlx_aimv2.embed.loader import MAX_PATCHES, Decoder
from mlx_aimv2.files import atomic_file, check_file, expand_user, stems_below
from mlx_aimv2.loading import load

if TYPE_CHECKING:
    from mlx_aimv2.images.open import Levels
    from mlx_aimv2.images.processor import Aimv2Processor
    from mlx_aimv2.model import Aimv2VisionModel

ENDING = ".png"

SOFTWARE = "mlx-aimv2 map"
"""Stands in every map, so that a map may replace an earlier one and nothing else."""

HEIGHT = 672
"""Of the image that is written, in pixels, or a little less: a patch is a whole number of pixels."""


def add_map(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("images", nargs="+", metavar="IMAGE", help="image file, folder or pattern")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", required=True, metavar="MODEL", help=MODEL)
    add_revision(add)
    add_dtype(add)

    add = parser.add_argument_group("what is drawn").add_mutually_exclusive_group().add_argument
    add("--pca", action="store_true", help="three principal components as colours (the default)")
    words = "how similar every patch is to this one; 0,0 is at the top left"
    add("--patch", type=_patch, metavar="ROW,COL", help=words)

    add = parser.add_argument_group("reading images").add_argument
    add("--max-patches", type=int, default=MAX_PATCHES, metavar="N", help=f"{PATCHES} (default: %(default)s)")
    add_policy_arguments(add)

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", metavar="PATH", help=f"{ENDING} file for one image, else a folder (default: this folder)")
    add("--overwrite", action="store_true", help="replace any file of the map's name, but no image")
    add("--json", action="store_true", help="print a JSON object for each image, one a line")


def run_map(arguments: argparse.Namespace) -> int:
    """Draws every image's map; 1 where some could not be drawn, each named on stderr."""
    if arguments.max_patches < 1:
        raise ValueError(f"--max-patches must be at least 1, got {arguments.max_patches}")
    policy = policy_of(arguments)
    fail = Failures()
    if files := listed_files(arguments.images, fail):
        kind = "pca" if arguments.patch is None else "patch"
        targets = _targets(arguments.images, files, arguments.output, kind)
        for target in targets:
            _check(target, files, overwrite=arguments.overwrite)
        model, processor = load(arguments.model, revision=arguments.revision, dtype=arguments.dtype)
        decoder = Decoder(processor, max_patches=arguments.max_patches, policy=policy)
        mark = PngInfo()
        mark.add_text("Software", SOFTWARE)
        for decoded, target in zip(map(decoder, files), targets, strict=True):
            if decoded.note is not None:
                warnings.warn(f"{decoded.path} {decoded.note}", stacklevel=1)
            try:
                if decoded.levels is None:
                    raise ValueError(decoded.failure)
                image, grid = draw(model.vision, processor, decoded.levels, patch=arguments.patch)
            except ValueError as error:
                fail(decoded.path, str(error))
                continue
            finally:
                mx.clear_cache()  # each size of a native image would keep buffers of its own
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as stream:
                image.save(stream, "PNG", pnginfo=mark)
            record = {"image": decoded.path, "map": str(target), "rows": grid[0], "columns": grid[1]}
            show_progress(json.dumps(record) if arguments.json else str(target))
    return 1 if fail else 0


def draw(
    model: Aimv2VisionModel, processor: Aimv2Processor, levels: Levels, *, patch: tuple[int, int] | None
) -> tuple[Image.Image, tuple[int, int]]:
    """An image as the model sees it beside its map, and the grid: `(H, W, 3) uint8 -> (image, (rows, columns))`.

    ValueError goes on with a sentence that starts with the image's name.
    """
    pixels = processor.normalised(mx.array(levels[None]))
    rows, columns = grid = model.grid(pixels)
    tokens = np.array(model(pixels).last_hidden_state[0].astype(mx.float32))
    if not np.isfinite(tokens).all():
        raise ValueError("gets features that are not finite; is the checkpoint damaged?")
    side, cell = model.config.patch_size, max(1, HEIGHT // rows)
    seen = Image.fromarray(levels[: rows * side, : columns * side])  # the rest fills no patch: not seen
    seen = plot.to_height(seen, rows * cell)
    if patch is None:
        both = [seen, plot.pca_map(tokens, grid, cell=cell)]
    else:
        both = [plot.framed(seen, grid, patch), plot.similarity_map(tokens, grid, patch, cell=cell)]
    return plot.beside(both, gap=8), grid


def _targets(given: list[str], files: list[str], output: str | None, kind: str) -> list[Path]:
    """Where each image's map goes: in a folder below the path that the image has in the one that was given."""
    if output is not None and output.lower().endswith(ENDING):
        if len(files) > 1:
            raise ValueError(f"--output {output} is one file for {len(files)} images: give a folder")
        return [expand_user(output)]
    folder = expand_user(output or ".")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {output} is neither a folder nor ends in {ENDING}")
    return [folder / f"{stem}-{kind}{ENDING}" for stem in stems_below(given, files).values()]


def _check(target: Path, files: list[str], *, overwrite: bool) -> None:
    """Raises OSError where an image or, without `overwrite`, anything but a map would be replaced."""
    if target.exists() or target.is_symlink() or target.parent.is_dir():  # else the folder is made later
        mark = f"Software\0{SOFTWARE}".encode()
        check_file(target, option="--output", is_own=lambda head: mark in head, overwrite=overwrite, inputs=files)


def _patch(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+),(\d+)", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"wanted ROW,COL such as 3,5, got {text!r}")
    return int(found[1]), int(found[2])
