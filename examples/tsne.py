"""Places many features in the plane so that neighbours stay neighbours; `demo.py` draws its emoji with it.

t-SNE (van der Maaten and Hinton 2008), exact, for up to a few thousand features. It starts from the first two
principal components instead of noise, so the same features always give the same image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mlx_aimv2 import plot

Array = NDArray[np.float64]

STEPS, EXAGGERATED_STEPS, EXAGGERATION = 500, 120, 12.0


def neighbour_plane(features: Array, *, neighbours: float = 30.0) -> Array:
    """Coordinates in the plane, `(n, D) -> (n, 2)` float64; `neighbours` is roughly how many each one is kept near to.

    Only who is near to whom means something: distances between far groups and the axes do not.
    """
    count = len(features)
    if count < 3:
        raise ValueError(f"a plane of neighbours needs at least 3 features, got {count}")
    near = _nearness(np.asarray(features, np.float64), min(neighbours, (count - 1) / 3))
    place = _principal(np.asarray(features, np.float64))
    rate, speed, gains = max(count / EXAGGERATION, 10.0), np.zeros_like(place), np.ones_like(place)
    for step in range(STEPS):
        pull = _pull(place, near * (EXAGGERATION if step < EXAGGERATED_STEPS else 1.0))
        gains = np.maximum(np.where(np.sign(pull) == np.sign(speed), gains * 0.8, gains + 0.2), 0.01)
        speed = (0.5 if step < EXAGGERATED_STEPS else 0.8) * speed - rate * gains * pull
        place = place + speed
        place -= place.mean(axis=0)
    return place


def _nearness(features: Array, neighbours: float) -> Array:
    """How near each pair is, `(n, D) -> (n, n)`, symmetric, summing to 1."""
    weights = _conditional(features, neighbours)
    return np.maximum((weights + weights.T) / (2 * len(weights)), 1e-12)


def _conditional(features: Array, neighbours: float) -> Array:
    """Conditional probabilities of neighbours, `(n, D) -> (n, n)` with rows that sum to 1.

    Its Gaussian is as wide as makes its perplexity `neighbours`: found by halving, for all features at once.
    """
    squares = _squared_distances(features)
    squares /= max(squares.max(), 1e-30)
    np.fill_diagonal(squares, np.inf)
    nearest = squares.min(axis=1, keepdims=True)  # taken off before the exponential: at least one term is then 1
    low: Array = np.full((len(squares), 1), -20.0)  # of the logarithm of 1 / width
    high: Array = np.full((len(squares), 1), 40.0)
    for _ in range(50):
        middle = (low + high) / 2
        weights = np.exp(-(squares - nearest) * np.exp(middle))
        weights /= weights.sum(axis=1, keepdims=True)
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1, keepdims=True)
        too_wide = entropy > np.log(neighbours)
        low, high = np.where(too_wide, middle, low), np.where(too_wide, high, middle)
    return weights


def _pull(place: Array, near: Array) -> Array:
    """The gradient of the divergence between nearness in features and in the plane, `(n, 2), (n, n) -> (n, 2)`."""
    kernel = 1 / (1 + _squared_distances(place))
    np.fill_diagonal(kernel, 0)
    force = (near - kernel / kernel.sum()) * kernel
    gradient: Array = 4 * (force.sum(axis=1, keepdims=True) * place - force @ place)
    return gradient


def _principal(features: Array) -> Array:
    """The first two principal components, small enough to start from: `(n, D) -> (n, 2)`."""
    centred = features - features.mean(axis=0)
    left, spread, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])  # the sign is open: fix it
    start = np.zeros((len(features), 2))
    start[:, : min(2, len(spread))] = (left * spread * signs)[:, :2]
    return 1e-2 * start / max(start[:, 0].std(), 1e-30)


def _squared_distances(points: Array) -> Array:
    """`(n, D) -> (n, n)`"""
    lengths = (points**2).sum(axis=1)
    squares: Array = np.maximum(lengths[:, None] + lengths - 2 * points @ points.T, 0)
    return squares


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
