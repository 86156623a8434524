"""Heads for classification on tokens: linear on their mean, attentive with one learned query, or neighbours' votes.

The linear probe is solved for as CLIP's (Radford et al. 2021, section 3.1): logistic regression by L-BFGS on mean
tokens, in NumPy, the strength of its penalty chosen on `val`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.embed.cache import Array
from mlx_aimv2.layers import attention, merge_heads, split_heads
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.model import unit_length
from mlx_aimv2.train.settings import MAX_COUNT
from mlx_aimv2.untrusted_json import Fields, misfit

Labelled: TypeAlias = "tuple[Array, Sequence[Sample]]"
"""Features of samples, `(n, D)`, and the samples."""

Judge: TypeAlias = "Callable[[Mapping[str, Any], Sequence[Sample], Array], tuple[float, float]]"
"""Settings, samples and logits on them, `(n, classes)`, to what is to be large: a score, and the negative loss."""

VOTE = {"k": 20, "temperature": 0.07, "is_balanced": False}
"""DINO's vote: each of the 20 nearest has weight exp(cosine / 0.07) for its class. It stands first among equals."""

NEIGHBOURS, TEMPERATURES = (20, 1, 5, 10, 50, 100), (0.07, 0.03, 0.2)
"""Votes that are tried."""

PENALTY = 1e-2
"""Of a linear probe that no image is held out for."""

PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
"""Weights of the square sum that are tried, strongest first, each from the result of the one before."""

MIN_STD = 1e-6

STEP = 256
"""Images whose cosines with all training images are in memory at a time."""

MEMORY, MAX_ITERATIONS, TOLERANCE = 10, 500, 1e-5
"""Of L-BFGS: steps that it remembers, as in SciPy, and takes; the largest entry of the gradient at the minimum."""


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
        self.query = 0.02 * mx.random.normal((1, 1, width))  # as in big_vision's probes
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
    """The vote of the nearest training images: `(B, N, D) -> {"logits": (B, classes)}`, logarithms of the votes.

    Of a balanced vote each class has the weight that its training images give it.
    """

    def __init__(self, width: int, classes: int, images: int, k: int, temperature: float, is_balanced: bool) -> None:
        super().__init__()
        self.classes, self.k, self.temperature, self.is_balanced = classes, k, temperature, is_balanced
        self.bank = mx.zeros((images, width))
        self.labels = mx.zeros((images,), mx.int32)
        self.freeze()

    def __call__(self, tokens: mx.array, grid: tuple[int, int] | None = None) -> dict[str, mx.array]:
        return {"logits": self.votes(unit_length(tokens.astype(mx.float32).mean(axis=1)) @ self.bank.T)}

    def votes(self, cosines: mx.array) -> mx.array:
        """The logarithms of the votes by cosines with all training images, `(B, n) -> (B, classes)`."""
        count = min(self.k, cosines.shape[1])
        nearest = mx.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weights = mx.exp((mx.take_along_axis(cosines, nearest, axis=1) - 1) / self.temperature)  # - 1 against overflow
        is_class = self.labels[nearest][..., None] == mx.arange(self.classes)  # (B, k, classes)
        votes = (weights[..., None] * is_class).sum(axis=1)
        if self.is_balanced:
            votes = votes * mx.array(balanced(np.array(self.labels), self.classes))
        return mx.log(mx.maximum(votes, 1e-30))


def balanced(labels: Array, classes: int) -> Array:
    """A weight for each class, so that all have the same together: images / (classes there are x images of it).

    `(n,) -> (classes,)` float32, as scikit-learn's class_weight="balanced"; 0 for a class without images.
    """
    counts = np.bincount(labels, minlength=classes)
    weights: Array = np.where(counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0)
    return weights.astype(np.float32)


def make_head(kind: str, config: Aimv2VisionConfig, classes: int, options: Mapping[str, Any]) -> nn.Module:
    """The attentive probe, the neighbours' vote, or for the other types one linear layer on the mean token."""
    if kind == "attentive":
        return AttentiveHead(config.hidden_size, config.num_attention_heads, classes)
    if kind == "knn":
        vote = VOTE | dict(options)
        fields: Fields = {"images": int, "k": int, "temperature": float, "is_balanced": bool}
        if misfit(vote, fields) or not (0 < vote["images"] <= MAX_COUNT and vote["k"] > 0 and vote["temperature"] > 0):
            raise ValueError(f"head.json says {dict(options)!r:.99} of the images that vote: it is damaged")
        return KnnHead(config.hidden_size, classes, **{name: vote[name] for name in fields})
    return MeanHead(config.hidden_size, classes)


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Cross-entropy of each image, `(B, classes), (B,) -> (B,)`."""
    return nn.losses.cross_entropy(outputs["logits"].astype(mx.float32), targets["label"])


def solve(kind: str, train: Labelled, classes: int, settings: Mapping[str, Any]) -> nn.Module:
    """The heads that no loop trains: the linear probe, or for `knn` the neighbours' vote, with these settings."""
    features, labels = train[0], _labels(train[1])
    if kind == "knn":
        knn = KnnHead(features.shape[1], classes, len(features), **settings)
        knn.bank, knn.labels = unit_length(mx.array(features)), mx.array(labels.astype(np.int32))
        return knn
    mean, std = _statistics(features)
    weights = balanced(labels, classes)[labels] if settings["is_balanced"] else None
    found, _ = fit_logistic((features - mean) / std, labels, classes, l2=settings["penalty"], weights=weights)
    head = MeanHead(features.shape[1], classes)
    head.mean, head.std = mx.array(mean), mx.array(std)
    head.linear.weight = mx.array(found[:-1].T.astype(np.float32))
    head.linear.bias = mx.array(found[-1].astype(np.float32))
    return head


def choose(
    kind: str, folds: Sequence[tuple[Labelled, Labelled]], classes: int, judge: Judge, *, is_balanced: bool
) -> dict[str, Any]:
    """The settings for `solve` that are best on images held out: of each fold the second part, of all together.

    Among settings of equal score those of the smallest loss, then the first ones.
    """
    common = {"is_balanced": is_balanced}
    if not folds:
        return common | ({k: v for k, v in VOTE.items() if k not in common} if kind == "knn" else {"penalty": PENALTY})
    tried = _linear_logits if kind == "linear" else _votes
    by_fold = [list(tried(train, held_out[0], classes, is_balanced)) for train, held_out in folds]
    samples = [sample for _, held_out in folds for sample in held_out[1]]
    ranked = []
    for candidates in zip(*by_fold, strict=True):
        settings = candidates[0][0]
        ranked.append((judge(settings, samples, np.concatenate([logits for _, logits in candidates])), settings))
    return max(ranked, key=lambda one: one[0])[1] | common


def _linear_logits(
    train: Labelled, held_out: Array, classes: int, is_balanced: bool
) -> Iterator[tuple[dict[str, Any], Array]]:
    """What the linear probe of each penalty makes of features, `(n, D) -> (n, classes)`."""
    features, labels = train[0], _labels(train[1])
    mean, std = _statistics(features)
    inputs, held_out = (features - mean) / std, (held_out - mean) / std
    images = balanced(labels, classes)[labels] if is_balanced else None
    weights: Array | None = None
    for penalty in PENALTIES:
        weights, _ = fit_logistic(inputs, labels, classes, l2=penalty, weights=images, start=weights)
        yield {"penalty": penalty}, held_out @ weights[:-1] + weights[-1]


def _votes(train: Labelled, held_out: Array, classes: int, is_balanced: bool) -> Iterator[tuple[dict[str, Any], Array]]:
    """The like of each k and temperature; k that are more than the images there are vote alike."""
    head: Any = solve("knn", train, classes, VOTE | {"is_balanced": is_balanced})
    for head.k, head.temperature in product(NEIGHBOURS, TEMPERATURES):
        parts = np.array_split(held_out, -(-len(held_out) // STEP))
        logits = [np.array(head(mx.array(part[:, None]))["logits"]) for part in parts]
        yield {"k": head.k, "temperature": head.temperature}, np.concatenate(logits)


def _statistics(features: Array) -> tuple[Array, Array]:
    """Mean and standard deviation, `(n, D) -> (D,) and (D,)`."""
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean, np.maximum(features.std(axis=0, dtype=np.float64), MIN_STD).astype(np.float32)


def _labels(samples: Sequence[Sample]) -> Array:
    return np.array([sample.target for sample in samples])


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
        logits -= logits.max(axis=1, keepdims=True)
        probabilities = np.exp(logits)
        total = probabilities.sum(axis=1, keepdims=True)
        loss = float(((np.log(total[:, 0]) - logits[rows, labels]) * shares).sum(dtype=np.float64))
        probabilities /= total
        probabilities[rows, labels] -= 1
        probabilities *= shares[:, None]
        gradient = np.concatenate([features.T @ probabilities, probabilities.sum(axis=0, keepdims=True)])
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
