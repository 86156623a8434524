"""Verbs that show what a model sees: `classify` prints which of the given labels fit each image, `map` draws the dense
features of images next to the images.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_aimv2 import plot
from mlx_aimv2.cli import flags
from mlx_aimv2.cli.output import Failures, progress, show, show_json, show_progress
from mlx_aimv2.config import LIT_CHECKPOINT
from mlx_aimv2.embed.encode import listed_files
from mlx_aimv2.embed.loader import MAX_PATCHES, Decoder
from mlx_aimv2.files import atomic_file, check_file, expand_user, read_text, stems_below
from mlx_aimv2.loading import load
from mlx_aimv2.zero_shot_classifier import TEMPLATES, Prediction, ZeroShotClassifier, check_labels, check_templates

if TYPE_CHECKING:
    from mlx_aimv2.images.open import Levels
    from mlx_aimv2.images.processor import Aimv2Processor
    from mlx_aimv2.model import Aimv2VisionModel

ENDING = ".png"

SOFTWARE = "mlx-aimv2 map"
"""Written into every map, so a map can replace an earlier map and nothing else."""

HEIGHT = 672
"""Side of the written image in pixels, or a little less: a patch is a whole number of pixels."""


def add_classify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("images", nargs="+", metavar="IMAGE", help="image file, folder or pattern")
    flags.add_rules(add)
    add("--labels", metavar="A,B,…", help="the labels, separated by commas")
    add("--labels-file", metavar="FILE", help="the labels, one per line; here they may contain commas")
    words = f"sentence with {{}} for the label; {flags.REPEATED} (default: {TEMPLATES[0]!r})"
    add("--template", action="append", metavar="TEXT", help=words)

    add = parser.add_argument_group("model").add_argument
    words = f"{flags.MODEL}, with a text encoder (default: %(default)s)"
    add("-m", "--model", default=LIT_CHECKPOINT, metavar="MODEL", help=words)
    flags.add_revision(add)
    flags.add_dtype(add)
    flags.add_image_size(add)

    flags.add_policy_arguments(parser.add_argument_group("reading images").add_argument)

    add = parser.add_argument_group("output").add_argument
    add("-k", "--top", type=int, metavar="N", help="labels shown for each image (default: 5; all in JSON)")
    add("--json", action="store_true", help="print a JSON object per image, one per line")


def run_classify(arguments: argparse.Namespace) -> int:
    """Prints the best labels of each image; returns 1 when some could not be read."""
    if arguments.top is not None and arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    policy = flags.policy_of(arguments)
    labels = check_labels(_labels(arguments.labels, arguments.labels_file))  # before the model, which takes longer
    templates = check_templates(arguments.template or TEMPLATES)
    failures = Failures()
    images = listed_files(arguments.images, failures, exclude=arguments.exclude, include=arguments.include)
    names = (os.path.abspath(expand_user(name)) for name in arguments.images)  # noqa: PTH100 - as the listing's
    given = {path: number for number, path in enumerate(dict.fromkeys(names))}
    images.sort(key=lambda path: given.get(path, len(given)))  # what has a name: as it was given
    keywords = {name: getattr(arguments, name) for name in ("revision", "dtype", "image_size")}
    model, processor = load(arguments.model, **keywords)
    classifier = ZeroShotClassifier(model, processor, labels, templates=templates)
    with progress() as on_progress:
        for done, result in enumerate(classifier.each(images, policy=policy)):
            on_progress(done + 1, len(images), "images")
            if isinstance(result, Prediction):
                (_show_json if arguments.json else _show_text)(images[done], result, arguments.top)
            else:
                failures(images[done], str(result).removeprefix(f"{images[done]} "))
    return 1 if failures else 0


def _labels(listed: str | None, file: str | None) -> list[str]:
    if listed is None and file is None:
        raise ValueError("no labels: give --labels cat,dog or --labels-file FILE")
    labels = listed.split(",") if listed is not None else []
    if file is not None:
        labels += read_text(expand_user(file)).split("\n")
    return [label.strip() for label in labels if label.strip()]


def _show_text(image: str, prediction: Prediction, count: int | None) -> None:
    show(image)
    for label, probability in prediction.top(count or 5):
        show(f"{100 * probability:7.2f} %  {label}")


def _show_json(image: str, prediction: Prediction, count: int | None) -> None:
    logits = dict(zip(prediction.labels, map(float, prediction.logits), strict=True))
    best = prediction.top(count)
    labels = [{"label": label, "probability": probability, "logit": logits[label]} for label, probability in best]
    show_json({"path": image, "labels": labels})


def add_map(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("images", nargs="+", metavar="IMAGE", help="image file, folder or pattern")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", required=True, metavar="MODEL", help=flags.MODEL)
    flags.add_revision(add)
    flags.add_dtype(add)
    flags.add_image_size(add)

    add = parser.add_argument_group("what is drawn").add_argument
    words = "how similar patches are to this one, 0,0 at the top left (default: three principal components as colours)"
    add("--patch", type=flags.whole_numbers, metavar="ROW,COL", help=words)

    add = parser.add_argument_group("reading images").add_argument
    add("--max-patches", type=int, default=MAX_PATCHES, metavar="N", help=f"{flags.PATCHES} (default: %(default)s)")
    flags.add_policy_arguments(add)

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", metavar="PATH", help=f"{ENDING} file for one image, else a folder (default: this folder)")
    add("--overwrite", action="store_true", help="replace any file of the map's name, but no image")
    add("--json", action="store_true", help="print a JSON object per image, one per line")


def run_map(arguments: argparse.Namespace) -> int:
    """Draws every image's map; 1 where some could not be drawn, each named on stderr."""
    if arguments.patch is not None and len(arguments.patch) != 2:
        raise ValueError(f"--patch is a row and a column such as 3,5, got {','.join(map(str, arguments.patch))}")
    policy = flags.policy_of(arguments)
    fail = Failures()
    if files := listed_files(arguments.images, fail):
        kind = "pca" if arguments.patch is None else "patch"
        targets = _targets(arguments.images, files, arguments.output, kind)
        own = f"Software\0{SOFTWARE}".encode()
        for target in targets:
            if target.exists() or target.is_symlink() or target.parent.is_dir():  # else the folder is made later
                options = {"overwrite": arguments.overwrite, "inputs": files}
                check_file(target, option="--output", is_own=lambda head: own in head, **options)
        keywords = {name: getattr(arguments, name) for name in ("revision", "dtype", "image_size")}
        model, processor = load(arguments.model, **keywords)
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
