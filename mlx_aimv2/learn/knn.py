"""Classification by the nearest training images, as DINO evaluates features (Caron et al. 2021)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.model import unit_length

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""DINO's values: each of the 20 nearest votes for its class with weight exp(cosine / 0.07)."""


class KnnHead(nn.Module):
    """The vote of the nearest training images: `(B, N, D) -> {"logits": (B, classes)}`, logarithms of the votes."""

    def __init__(self, width: int, classes: int, images: int) -> None:
        super().__init__()
        self.classes = classes
        self.bank = mx.zeros((images, width))
        self.labels = mx.zeros((images,), mx.int32)
        self.freeze()

    @classmethod
    def of(cls, features: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], classes: int) -> KnnHead:
        """The head that holds these training features (n, D) and their classes (n,)."""
        head = cls(features.shape[1], classes, len(features))
        head.bank, head.labels = unit_length(mx.array(features)), mx.array(labels.astype(np.int32))
        return head

    def __call__(self, tokens: mx.array, grid: tuple[int, int] | None = None) -> dict[str, mx.array]:
        votes = vote(unit_length(tokens.astype(mx.float32).mean(axis=1)), self.bank, self.labels, self.classes)
        return {"logits": mx.log(mx.maximum(votes, 1e-30))}


def vote(
    queries: mx.array,
    bank: mx.array,
    labels: mx.array,
    classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> mx.array:
    """Weight of the votes for each class: unit `(B, D), (n, D), (n,) -> (B, classes)`, at most `exp(0)` a neighbour."""
    cosines = queries @ bank.T  # (B, n)
    count = min(neighbours, bank.shape[0])
    nearest = mx.argpartition(-cosines, count - 1, axis=1)[:, :count]
    weights = mx.exp((mx.take_along_axis(cosines, nearest, axis=1) - 1) / temperature)  # - 1 against overflow
    is_class = labels[nearest][..., None] == mx.arange(classes)  # (B, k, classes)
    return (weights[..., None] * is_class).sum(axis=1)
