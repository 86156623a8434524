"""Heads for classification on tokens: linear on their mean, attentive with one learned query, or neighbours' votes.

The linear probe is solved for (`linear`), the strength of its penalty chosen on images held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.embed.cache import Array
from mlx_aimv2.layers import attention, merge_heads, split_heads
from mlx_aimv2.learn.classify.linear import fit_penalised, softmax_losses
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.model import unit_length
from mlx_aimv2.train.settings import MAX_COUNT
from mlx_aimv2.untrusted_json import Fields, are_numbers, misfit

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

MIN_SHARE = 1e-3
"""Of the neighbours' votes for a label, and for its absence: no logit is infinite."""

LABELS = {"class": (mx.int32, 1), "classes": (mx.int32, 2), "number": (mx.float32, 2)}
"""What a sample is labelled with -> the dtype of many of them and their axes: (n,) or (n, classes)."""


class Readout(nn.Module):
    """What heads end with: logits times `scale` plus `offset`, the inverse temperature or the units of a number.

    With an offset `scale` is among the outputs, (B,), and with thresholds these, (B, classes). None of them is trained.
    """

    scale = 1.0
    offset: float | None = None
    thresholds: Array | None = None

    def options(self) -> dict[str, Any]:
        """What head.json keeps of these."""
        own = {"scale": self.scale, "offset": self.offset}
        own |= {"thresholds": None if self.thresholds is None else self.thresholds.tolist()}
        return {name: value for name, value in own.items() if value != getattr(Readout, name)}

    def take(self, options: Mapping[str, Any], classes: int) -> None:
        """Has these of head.json from now on. ValueError where they are none."""
        own: dict[str, Any] = {"scale": 1.0, "offset": 0.0, "thresholds": [0.5] * classes, **options}
        is_right = misfit(own, {"scale": (int, float), "offset": (int, float)}) is None and are_numbers(
            own["thresholds"]
        )
        if not is_right or own["scale"] <= 0 or len(own["thresholds"]) != classes:
            raise ValueError(f"head.json says {dict(options)!r:.60} of the head: it is damaged")
        for name in options.keys() & {"scale", "offset"}:
            setattr(self, name, float(options[name]))
        if "thresholds" in options:
            self.thresholds = np.array(options["thresholds"])

    def outputs(self, logits: mx.array) -> dict[str, mx.array]:
        """`(B, classes) -> {"logits": (B, classes)}` and what goes with them."""
        found = {"logits": logits * self.scale + (self.offset or 0.0)}
        if self.offset is not None:
            found["scale"] = mx.full(logits.shape[:1], self.scale)
        if self.thresholds is not None:
            found["thresholds"] = mx.broadcast_to(mx.array(self.thresholds.astype(np.float32)), logits.shape)
        return found


class MeanHead(Readout):
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
        return self.outputs(self.linear((pooled - self.mean) / self.std))


class AttentiveHead(Readout):
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
        return self.outputs(self.linear(merge_heads(attention(q, k, v))[:, 0]))


class KnnHead(Readout):
    """The vote of the nearest training images: `(B, N, D) -> {"logits": (B, classes)}`, logarithms of the votes.

    Of a balanced vote each class has the weight that its training images give it. Where `labels` hold a 0 or 1 for each
    class, it is the logit of the share of the votes, and of numbers their weighted mean.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        images: int,
        k: int,
        temperature: float,
        is_balanced: bool,
        labels: str = "class",
    ) -> None:
        super().__init__()
        kind, axes = LABELS[labels]
        self.classes, self.k, self.temperature, self.is_balanced = classes, k, temperature, is_balanced
        self.bank = mx.zeros((images, width))
        self.labels = mx.zeros((images, classes)[:axes], kind)
        self.freeze()

    def __call__(self, tokens: mx.array, grid: tuple[int, int] | None = None) -> dict[str, mx.array]:
        return self.outputs(self.votes(unit_length(tokens.astype(mx.float32).mean(axis=1)) @ self.bank.T))

    def votes(self, cosines: mx.array) -> mx.array:
        """The logarithms of the votes by cosines with all training images, `(B, n) -> (B, classes)`."""
        count = min(self.k, cosines.shape[1])
        nearest = mx.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weights = mx.exp((mx.take_along_axis(cosines, nearest, axis=1) - 1) / self.temperature)  # - 1 against overflow
        labels = self.labels[nearest]
        if labels.ndim == 3:
            shares = (weights[..., None] * labels).sum(axis=1) / weights.sum(axis=1, keepdims=True)
            if labels.dtype == mx.float32:
                return shares
            shares = mx.clip(shares, MIN_SHARE, 1 - MIN_SHARE)
            return mx.log(shares / (1 - shares))
        is_class = labels[..., None] == mx.arange(self.classes)  # (B, k, classes)
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


def make_head(
    kind: str, config: Aimv2VisionConfig, classes: int, options: Mapping[str, Any], labels: str = "class"
) -> Readout:
    """The attentive probe, the neighbours' vote, or for the other types one linear layer on the mean token."""
    head: Readout
    if kind == "attentive":
        head = AttentiveHead(config.hidden_size, config.num_attention_heads, classes)
    elif kind == "knn":
        vote = VOTE | dict(options)
        fields: Fields = {"images": int, "k": int, "temperature": float, "is_balanced": bool}
        if misfit(vote, fields) or not (0 < vote["images"] <= MAX_COUNT and vote["k"] > 0 and vote["temperature"] > 0):
            raise ValueError(f"head.json says {dict(options)!r:.99} of the images that vote: it is damaged")
        head = KnnHead(config.hidden_size, classes, **{name: vote[name] for name in fields}, labels=labels)
    else:
        head = MeanHead(config.hidden_size, classes)
    head.take(options, classes)
    return head


def first_options(samples: Sequence[Sample]) -> dict[str, float]:
    """What a head is made with for these training samples: nothing but its size."""
    return {}


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Cross-entropy of each image, `(B, classes), (B,) -> (B,)`."""
    return nn.losses.cross_entropy(outputs["logits"].astype(mx.float32), targets["label"])


def temperature(losses: Callable[[Array, Array], Array], logits: Array, wanted: Array, *, at_random: float) -> float:
    """The temperature that makes logits least wrong, from 1/20 to 20 (Guo et al. 2017): two `(n, classes) -> T`.

    One more image counts that has every label alike, `at_random`: so a `val` of which all is right makes no certainty.
    """
    wanted = (len(logits) * wanted + at_random) / (len(logits) + 1)
    low, high = -np.log(20), np.log(20)
    while high - low > 1e-6:  # convex in the inverse temperature, so it has one valley
        third = (high - low) / 3
        first, second = (float(losses(logits / np.exp(x), wanted).sum()) for x in (low + third, high - third))
        low, high = (low, high - third) if first < second else (low + third, high)
    return float(np.exp(low))


def calibrate(head: Readout, logits: Array, samples: Sequence[Sample]) -> None:
    """Gives a head the temperature of its probabilities; `logits` (n, classes) are its own on the samples."""
    classes = logits.shape[1]
    wanted = np.eye(classes)[[sample.target for sample in samples]]
    head.scale = 1 / temperature(softmax_losses, logits.astype(np.float64), wanted, at_random=1 / classes)


def solve(kind: str, train: Labelled, classes: int, settings: Mapping[str, Any]) -> nn.Module:
    """The heads that no loop trains: the linear probe, or for `knn` the neighbours' vote, with these settings."""
    features, labels = train[0], _labels(train[1])
    if kind == "knn":
        name = "class" if labels.ndim == 1 else "number" if labels.dtype.kind == "f" else "classes"
        knn = KnnHead(features.shape[1], classes, len(features), **settings, labels=name)
        knn.bank, knn.labels = (
            unit_length(mx.array(features)),
            mx.array(labels.astype(np.float64)).astype(LABELS[name][0]),
        )
        return knn
    mean, std = _statistics(features)
    weights = balanced(labels, classes)[labels] if settings["is_balanced"] else None
    found, _ = fit_penalised((features - mean) / std, labels, classes, l2=settings["penalty"], weights=weights)
    head = MeanHead(features.shape[1], classes)
    if labels.dtype.kind == "f":  # of mean 0 and deviation 1, as in training, until it is told
        head.take({"offset": float(labels.mean()), "scale": float(labels.std())}, classes)
        found = (found - np.append(np.zeros((len(found) - 1, 1)), [[head.offset]], axis=0)) / head.scale
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
        weights, _ = fit_penalised(inputs, labels, classes, l2=penalty, weights=images, start=weights)
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
