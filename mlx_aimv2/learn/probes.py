"""Heads on stored features of a frozen encoder: solved directly, or the best of several trained side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.embed.cache import Array, Features
from mlx_aimv2.embed.loader import Outputs, split_into_chunks
from mlx_aimv2.images import to_rgb
from mlx_aimv2.learn.classify.head import MIN_STD, AttentiveHead
from mlx_aimv2.learn.learner import outputs_of_head
from mlx_aimv2.learn.samples import Sample, folds
from mlx_aimv2.learn.training import OutputsOf, Run, Trained
from mlx_aimv2.train.optimizer import Group

STEP = 64
"""Images whose tokens are in memory at a time."""


def train_on_features(run: Run) -> Trained:
    """The head of this run on features computed once: solved directly, or the best of several trained ones."""
    samples = [sample for part in run.dataset.splits.values() for sample in part]
    features, grid = run.features(run.type.features or "tokens", samples), run.processor.grid

    def outputs_of(head: nn.Module) -> OutputsOf:
        return lambda part: outputs_of_head(head, part, features, grid)

    if not run.type.learning_rates:
        return _solved(run, features, outputs_of)
    heads, settings = _candidates(run, features)
    base_rate, base_decay = settings[0]
    groups = [
        (rf"heads\.{i}\..*", Group(rate / base_rate, decay / base_decay if base_decay else 1.0, clip_with=f"{i}"))
        for i, (rate, decay) in enumerate(settings)
    ]

    def make(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        if run.type.augmentation is not None and run.options.augment:
            image = run.type.augmentation(to_rgb(sample.path), run.processor.canvas, rng)
            return {"pixels": run.processor.pixels(image), **run.task.data.targets(sample, run.processor)}
        row = np.asarray(features[sample.sha256], np.float32)
        return {"tokens": row if row.ndim == 2 else row[None], **run.task.data.targets(sample, run.processor)}

    def loss(candidates: Any, batch: dict[str, mx.array], key: mx.array) -> mx.array:
        if "pixels" in batch:
            batch = batch | {"tokens": mx.stop_gradient(run.encoder(batch["pixels"]).last_hidden_state)}
        losses = [run.loss(head(batch["tokens"], grid), batch) for head in candidates.heads]
        total: mx.array = sum(losses[1:], losses[0])
        return total

    def scores(candidates: Any) -> list[tuple[float, float]]:
        return [run.score(outputs_of(head)) for head in candidates.heads]

    if len(heads) > 1:
        run.say(f"training {len(heads)} heads side by side with different settings; the loss is their mean")
    model = nn.Module()
    model.heads = heads
    progress = run.train(model, loss, make, evaluate=lambda candidates: best_of(scores(candidates)), groups=groups)
    best = int(np.argmax([score for score, _ in scores(model)]))
    rate, decay = settings[best]
    if len(settings) > 1:
        run.say(f"learning rate {rate:g} and weight decay {decay:g} are the best on val")
    about = {"learning_rate": rate, "weight_decay": decay, "step": progress.best_step}
    return Trained(model.heads[best], outputs_of(model.heads[best]), settings=about, history=progress.history)


def best_of(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The best score of several heads and the lowest of their losses."""
    return max(score for score, _ in scores), min(loss for _, loss in scores)


def _solved(run: Run, features: Features, outputs_of: Callable[[nn.Module], OutputsOf]) -> Trained:
    """The head solved without a loop; in cross-validation each image is scored by a head that never saw it."""
    splits = run.dataset.splits

    def judged_by(head: nn.Module, is_balanced: bool) -> OutputsOf:
        crossed = dict[str, Outputs]()
        for rest, held in folds(splits["train"]) if run.dataset.is_crossed else []:
            other, _ = run.solve(run.kind, features.of, rest, is_balanced=is_balanced)
            crossed |= {sample.path: found for sample, found in zip(held, outputs_of(other)(held), strict=True)}
        return (lambda part: (crossed[sample.path] for sample in part)) if crossed else outputs_of(head)

    def refit(samples: Sequence[Sample]) -> tuple[nn.Module, dict[str, Any]]:
        again = run.task.head.solve(run.kind, (features.of(samples), samples), len(run.dataset.classes), settings)
        return again, options | ({"images": len(samples)} if options else {})

    head, settings = run.solve(run.kind, features.of, is_balanced=run.is_balanced, say=run.say)
    options = {"images": len(splits["train"]), **settings} if run.kind == "knn" else {}
    return Trained(
        head,
        judged_by(head, run.is_balanced),
        options,
        {name: value for name, value in settings.items() if name != "is_balanced"},
        refit=refit,
        balanced=lambda: judged_by(run.solve(run.kind, features.of, is_balanced=True)[0], True),
    )


def _candidates(run: Run, features: Features) -> tuple[list[nn.Module], list[tuple[float, float]]]:
    """A head for each learning rate and weight decay to try, all from the same start, and these settings.

    Attentive probes get the statistics of the tokens, and one more of them starts as the linear probe, so the best on
    `val` is no worse there than the linear probe. A published recipe is followed exactly, without it.
    """
    settings = list(product(run.type.learning_rates, run.type.weight_decays))
    heads = [run.head() for _ in settings]
    for head in heads[1:]:
        head.update(heads[0].parameters())
    if not isinstance(heads[0], AttentiveHead):
        return heads, settings
    mean, std = (mx.array(array) for array in token_statistics(features, run.dataset.splits["train"]))
    probe = None
    if run.options.recipe is None:
        heads.append(run.head())
        probe, _ = run.solve("linear", lambda part: mean_tokens(features, part), is_balanced=run.is_balanced)
        settings.append((min(run.type.learning_rates), run.type.weight_decays[0]))
    for number, head in enumerate(heads):
        head.start(mean, std, probe if number == len(heads) - 1 else None)
    return heads, settings


def token_statistics(features: Features, samples: Sequence[Sample]) -> tuple[Array, Array]:
    """Mean and standard deviation of all tokens of the samples, (D,) each in float32, a few images at a time."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for part in split_into_chunks(samples, STEP):
        tokens = features.of(part)
        rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
        count, total, squares = count + len(rows), total + rows.sum(axis=0), squares + (rows**2).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, MIN_STD**2))
    return mean.astype(np.float32), std.astype(np.float32)


def mean_tokens(features: Features, samples: Sequence[Sample]) -> Array:
    """The mean token of each sample, (n, D)."""
    return np.concatenate([features.of(part).mean(axis=1) for part in split_into_chunks(samples, STEP)])
