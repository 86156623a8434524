"""Fits the linear probe: logistic regression on mean tokens, the strength of its penalty chosen on the `val` part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.learn.heads import MeanHead
from mlx_aimv2.learn.logistic import fit_logistic

Array: TypeAlias = NDArray[Any]

PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
"""Weights of the square sum that are tried, strongest first, each from the result of the one before."""

SMALLEST_STD = 1e-6


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
