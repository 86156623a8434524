"""Heads on a frozen encoder: its features are computed once, then heads are solved for or trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.embed.cache import Array, Features
from mlx_aimv2.learn.classify.head import AttentiveHead
from mlx_aimv2.learn.classify.probe import SMALLEST_STD
from mlx_aimv2.learn.evaluation import decoded, outputs_of_head
from mlx_aimv2.learn.learner import grid_of
from mlx_aimv2.learn.run import Run, Trained
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.train.optimizer import Group

STEP = 64
"""Images whose tokens are in memory at a time."""


class Candidates(nn.Module):
    """Heads that are trained side by side, each with a learning rate and a weight decay of its own."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = heads


def train_on_features(run: Run) -> Trained:
    """The head of this run on stored features."""
    samples = [sample for part in run.dataset.splits.values() for sample in part]
    features, grid = run.features(run.type.features or "tokens", samples), grid_of(run.processor)
    if run.task.solve is None or run.type.learning_rates:
        return _train_candidates(run, features, grid)
    solved = run.solve(run.task.solve, run.kind, features.of, say=run.say)
    own = {"images": len(run.dataset.splits["train"])} if run.kind == "knn" else {}
    return Trained(solved, lambda part: outputs_of_head(solved, part, features, grid), own)


def _probe_among(heads: list[nn.Module], run: Run, features: Features) -> nn.Module | None:
    """Gives attentive probes the statistics of the tokens; returns one more that begins as the linear probe.

    With that one among them, what `val` likes best is there no worse than the linear probe. A recipe of others is
    followed as it is, without.
    """
    attentive = [head for head in heads if isinstance(head, AttentiveHead)]
    if not attentive or run.task.solve is None:
        return None
    mean, std = (mx.array(array) for array in token_statistics(features, run.dataset.splits["train"]))
    for head in attentive:
        head.start(mean, std, None)
    if run.options.recipe is not None:
        return None
    more = run.head()
    more.start(mean, std, run.solve(run.task.solve, "linear", lambda part: mean_tokens(features, part)))
    return more


def token_statistics(features: Features, samples: Sequence[Sample]) -> tuple[Array, Array]:
    """Mean and standard deviation of all tokens of the samples, (D,) each in float32, a few images at a time."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for tokens in _some_at_a_time(features, samples):
        rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
        count, total, squares = count + len(rows), total + rows.sum(axis=0), squares + (rows**2).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, SMALLEST_STD**2))
    return mean.astype(np.float32), std.astype(np.float32)


def mean_tokens(features: Features, samples: Sequence[Sample]) -> Array:
    """The mean token of each sample, (n, D)."""
    return np.concatenate([tokens.mean(axis=1) for tokens in _some_at_a_time(features, samples)])


def _some_at_a_time(features: Features, samples: Sequence[Sample]) -> Iterator[Array]:
    for start in range(0, len(samples), STEP):
        yield features.of(samples[start : start + STEP])


def _train_candidates(run: Run, features: Features, grid: tuple[int, int]) -> Trained:
    options, defaults = run.options, run.type
    rates = (options.learning_rate,) if options.learning_rate is not None else defaults.learning_rates
    decays = (options.weight_decay,) if options.weight_decay is not None else defaults.weight_decays
    settings = list(product(rates, decays))
    heads = [run.head() for _ in settings]
    for head in heads[1:]:
        head.update(heads[0].parameters())  # all from the same start
    if (probe := _probe_among(heads, run, features)) is not None:
        heads.append(probe)
        settings.append((min(rates), decays[0]))
    model = Candidates(heads)
    base_rate, base_decay = rates[0], decays[0]
    groups = [
        (rf"heads\.{i}\..*", Group(rate / base_rate, decay / base_decay if base_decay else 1.0, clip_with=f"{i}"))
        for i, (rate, decay) in enumerate(settings)
    ]

    def make(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        row = np.asarray(features[sample.sha256], np.float32)
        return {"tokens": row if row.ndim == 2 else row[None], **run.task.data.targets(sample, run.processor)}

    def loss(candidates: Any, batch: dict[str, mx.array], key: mx.array) -> mx.array:
        losses = [run.task.head.loss(head(batch["tokens"], grid), batch) for head in candidates.heads]
        total: mx.array = sum(losses[1:], losses[0])
        return total

    def scores(candidates: Any) -> list[float]:
        found = []
        for head in candidates.heads:
            predictions = decoded(run.task, run.val, outputs_of_head(head, run.val, features, grid))
            found.append(run.score(predictions))
        return found

    progress = run.train(
        model,
        loss,
        make,
        evaluate=lambda candidates: max(scores(candidates)),
        groups=groups,
        learning_rate=base_rate,
        weight_decay=base_decay,
    )
    best = int(np.argmax(scores(model)))
    rate, decay = settings[best]
    if len(settings) > 1:
        run.say(f"learning rate {rate:g} and weight decay {decay:g} are the best on val")
    head = model.heads[best]
    return Trained(
        head,
        lambda part: outputs_of_head(head, part, features, grid),
        settings={"learning_rate": rate, "weight_decay": decay, "step": progress.best_step},
        history=progress.history,
    )
