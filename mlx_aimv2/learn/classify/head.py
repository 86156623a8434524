"""Heads for classification on tokens: linear on their mean, attentive with one learned query, or neighbours' votes.

The linear probe is solved for as CLIP's (Radford et al. 2021, section 3.1): logistic regression by L-BFGS on mean
tokens, in NumPy, the strength of its penalty chosen on `val`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
from mlx_aimv2.untrusted_json import are_numbers, misfit

Labelled: TypeAlias = "tuple[Array, Sequence[Sample]]"
"""Features of samples, `(n, D)`, and the samples."""

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""DINO's values: each of the 20 nearest votes for its class with weight exp(cosine / 0.07)."""

PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
"""Weights of the square sum that are tried, strongest first, each from the result of the one before."""

MIN_STD = 1e-6

MIN_SHARE = 1e-3
"""Of the neighbours' votes for a label, and for its absence: no logit is infinite."""

LABELS = {"class": (mx.int32, 1), "classes": (mx.int32, 2), "number": (mx.float32, 2)}
"""What a sample is labelled with -> the dtype of many of them and their axes: (n,) or (n, classes)."""

MEMORY, MAX_ITERATIONS, TOLERANCE = 10, 500, 1e-5
"""Of L-BFGS: steps that it remembers, as in SciPy, and takes; the largest entry of the gradient at the minimum."""


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

    Where `labels` hold a 0 or 1 for each class, the logit of the share of the votes; of a number, their weighted mean.
    """

    def __init__(self, width: int, classes: int, images: int, labels: str = "class") -> None:
        super().__init__()
        self.classes = classes
        self.bank = mx.zeros((images, width))
        kind, shape = LABELS[labels]
        self.labels = mx.zeros((images, classes)[:shape], kind)
        self.freeze()

    def __call__(self, tokens: mx.array, grid: tuple[int, int] | None = None) -> dict[str, mx.array]:
        cosines = unit_length(tokens.astype(mx.float32).mean(axis=1)) @ self.bank.T  # (B, n)
        count = min(NEIGHBOURS, self.bank.shape[0])
        nearest = mx.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weights = mx.exp((mx.take_along_axis(cosines, nearest, axis=1) - 1) / TEMPERATURE)  # - 1 against overflow
        labels = self.labels[nearest]
        if labels.ndim == 2:
            labels = labels[..., None] == mx.arange(self.classes)  # (B, k, classes)
        votes = (weights[..., None] * labels).sum(axis=1)
        if self.labels.ndim == 1:
            return self.outputs(mx.log(mx.maximum(votes, 1e-30)))
        shares = votes / weights.sum(axis=1, keepdims=True)
        if self.labels.dtype == mx.float32:
            return self.outputs(shares)
        shares = mx.clip(shares, MIN_SHARE, 1 - MIN_SHARE)
        return self.outputs(mx.log(shares / (1 - shares)))


def make_head(
    kind: str, config: Aimv2VisionConfig, classes: int, options: Mapping[str, Any], labels: str = "class"
) -> Readout:
    """The attentive probe, the neighbours' vote, or for the other types one linear layer on the mean token."""
    head: Readout = MeanHead(config.hidden_size, classes)
    if kind == "attentive":
        head = AttentiveHead(config.hidden_size, config.num_attention_heads, classes)
    if kind == "knn":
        if misfit(options, {"images": int}) or not 0 < options["images"] <= MAX_COUNT:
            raise ValueError(f"head.json says {options.get('images')!r:.60} of the images that vote: it is damaged")
        head = KnnHead(config.hidden_size, classes, options["images"], labels)
    head.take(options, classes)
    return head


def first_options(samples: Sequence[Sample]) -> dict[str, float]:
    """What a head is made with for these training samples: nothing but its size."""
    return {}


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Cross-entropy of each image, `(B, classes), (B,) -> (B,)`."""
    return nn.losses.cross_entropy(outputs["logits"].astype(mx.float32), targets["label"])


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


def solve(kind: str, train: Labelled, val: Labelled, classes: int, say: Callable[[str], None]) -> nn.Module:
    """The heads that no loop trains: the linear probe, or for `knn` the neighbours' vote."""
    (features, labels), held_out = (
        (features, np.array([sample.target for sample in samples])) for features, samples in (train, val)
    )
    if kind == "knn":
        name = next(
            name
            for name, (_, axes) in LABELS.items()
            if (labels.dtype.kind == "f") == (name == "number") and axes == labels.ndim
        )
        knn = KnnHead(features.shape[1], classes, len(features), name)
        knn.bank, knn.labels = unit_length(mx.array(features)), mx.array(labels).astype(LABELS[name][0])
        return knn
    offset, scale = 0.0, 1.0
    if labels.dtype.kind == "f":
        offset, scale = labels.mean(), labels.std()
    head, penalty = fit_linear(
        (features, (labels - offset) / scale if labels.dtype.kind == "f" else labels),
        (held_out[0], (held_out[1] - offset) / scale if labels.dtype.kind == "f" else held_out[1]),
        classes,
        say=say,
    )
    if labels.dtype.kind == "f":
        head.scale, head.offset = float(scale), float(offset)
    say(f"penalty {penalty:g} is the best on val")
    return head


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
    std = np.maximum(features.std(axis=0, dtype=np.float64), MIN_STD).astype(np.float32)
    inputs, held_out = (features - mean) / std, (val[0] - mean) / std
    weights: Array | None = None
    found: list[tuple[float, float, float, Array]] = []
    for penalty in PENALTIES:
        weights, loss = fit_penalised(inputs, labels, classes, l2=penalty, start=weights)
        accuracy, val_loss = _judged(held_out @ weights[:-1] + weights[-1], val[1])
        say(f"penalty {penalty:g}: train loss {loss:.4f}, val loss {val_loss:.4f}, val top-1 {100 * accuracy:.2f} %")
        found.append((accuracy, -val_loss, penalty, weights))
    _, _, penalty, weights = max(found, key=lambda one: one[:2])
    head = MeanHead(features.shape[1], classes)
    head.mean, head.std = mx.array(mean), mx.array(std)
    head.linear.weight = mx.array(weights[:-1].T.astype(np.float32))
    head.linear.bias = mx.array(weights[-1].astype(np.float32))
    return head, penalty


def _judged(logits: Array, labels: Array) -> tuple[float, float]:
    """Accuracy and mean cross-entropy, `(n, classes), (n,) -> two numbers`."""
    if labels.dtype.kind == "f":
        return -float(((logits - labels) ** 2).mean()), 0.0
    if labels.ndim == 2:
        return -float(sigmoid_losses(logits, labels).mean()), 0.0
    logits = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return float((logits.argmax(axis=1) == labels).mean()), float(losses.mean())


def fit_penalised(
    features: Array, labels: Array, classes: int, *, l2: float, start: Array | None = None
) -> tuple[Array, float]:
    """The linear map of least mean loss plus `l2 / 2` times its square sum, by what the labels are.

    Classes (n,) by `fit_logistic`, a 0 or 1 for each (n, classes) too, each class against the rest, and numbers (n, 1),
    of mean 0, by `fit_ridge`: `(n, D), labels -> (D + 1, classes), loss`.
    """
    if labels.dtype.kind == "f":
        return fit_ridge(features, labels, l2=l2)
    return fit_logistic(features, labels, classes, l2=l2, start=start)


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
        if labels.ndim == 2:  # each class against the rest
            loss = float(sigmoid_losses(logits, labels).mean(dtype=np.float64))
            residuals = sigmoid(logits) - labels
        else:
            logits -= logits.max(axis=1, keepdims=True)
            residuals = np.exp(logits)  # probabilities, less 1 where they should be 1
            total = residuals.sum(axis=1, keepdims=True)
            loss = float((np.log(total[:, 0]) - logits[rows, labels]).mean(dtype=np.float64))
            residuals /= total
            residuals[rows, labels] -= 1
        residuals /= n
        gradient = np.concatenate([features.T @ residuals, residuals.sum(axis=0, keepdims=True)])
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
