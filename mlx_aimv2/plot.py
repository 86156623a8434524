"""What do features look like: maps of dense features, heat maps, contact canvases and scatter plots as PIL images?

Every square of a map is one token; nothing is smoothed, so that what is drawn is what the model said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Array: TypeAlias = np.ndarray[Any, Any]
Colour: TypeAlias = tuple[int, int, int]

INK, PAPER, FAINT = (34, 36, 42), (255, 255, 255), (120, 124, 132)

HEAT = ((16, 18, 52), (62, 38, 120), (140, 46, 116), (214, 84, 80), (248, 158, 66), (252, 236, 152))
"""From unlike to alike; lightness rises all the way, so the order survives in grey."""

CLASSES = (
    (214, 69, 65),
    (56, 120, 190),
    (44, 150, 90),
    (236, 150, 30),
    (130, 85, 175),
    (0, 155, 170),
    (190, 90, 140),
    (120, 130, 40),
    (105, 85, 70),
    (90, 105, 130),
)
"""Ten colours that are told apart on white."""


def principal_components(features: Array, count: int) -> Array:
    """The directions along which features differ most, `(n, D), count -> (n, count)` coordinates, widest first.

    The sign of a component, which mathematics leaves open, is the one that makes its largest weight positive. Where
    there are fewer components than asked for, the rest is zero.
    """
    centred = np.asarray(features, np.float64)
    centred = centred - centred.mean(axis=0)
    wide = centred.shape[1] > len(centred)  # the smaller of the two square products has the same components
    product = centred @ centred.T if wide else centred.T @ centred
    spread, vectors = np.linalg.eigh(product)  # smallest first
    spread, vectors = spread[::-1][:count], vectors[:, ::-1][:, :count]
    directions = (centred.T @ vectors if wide else vectors)[:, spread > 1e-9 * max(np.trace(product), 1e-30)].T
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    largest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    coordinates = np.zeros((len(centred), count))
    coordinates[:, : len(directions)] = centred @ directions.T
    return coordinates


def pca_map(tokens: Array, grid: tuple[int, int], *, cell: int = 14) -> Image.Image:
    """Dense features as colours, `(N, D), (rows, columns) -> image`: tokens of like colour are alike.

    Red, green and blue are the first three principal components of this image's tokens, each stretched between its
    2nd and 98th percentile. Each token is a square of `cell` pixels.
    """
    _check_grid(tokens, grid)
    coordinates = principal_components(tokens, 3)
    low, high = np.percentile(coordinates, [2, 98], axis=0)
    flat = high - low < 1e-12
    levels = np.where(flat, 0.5, (coordinates - low) / np.where(flat, 1, high - low))
    return _squares(levels.clip(0, 1).reshape(*grid, 3), cell)


def similarities(tokens: Array, grid: tuple[int, int], patch: tuple[int, int]) -> Array:
    """How alike each token is to one of them, `(N, D), (rows, columns), (row, column) -> (rows, columns)` cosines."""
    _check_grid(tokens, grid)
    if not all(0 <= place < size for place, size in zip(patch, grid, strict=True)):
        raise ValueError(
            f"patch {patch[0]},{patch[1]} is outside the grid of {grid[0]} rows and {grid[1]} columns, "
            "counted from 0,0 at the top left"
        )
    unit = np.asarray(tokens, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    cosines: Array = unit @ unit[patch[0] * grid[1] + patch[1]]
    return cosines.reshape(grid)


def similarity_map(tokens: Array, grid: tuple[int, int], patch: tuple[int, int], *, cell: int = 14) -> Image.Image:
    """How alike each patch is to one of them, `(N, D), (rows, columns), (row, column) -> image`.

    Dark is the least alike of this image, bright the most; the patch itself has a white frame.
    """
    cosines = similarities(tokens, grid, patch)
    low, high = cosines.min(), cosines.max()
    spread = high - low
    image = _squares(heat((cosines - low) / spread if spread > 1e-12 else np.ones(grid)), cell)
    return framed(image, grid, patch)


def heat(values: Array) -> Array:
    """Numbers from 0 to 1 as colours from 0 to 1, dark to bright: `(...) -> (..., 3)`."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, stops, channel) for channel in zip(*HEAT, strict=True)], axis=-1) / 255


def framed(image: Image.Image, grid: tuple[int, int], patch: tuple[int, int]) -> Image.Image:
    """A copy of an image with a white frame around one patch of its grid."""
    from PIL import ImageDraw

    image = image.copy()
    high, wide = image.height / grid[0], image.width / grid[1]
    top, left = patch[0] * high, patch[1] * wide
    box = (round(left), round(top), round(left + wide) - 1, round(top + high) - 1)
    draw = ImageDraw.Draw(image)
    line = max(1, round(min(high, wide) / 20))
    draw.rectangle(box, outline=PAPER, width=line)
    draw.rectangle((box[0] + line, box[1] + line, box[2] - line, box[3] - line), outline=INK, width=1)
    return image


def seen(
    pixels: Array, *, mean: Sequence[float] | None, std: Sequence[float] | None, scale: float = 255
) -> Image.Image:
    """What the model saw, `(H, W, 3) normalised pixels -> image`, by undoing the processor's last steps."""
    from PIL import Image

    values = np.asarray(pixels, np.float64)
    if mean is not None and std is not None:
        values = values * np.asarray(std) + np.asarray(mean)
    return Image.fromarray(np.rint(values * scale).clip(0, 255).astype(np.uint8))


def overlay(image: Image.Image, map_image: Image.Image, *, opacity: float = 0.6) -> Image.Image:
    """A map laid over its image, at the image's size; `opacity` 1 hides the image."""
    from PIL import Image

    laid = map_image.convert("RGB").resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB"), laid, opacity)


def to_height(image: Image.Image, height: int) -> Image.Image:
    """An image at this height, its shape kept; a tiny one keeps its squares."""
    width = max(1, round(image.width * height / image.height))
    return image.convert("RGB").resize((width, height), _sampling(image, height))


def side_by_side(images: Sequence[Image.Image], *, height: int = 448, gap: int = 8) -> Image.Image:
    """Images in a row, all brought to one height."""
    return beside([to_height(image, height) for image in images], gap=gap)


def beside(images: Sequence[Image.Image], *, gap: int = 24) -> Image.Image:
    """Images in a row as they are, their tops in line."""
    places = np.cumsum([0, *(image.width + gap for image in images)])
    size = (int(places[-1]) - gap, max(image.height for image in images))
    return _pasted(images, [(int(left), 0) for left in places[:-1]], size)


def below(images: Sequence[Image.Image], *, gap: int = 24) -> Image.Image:
    """Images in a column as they are, their left edges in line."""
    places = np.cumsum([0, *(image.height + gap for image in images)])
    size = (max(image.width for image in images), int(places[-1]) - gap)
    return _pasted(images, [(0, int(top)) for top in places[:-1]], size)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    frames: Sequence[Sequence[Colour | None]] | None = None,
    side: int = 96,
    gap: int = 10,
) -> Image.Image:
    """Images in rows on white, each fitted into a square of `side` pixels.

    `captions` and `frames` follow the shape of `rows`: a line of text under each image, a coloured frame around it.
    """
    from PIL import Image, ImageDraw, ImageOps

    text = max(11, side // 8) if captions else 0
    step = (side + gap, side + gap + (text + 6 if captions else 0))
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * step[0] + gap, len(rows) * step[1] + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            left, top = gap + c * step[0], gap + r * step[1]
            fitted = ImageOps.contain(image.convert("RGB"), (side, side), _sampling(image, side))
            place = (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2)
            canvas.paste(fitted, place)
            if frames and (colour := frames[r][c]):
                edges = (place[0] - 3, place[1] - 3, place[0] + fitted.width + 2, place[1] + fitted.height + 2)
                draw.rectangle(edges, outline=colour, width=3)
            if captions:
                draw.text((left + side / 2, top + side + 5), captions[r][c], INK, _font(text), anchor="mt")
    return canvas


def scatter(
    points: Array, images: Sequence[Image.Image], colours: Sequence[Colour], *, size: tuple[int, int] = (900, 900)
) -> Image.Image:
    """Small images where their features lie, `(n, 2) coordinates -> image`; dark ink takes each one's colour.

    The images are grey, dark on white; white is left out, and images that would lie on each other are moved apart
    until each can be read, so that close places are not exact.
    """
    from PIL import Image, ImageOps

    canvas = Image.new("RGB", size, PAPER)
    side = max(max(image.size) for image in images)
    places = _apart(_fitted(points, size, side // 2 + 4), 0.8 * side)
    places = _fitted(places, size, side // 2 + 4)
    for (x, y), image, colour in zip(places, images, colours, strict=True):
        ink = ImageOps.invert(image.convert("L"))
        canvas.paste(colour, (round(x) - ink.width // 2, round(size[1] - y) - ink.height // 2), ink)
    return canvas


def titled(image: Image.Image, title: str, *, subtitle: str = "", size: int = 22) -> Image.Image:
    """A copy of an image with a line of text above it, and a fainter one below that."""
    from PIL import Image, ImageDraw

    band = round(size * 1.7) + (round(size * 1.05) if subtitle else 0)
    canvas = Image.new("RGB", (image.width, image.height + band), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((10, size * 0.4), title, INK, _font(size))
    if subtitle:
        draw.text((10, size * 1.65), subtitle, FAINT, _font(round(size * 0.72)))
    canvas.paste(image, (0, band))
    return canvas


def _fitted(points: Array, size: tuple[int, int], rim: int) -> Array:
    """Points stretched to fill a canvas of `size` up to its rim, `(n, 2) -> (n, 2)`."""
    points = np.asarray(points, np.float64)
    spread = np.ptp(points, axis=0)
    places: Array = rim + (points - points.min(axis=0)) / np.where(spread > 0, spread, 1) * (np.array(size) - 2 * rim)
    return places


def _apart(places: Array, distance: float, *, steps: int = 60) -> Array:
    """Points pushed away from each other where they are nearer than `distance`: `(n, 2) -> (n, 2)`."""
    places = places.copy()
    for _ in range(steps):
        away = places[:, None] - places  # (n, n, 2)
        gaps = np.maximum(np.linalg.norm(away, axis=2), 1e-6)
        push = np.maximum(distance - gaps, 0) / gaps * 0.25
        places += (away * push[:, :, None]).sum(axis=1)
    return places


def _check_grid(tokens: Array, grid: tuple[int, int]) -> None:
    if tokens.ndim != 2 or len(tokens) != math.prod(grid):
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} has {math.prod(grid)} tokens (N, D), got an array {tuple(tokens.shape)}"
        )


def _squares(levels: Array, cell: int) -> Image.Image:
    """`(rows, columns, 3)` from 0 to 1 -> an image whose squares are `cell` pixels wide."""
    from PIL import Image

    image = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
    return image.resize((image.width * cell, image.height * cell), Image.Resampling.NEAREST)


def _pasted(images: Sequence[Image.Image], places: Sequence[tuple[int, int]], size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    canvas = Image.new("RGB", size, PAPER)
    for image, place in zip(images, places, strict=True):
        canvas.paste(image, place)
    return canvas


def _sampling(image: Image.Image, side: int) -> Any:
    """Images are smoothed, but one that is enlarged a lot shows its pixels."""
    from PIL import Image

    return Image.Resampling.NEAREST if 4 * max(image.size) <= side else Image.Resampling.LANCZOS


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
