"""The linear probe: logistic regression by L-BFGS on mean tokens, the strength of its penalty chosen on `val`.

As CLIP's linear probe (Radford et al. 2021, section 3.1), in NumPy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.learn.classify.head import KnnHead, MeanHead
from mlx_aimv2.learn.task import Labelled

Array: TypeAlias = NDArray[Any]

PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
"""Weights of the square sum that are tried, strongest first, each from the result of the one before."""

SMALLEST_STD = 1e-6

MEMORY = 10
"""Steps that L-BFGS remembers, as in SciPy."""

MAX_ITERATIONS = 500

TOLERANCE = 1e-5
"""Largest entry of the gradient of the mean loss at which the minimum counts as found."""


def solve(kind: str, train: Labelled, val: Labelled, classes: int, say: Callable[[str], None]) -> nn.Module:
    """The heads that no loop trains: the linear probe, or for `knn` the neighbours' vote."""
    (features, labels), held_out = (_with_labels(part) for part in (train, val))
    if kind == "knn":
        return KnnHead.of(features, labels, classes)
    head, penalty = fit_linear((features, labels), held_out, classes, say=say)
    say(f"penalty {penalty:g} is the best on val")
    return head


def _with_labels(part: Labelled) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    features, samples = part
    return features, np.array([sample.target for sample in samples])


def fit_linear(
    train: tuple[Array, Array],
    val: tuple[Array, Array],
    classes: int,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[MeanHead, float]:
    """The linear probe of best accuracy on `val`: `(features (n, D), labels (n,)) twice -> (head, penalty)`.

    Among penalties of equal accuracy the one of least cross-entropy. Features are standardised first.
    """
    features, labels = train
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    std = np.maximum(features.std(axis=0, dtype=np.float64), SMALLEST_STD).astype(np.float32)
    inputs, held_out = (features - mean) / std, (val[0] - mean) / std
    weights: Array | None = None
    best: tuple[tuple[float, float], float, Array] = ((-1.0, 0.0), 0.0, np.empty(0))
    for penalty in PENALTIES:
        weights, loss = fit_logistic(inputs, labels, classes, l2=penalty, start=weights)
        accuracy, val_loss = _judged(held_out @ weights[:-1] + weights[-1], val[1])
        say(f"penalty {penalty:g}: train loss {loss:.4f}, val loss {val_loss:.4f}, val top-1 {100 * accuracy:.2f} %")
        if (accuracy, -val_loss) > best[0]:
            best = ((accuracy, -val_loss), penalty, weights)

    head = MeanHead(features.shape[1], classes)
    head.mean, head.std = mx.array(mean), mx.array(std)
    head.linear.weight = mx.array(best[2][:-1].T.astype(np.float32))
    head.linear.bias = mx.array(best[2][-1].astype(np.float32))
    return head, best[1]


def _judged(logits: Array, labels: Array) -> tuple[float, float]:
    """Accuracy and mean cross-entropy, `(n, classes), (n,) -> two numbers`."""
    logits = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return float((logits.argmax(axis=1) == labels).mean()), float(losses.mean())


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
