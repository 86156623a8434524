"""Places features in the plane so that neighbours stay neighbours.

t-SNE (van der Maaten and Hinton 2008), exact, for up to a few thousand features. It starts from the first two
principal components instead of noise, so the same features always give the same plane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.plot import principal_components

Array = NDArray[np.float64]

STEPS, EXAGGERATED_STEPS, EXAGGERATION = 500, 120, 12.0


def neighbour_plane(
    features: NDArray[Any],
    *,
    neighbours: float = 30.0,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> Array:
    """Coordinates in the plane, `(n, D) -> (n, 2)` float64; `neighbours` is roughly how many each one is kept near to.

    Only who is near to whom means something: distances between far groups and the axes do not. `on_step` receives the
    number of the step and of all steps.
    """
    count = len(features)
    if count < 3:
        raise ValueError(f"a plane of neighbours needs at least 3 features, got {count}")
    near = _nearness(np.asarray(features, np.float64), min(neighbours, (count - 1) / 3))
    start = principal_components(features, 2)
    place = 1e-2 * start / max(start[:, 0].std(), 1e-30)
    rate, speed, gains = max(count / EXAGGERATION, 10.0), np.zeros_like(place), np.ones_like(place)
    for step in range(STEPS):
        on_step(step, STEPS)
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


def _squared_distances(points: Array) -> Array:
    """`(n, D) -> (n, n)`"""
    lengths = (points**2).sum(axis=1)
    squares: Array = np.maximum(lengths[:, None] + lengths - 2 * points @ points.T, 0)
    return squares
