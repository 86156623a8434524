"""Linear maps that are solved for, in NumPy: logistic regression by L-BFGS, as CLIP's linear probe (Radford et al.
2021, section 3.1), one class against the rest for several labels an image, and ridge regression for numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from mlx_aimv2.embed.cache import Array

MEMORY, MAX_ITERATIONS, TOLERANCE = 10, 500, 1e-5
"""Of L-BFGS: steps that it remembers, as in SciPy, and takes; the largest entry of the gradient at the minimum."""


def sigmoid(logits: Array) -> Array:
    """`1 / (1 + exp(-x))`, by a tanh that cannot overflow."""
    probabilities: Array = 0.5 * (1 + np.tanh(0.5 * logits))
    return probabilities


def softmax_losses(logits: Array, wanted: Array) -> Array:
    """Cross-entropy of each row, two `(n, classes) -> (n,)`; what is wanted sums to 1."""
    largest = logits.max(axis=1)
    losses: Array = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest - (logits * wanted).sum(axis=1)
    return losses


def sigmoid_losses(logits: Array, wanted: Array) -> Array:
    """Binary cross-entropy of each row, summed over the classes, two `(n, classes) -> (n,)`."""
    losses: Array = (np.logaddexp(0, logits) - logits * wanted).sum(axis=1)
    return losses


def fit_penalised(
    features: Array,
    labels: Array,
    classes: int,
    *,
    l2: float,
    weights: Array | None = None,
    start: Array | None = None,
) -> tuple[Array, float]:
    """The linear map of least mean loss plus `l2 / 2` times its square sum, by what the labels are.

    Classes (n,) by `fit_logistic`, a 0 or 1 for each (n, classes) too, each class against the rest, and numbers (n, 1)
    by `fit_ridge`: `(n, D), labels -> (D + 1, classes), loss`.
    """
    if labels.dtype.kind == "f":
        return fit_ridge(features, labels, l2=l2)
    return fit_logistic(features, labels, classes, l2=l2, weights=weights, start=start)


def fit_ridge(features: Array, numbers: Array, *, l2: float) -> tuple[Array, float]:
    """The weights of least half the mean squared error plus `l2 / 2` times their square sum, the bias free of it.

    `(n, D), (n, 1) -> (D + 1, 1), loss`. With scikit-learn's words, ridge regression with alpha `n * l2`.
    """
    n, width = features.shape
    means = features.mean(axis=0, dtype=np.float64), numbers.mean(axis=0)
    x, y = features - means[0], numbers - means[1]
    weights = np.linalg.solve(x.T @ x / n + l2 * np.eye(width), x.T @ y / n)
    loss = 0.5 * float(((x @ weights - y) ** 2).mean()) + 0.5 * l2 * float((weights**2).sum())
    return np.concatenate([weights, [means[1] - means[0] @ weights]]), loss


def fit_logistic(
    features: Array,
    labels: Array,
    classes: int,
    *,
    l2: float,
    weights: Array | None = None,
    start: Array | None = None,
) -> tuple[Array, float]:
    """The map of least mean cross-entropy plus `l2 / 2` times its square sum (the bias is free of it).

    `(n, D), (n,) -> (D + 1, classes), loss`; the last row is the bias. `weights` (n,) are those of the images in the
    mean, 1 without; `start` is where the search begins.
    """
    n, width = features.shape
    rows = np.arange(n)
    shares = (np.ones(n) if weights is None else weights).astype(features.dtype) / n

    def value_and_gradient(flat: Array) -> tuple[float, Array]:
        linear = flat.reshape(width + 1, classes)
        logits = features @ linear[:-1].astype(features.dtype) + linear[-1].astype(features.dtype)
        if labels.ndim == 2:  # each class against the rest
            losses, residuals = sigmoid_losses(logits, labels), sigmoid(logits) - labels
        else:
            logits -= logits.max(axis=1, keepdims=True)
            residuals = np.exp(logits)  # probabilities, less 1 where they should be 1
            total = residuals.sum(axis=1, keepdims=True)
            losses = np.log(total[:, 0]) - logits[rows, labels]
            residuals /= total
            residuals[rows, labels] -= 1
        loss = float((losses * shares).sum(dtype=np.float64))
        residuals *= shares[:, None]
        gradient = np.concatenate([features.T @ residuals, residuals.sum(axis=0, keepdims=True)])
        gradient = gradient.astype(np.float64)
        gradient[:-1] += l2 * linear[:-1]
        return loss + 0.5 * l2 * float((linear[:-1] ** 2).sum()), gradient.ravel()

    begin = np.zeros((width + 1, classes)) if start is None else start
    flat, loss = minimize(value_and_gradient, begin.ravel().astype(np.float64))
    return flat.reshape(width + 1, classes), loss


def minimize(
    value_and_gradient: Callable[[Array], tuple[float, Array]],
    x: Array,
    *,
    tolerance: float = TOLERANCE,
) -> tuple[Array, float]:
    """Minimises a smooth function by L-BFGS with a backtracking line search: `-> (place, value)`.

    The two-loop recursion of Nocedal and Wright, Numerical Optimization, algorithm 7.4.
    """
    value, gradient = value_and_gradient(x)
    steps: deque[tuple[Array, Array, float]] = deque(maxlen=MEMORY)
    for _ in range(MAX_ITERATIONS):
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
