"""Draws dense features as PIL images: colour maps, heat maps, and both beside the image.

Every square of a map is one token; nothing is smoothed, so that what is drawn is what the model said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

INK, PAPER = (34, 36, 42), (255, 255, 255)

HEAT = ((16, 18, 52), (62, 38, 120), (140, 46, 116), (214, 84, 80), (248, 158, 66), (252, 236, 152))
"""From unlike to alike; lightness rises all the way, so the order survives in grey."""


def principal_components(features: NDArray[Any], count: int) -> NDArray[Any]:
    """The directions along which features differ most, `(n, D), count -> (n, count)` coordinates, most variance first.

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


def pca_map(tokens: NDArray[Any], grid: tuple[int, int], *, cell: int = 14) -> Image.Image:
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


def similarities(tokens: NDArray[Any], grid: tuple[int, int], patch: tuple[int, int]) -> NDArray[Any]:
    """How alike each token is to one of them, `(N, D), (rows, columns), (row, column) -> (rows, columns)` cosines."""
    _check_grid(tokens, grid)
    if not all(0 <= place < size for place, size in zip(patch, grid, strict=True)):
        raise ValueError(
            f"patch {patch[0]},{patch[1]} is outside the grid of {grid[0]} rows and {grid[1]} columns, "
            "counted from 0,0 at the top left"
        )
    unit = np.asarray(tokens, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    cosines: NDArray[Any] = unit @ unit[patch[0] * grid[1] + patch[1]]
    return cosines.reshape(grid)


def similarity_map(
    tokens: NDArray[Any], grid: tuple[int, int], patch: tuple[int, int], *, cell: int = 14
) -> Image.Image:
    """How alike each patch is to one of them, `(N, D), (rows, columns), (row, column) -> image`.

    Dark is the least alike of this image, bright the most; the patch itself has a white frame.
    """
    cosines = similarities(tokens, grid, patch)
    low, high = cosines.min(), cosines.max()
    spread = high - low
    image = _squares(heat((cosines - low) / spread if spread > 1e-12 else np.ones(grid)), cell)
    return framed(image, grid, patch)


def heat(values: NDArray[Any]) -> NDArray[Any]:
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
    pixels: NDArray[Any], *, mean: Sequence[float] | None, std: Sequence[float] | None, scale: float = 255
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
    return image.convert("RGB").resize((width, height), sampling(image, height))


def side_by_side(images: Sequence[Image.Image], *, height: int = 448, gap: int = 8) -> Image.Image:
    """Images in a row, all brought to one height."""
    return beside([to_height(image, height) for image in images], gap=gap)


def beside(images: Sequence[Image.Image], *, gap: int = 24) -> Image.Image:
    """Images in a row as they are, their tops in line."""
    places = np.cumsum([0, *(image.width + gap for image in images)])
    size = (int(places[-1]) - gap, max(image.height for image in images))
    return pasted(images, [(int(left), 0) for left in places[:-1]], size)


def _check_grid(tokens: NDArray[Any], grid: tuple[int, int]) -> None:
    if tokens.ndim != 2 or len(tokens) != math.prod(grid):
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} has {math.prod(grid)} tokens (N, D), got an array {tuple(tokens.shape)}"
        )


def _squares(levels: NDArray[Any], cell: int) -> Image.Image:
    """`(rows, columns, 3)` from 0 to 1 -> an image whose squares are `cell` pixels wide."""
    from PIL import Image

    image = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
    return image.resize((image.width * cell, image.height * cell), Image.Resampling.NEAREST)


def pasted(images: Sequence[Image.Image], places: Sequence[tuple[int, int]], size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    canvas = Image.new("RGB", size, PAPER)
    for image, place in zip(images, places, strict=True):
        canvas.paste(image, place)
    return canvas


def sampling(image: Image.Image, side: int) -> Any:
    """Images are smoothed, but one that is enlarged a lot shows its pixels."""
    from PIL import Image

    return Image.Resampling.NEAREST if 4 * max(image.size) <= side else Image.Resampling.LANCZOS
