"""Draws what the demo found: features, images by words, all images in a plane, labels, digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mlx_aimv2 import plot
from mlx_aimv2.learn import predict
from mlx_aimv2.learn.fit_head import Fitted
from mlx_aimv2.plot import below, beside, contact_sheet
from mlx_aimv2.serve.plane import neighbour_plane

Array = NDArray[Any]

PATCHES = {"chelsea.jpg": (9, 9), "coffee.jpg": (8, 12), "rocket.jpg": (10, 12)}
"""Photograph -> the patch that all others are compared with: an eye, the coffee, the rocket."""

WORDS, QUERY = ("animal", "face", "plant", "green"), "down-right-arrow.webp"
LABELLED = {
    "cow": "animal", "bouquet": "plant", "angry-face": "face", "waving-hand": "hand", "red-square": "square",
    "kangaroo": "animal", "hibiscus": "plant", "weary-face": "face", "backhand-index-pointing-right": "hand",
    "green-square": "square",
}  # fmt: skip
"""What is searched for, and emoji with their labels: words that the pair knows."""

TITLE = "A tiny model in the package: two encoders with 3.8 M parameters, trained on emoji alone"
ABOUT = "Of 1,689 emoji in a style that it never saw, 29.4 % find their own name first. These are words that it knows."

SIDE, PLANE = 66, (940, 690)
RIGHT, WRONG = (60, 160, 90), (214, 69, 65)


def draw(
    maps: Sequence[Image.Image],
    found: Mapping[str, Sequence[str]],
    stored: Mapping[str, Array],
    classes: Mapping[Path, str],
    fitted: Fitted,
) -> Image.Image:
    """The picture: maps of features, query -> files, file -> vector, file -> label, what learned digits."""
    rows = [
        titled(contact_sheet([[Image.open(file) for file in files]], side=76, gap=18), query, size=18)
        for query, files in found.items()
    ]
    small = [Image.open(file).convert("RGB").resize((34, 34), Image.Resampling.LANCZOS) for file in stored]
    plane = scatter(neighbour_plane(np.array(list(stored.values()))), small, size=PLANE)
    tests = [fitted.folder.parent.resolve() / f"digits/test/{digit}/{n:03}.png" for n in (0, 1) for digit in range(10)]
    digits = {Path(path): str(prediction.label) for path, prediction in predict(fitted.folder, tests)}
    accuracy = f"a linear probe on 150 scans; {fitted.scores['test']['top1']:.0%} of 100 others are right"
    panels = [
        titled(contact_sheet([maps], side=maps[0].height, gap=16), "Features: a vector for each of 24 x 24 patches",
               subtitle="a photograph; like colours for like vectors; how similar each patch is to the framed one"),
        beside([
            titled(below(rows, gap=0), "Words and images find images", subtitle="the best five of 300, in order"),
            titled(plane, "300 emoji in a style that training never saw, where their features lie",
                   subtitle="drawn by t-SNE, which sees neither names nor pixels"),
        ]),
        beside([
            titled(judged(classes, [*LABELLED.values()], gap=26), "Labels in words, nothing is trained",
                   subtitle=f"the likeliest of {', '.join(sorted({*LABELLED.values()}))}", size=18),
            titled(judged({file: digits[file] for file in tests}, [file.parent.name for file in tests], gap=22),
                   "Handwritten digits, learned in seconds", subtitle=accuracy, size=18),
        ]),
    ]  # fmt: skip
    return ImageOps.expand(titled(below(panels, gap=12), TITLE, subtitle=ABOUT, size=30), 28, plot.PAPER)


def judged(given: Mapping[Path, str], wanted: Sequence[str], *, gap: int) -> Image.Image:
    """Images in two rows over the labels they were given, framed by whether these are the wanted ones."""
    half = len(given) // 2
    frames = [RIGHT if label == truth else WRONG for label, truth in zip(given.values(), wanted, strict=True)]
    images, captions = [Image.open(file) for file in given], list(given.values())
    rows = ([some[:half], some[half:]] for some in (images, captions, frames))
    return contact_sheet(next(rows), captions=next(rows), frames=next(rows), side=SIDE, gap=gap)


def titled(image: Image.Image, title: str, *, subtitle: str = "", size: int = 22) -> Image.Image:
    """A copy of an image with a line of text above it, and a fainter one below that."""
    band = round(size * 1.7) + (round(size * 1.05) if subtitle else 0)
    canvas = Image.new("RGB", (image.width, image.height + band), plot.PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((10, size * 0.4), title, plot.INK, ImageFont.load_default(size))
    draw.text((10, size * 1.65), subtitle, plot.FAINT, ImageFont.load_default(round(size * 0.72)))
    canvas.paste(image, (0, band))
    return canvas


def scatter(points: Array, images: Sequence[Image.Image], *, size: tuple[int, int]) -> Image.Image:
    """Small images where their features lie, `(n, 2) coordinates -> image` of `size`, width and height.

    White is left out, and images that would lie on each other are moved apart until each can be seen, so that close
    positions are not exact.
    """
    canvas = Image.new("RGB", size, plot.PAPER)
    side = max(max(image.size) for image in images)
    centres = _apart(_fitted(points, size, side // 2 + 4), 0.8 * side)
    for (x, y), image in zip(_fitted(centres, size, side // 2 + 4), images, strict=True):
        ink = ImageOps.invert(image.convert("L")).point(lambda level: min(255, 8 * level))
        canvas.paste(image, (round(x) - ink.width // 2, round(size[1] - y) - ink.height // 2), ink)
    return canvas


def _fitted(points: Array, size: tuple[int, int], rim: int) -> Array:
    """Points stretched to fill a canvas of `size` up to its rim, `(n, 2) -> (n, 2)`."""
    spread = np.ptp(points, axis=0)
    fitted: Array = rim + (points - points.min(axis=0)) / np.where(spread > 0, spread, 1) * (np.array(size) - 2 * rim)
    return fitted


def _apart(points: Array, distance: float, *, steps: int = 60) -> Array:
    """Points pushed away from each other where they are nearer than `distance`: `(n, 2) -> (n, 2)`."""
    for _ in range(steps):
        away = points[:, None] - points  # (n, n, 2)
        gaps = np.maximum(np.linalg.norm(away, axis=2), 1e-6)
        push = np.maximum(distance - gaps, 0) / gaps * 0.25
        points = points + (away * push[:, :, None]).sum(axis=1)
    return points
