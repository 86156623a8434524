"""Logistic regression by L-BFGS, as CLIP's linear probe (Radford et al. 2021, section 3.1), in NumPy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

MEMORY = 10
"""Steps that L-BFGS remembers, as in SciPy."""

MAX_ITERATIONS = 500
TOLERANCE = 1e-5
"""Largest entry of the gradient of the mean loss at which the minimum counts as found."""


def fit_logistic(
    features: Array, labels: Array, classes: int, *, l2: float, start: Array | None = None
) -> tuple[Array, float]:
    """The weights of least mean cross-entropy plus `l2 / 2` times their square sum (the bias is free of it).

    `(n, D), (n,) -> (D + 1, classes), loss`; the last row is the bias. `start` is where the search begins.
    """
    n, width = features.shape
    rows = np.arange(n)

    def value_and_gradient(flat: Array) -> tuple[float, Array]:
        weights = flat.reshape(width + 1, classes)
        logits = features @ weights[:-1].astype(features.dtype) + weights[-1].astype(features.dtype)
        logits -= logits.max(axis=1, keepdims=True)
        probabilities = np.exp(logits)
        total = probabilities.sum(axis=1, keepdims=True)
        loss = float((np.log(total[:, 0]) - logits[rows, labels]).mean(dtype=np.float64))
        probabilities /= total
        probabilities[rows, labels] -= 1
        probabilities /= n
        gradient = np.concatenate([features.T @ probabilities, probabilities.sum(axis=0, keepdims=True)])
        gradient = gradient.astype(np.float64)
        gradient[:-1] += l2 * weights[:-1]
        return loss + 0.5 * l2 * float((weights[:-1] ** 2).sum()), gradient.ravel()

    begin = np.zeros((width + 1, classes)) if start is None else start
    flat, loss = minimize(value_and_gradient, begin.ravel().astype(np.float64))
    return flat.reshape(width + 1, classes), loss


def minimize(
    value_and_gradient: Callable[[Array], tuple[float, Array]],
    x: Array,
    *,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> tuple[Array, float]:
    """Minimises a smooth function by L-BFGS with a backtracking line search: `-> (place, value)`.

    The two-loop recursion of Nocedal and Wright, Numerical Optimization, algorithm 7.4.
    """
    value, gradient = value_and_gradient(x)
    steps: deque[tuple[Array, Array, float]] = deque(maxlen=MEMORY)
    for _ in range(max_iterations):
        if np.abs(gradient).max() < tolerance:
            break
        direction = -_inverse_hessian_times(gradient, steps)
        slope = float(direction @ gradient)
        if slope >= 0:  # rounding has spoiled the memory: begin anew downhill
            steps.clear()
            direction, slope = -gradient, -float(gradient @ gradient)
        size = 1.0 if steps else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        while True:
            there, gradient_there = value_and_gradient(x + size * direction)
            if there <= value + 1e-4 * size * slope:
                break
            size /= 2
            if size < 1e-10:
                return x, value
        moved, turned = size * direction, gradient_there - gradient
        curvature = float(moved @ turned)
        if curvature > 1e-12:
            steps.append((moved, turned, curvature))
        x, value, gradient = x + moved, there, gradient_there
    return x, value


def _inverse_hessian_times(gradient: Array, steps: deque[tuple[Array, Array, float]]) -> Array:
    q = gradient.copy()
    weights = []
    for moved, turned, curvature in reversed(steps):
        weights.append(float(moved @ q) / curvature)
        q -= weights[-1] * turned
    if steps:
        _, turned, curvature = steps[-1]
        q *= curvature / float(turned @ turned)
    for (moved, turned, curvature), weight in zip(steps, reversed(weights), strict=True):
        q += (weight - float(turned @ q) / curvature) * moved
    return q
