"""Heads for classification on tokens: linear on their mean, attentive with one learned query, or neighbours' votes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.layers import attention, merge_heads, split_heads
from mlx_aimv2.model import unit_length

SPREAD = 0.02
"""Standard deviation of the learned query and of the classifier at the start, as in big_vision's probes."""

NEIGHBOURS = 20

TEMPERATURE = 0.07
"""DINO's values: each of the 20 nearest votes for its class with weight exp(cosine / 0.07)."""


class MeanHead(nn.Module):
    """One linear layer on the mean token: `(B, N, D) -> {"logits": (B, classes)}`, zero at the start.

    The mean is standardised with `mean` and `std` (D,) of the training features, which are stored with the head.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.mean = mx.zeros((width,))
        self.std = mx.ones((width,))
        self.linear = nn.Linear(width, classes)
        self.linear.weight = mx.zeros((classes, width))
        self.linear.bias = mx.zeros((classes,))
        self.freeze(keys=["mean", "std"], recurse=False)

    def __call__(self, tokens: mx.array, grid: tuple[int, int] | None = None) -> dict[str, mx.array]:
        pooled = tokens.astype(mx.float32).mean(axis=1)
        return {"logits": self.linear((pooled - self.mean) / self.std)}


class AttentiveHead(nn.Module):
    """The attentive probe (AIMv2, section 4.1): `(B, N, D) -> {"logits": (B, classes)}`.

    Tokens are standardised with `mean` and `std` (D,) of the training tokens, where AIM's probe has a batch
    normalisation whose numbers depend on the batch; then attended with one learned query, and mapped to the classes.
    """

    def __init__(self, width: int, num_heads: int, classes: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mean = mx.zeros((width,))
        self.std = mx.ones((width,))
        self.query = SPREAD * mx.random.normal((1, 1, width))
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, classes)
        self.linear.weight = mx.zeros((classes, width))
        self.linear.bias = mx.zeros((classes,))
        self.freeze(keys=["mean", "std"], recurse=False)

    def start(self, mean: mx.array, std: mx.array, probe: MeanHead | None) -> None:
        """Takes the statistics of the training tokens, (D,) each, and begins as the linear probe if there is one.

        A query of zero attends to all tokens alike: with values as they are that is their mean.
        """
        self.mean, self.std = mean, std
        if probe is not None:
            self.query = mx.zeros_like(self.query)
            self.v.weight = mx.eye(mean.shape[0])
            self.linear.weight = probe.linear.weight * (std / probe.std)
            self.linear.bias = probe.linear.bias + probe.linear.weight @ ((mean - probe.mean) / probe.std)

    def __call__(self, tokens: mx.array, grid: tuple[int, int] | None = None) -> dict[str, mx.array]:
        x = (tokens.astype(mx.float32) - self.mean) / self.std
        query = mx.broadcast_to(self.query, (x.shape[0], 1, x.shape[2]))
        q, k, v = (split_heads(part, self.num_heads) for part in (query, self.k(x), self.v(x)))
        return {"logits": self.linear(merge_heads(attention(q, k, v))[:, 0])}


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


def make_head(
    kind: str, *, classes: int, width: int, heads: int, patch_size: int, options: dict[str, Any]
) -> nn.Module:
    """The attentive probe, the neighbours' vote, or for the other types one linear layer on the mean token."""
    if kind == "attentive":
        return AttentiveHead(width, heads, classes)
    if kind == "knn":
        return KnnHead(width, classes, options["images"])
    return MeanHead(width, classes)


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Cross-entropy of each image, `(B, classes), (B,) -> (B,)`."""
    return nn.losses.cross_entropy(outputs["logits"].astype(mx.float32), targets["label"])
