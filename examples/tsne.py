"""Draws small images where their features lie in a plane of neighbours; `demo.py` draws its emoji with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mlx_aimv2 import plot

Array = NDArray[np.float64]


def scatter(points: Array, images: Sequence[Image.Image], *, size: tuple[int, int] = (900, 900)) -> Image.Image:
    """Small images where their features lie, `(n, 2) coordinates -> image`.

    White is left out, and images that would lie on each other are moved apart until each can be seen, so that close
    places are not exact.
    """
    canvas = Image.new("RGB", size, plot.PAPER)
    side = max(max(image.size) for image in images)
    places = _apart(_fitted(points, size, side // 2 + 4), 0.8 * side)
    places = _fitted(places, size, side // 2 + 4)
    for (x, y), image in zip(places, images, strict=True):
        ink = ImageOps.invert(image.convert("L")).point(lambda level: min(255, 8 * level))
        canvas.paste(image, (round(x) - ink.width // 2, round(size[1] - y) - ink.height // 2), ink)
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
