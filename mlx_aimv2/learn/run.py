"""One run of `fit` as its steps see it, and what the training of a head or an encoder gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.embed.cache import KINDS, Features, cache_key, open_features
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.embed.encode import Pooling, embed_chunks
from mlx_aimv2.embed.loader import Decoder, Outputs, split_into_chunks
from mlx_aimv2.files import cache_folder
from mlx_aimv2.images import FAST
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn.learner import decoded, grid_of
from mlx_aimv2.learn.samples import DataError, Dataset, Sample
from mlx_aimv2.learn.task import Options, Solve, Task, Type
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.train.batches import Arrays, Batches, Shuffled
from mlx_aimv2.train.loop import Plan, Progress, StateFile, Watch, train
from mlx_aimv2.train.optimizer import Table

OutputsOf: TypeAlias = "Callable[[Sequence[Sample]], Iterator[Outputs]]"
"""What a head, or an encoder with a head, gives for samples."""

EVALUATIONS = 20
"""Evaluations of a run where no flag says how often."""

PATIENCE = 8
"""Of them, those without a better score before the fine-tuning of an encoder stops."""


@dataclass(frozen=True)
class Run:
    """Everything that training needs; `state` is None where no loop runs."""

    task: Task
    kind: str
    dataset: Dataset
    encoder: Aimv2VisionModel
    processor: Aimv2Processor
    options: Options
    type: Type
    described: dict[str, Any]
    """What the head folder keeps of the encoder, as it was before."""
    state: StateFile | None
    ranks: Ranks
    cache: Path | None
    say: Callable[[str], None]
    progress: Callable[[int, str], Callable[[int], None]]

    def head(self) -> nn.Module:
        """A new head for this run's classes."""
        return self.task.head.make_head(self.kind, self.encoder.config, len(self.dataset.classes), {})

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to be tried; the first one is the base of all others."""
        asked = self.options.learning_rate
        return self.type.learning_rates if asked is None else (asked,)

    @property
    def decays(self) -> tuple[float, ...]:
        """Weight decays to be tried, the base first."""
        asked = self.options.weight_decay
        return self.type.weight_decays if asked is None else (asked,)

    @property
    def val(self) -> list[Sample]:
        """The images that the best state is chosen on."""
        return self.dataset.splits["val"] or self.dataset.splits["test"]

    def score(self, outputs: OutputsOf) -> float:
        """The score on `val` that the best state goes by."""
        predictions = decoded(self.task, self.val, outputs(self.val))
        scores, _ = self.task.results.score(self.val, predictions, self.dataset.classes)
        return scores[self.task.metric]

    def features(self, kind: str, samples: Sequence[Sample]) -> Features:
        """What the encoder makes of every sample, `mean` or `tokens` of each, from the cache where it has them.

        Raises OSError with one line where the disk is full; what was computed stays.
        """
        model, processor, (rows, columns) = self.encoder, self.processor, grid_of(self.processor)
        shape = (*(() if kind == "mean" else (rows * columns,)), model.config.hidden_size)
        folder = (self.cache or cache_folder() / "features") / cache_key(model, processor, kind=kind)
        unique = {sample.sha256: sample.path for sample in samples}
        advance = self.progress(len(unique), "images")
        with open_features(folder, shape, KINDS[kind], advice="choose another --cache; what was done is kept") as cache:
            missing = {sha256: path for sha256, path in unique.items() if sha256 not in cache.index}
            cache.reserve(len(missing))
            advance(len(unique) - len(missing))
            failed: list[str] = []
            decoder, chunks = Decoder(processor, policy=FAST), split_into_chunks(sorted(missing.values()))
            for result in embed_chunks(chunks, decoder, model, Pooling.of(model, kind)):
                cache.append((one.sha256, one.vector) for one in result.embeddings if one.sha256 in missing)
                failed += [f"{path} {reason}" for path, reason in result.failures]
                advance(len(result.embeddings))
            if failed:
                raise DataError(failed)
            if changed := [path for sha256, path in missing.items() if sha256 not in cache.index]:
                raise DataError([f"{path} was changed while it was read: run it again" for path in changed])
            return cache.features()

    def solve(
        self,
        solve: Solve,
        kind: str,
        features_of: Callable[[Sequence[Sample]], NDArray[Any]],
        *,
        say: Callable[[str], None] = lambda line: None,
    ) -> nn.Module:
        """The head of a kind that no loop trains, from the mean token of each image."""
        train, val = ((features_of(part), part) for part in (self.dataset.splits["train"], self.dataset.splits["val"]))
        return solve(kind, train, val, len(self.dataset.classes), say)

    def train(
        self,
        model: nn.Module,
        loss: Callable[[Any, dict[str, mx.array], mx.array], mx.array],
        make: Callable[[Sample, np.random.Generator], Arrays],
        *,
        evaluate: Callable[[Any], float],
        groups: Table,
    ) -> Progress:
        """The loop with this run's settings: `loss(model, batch, key) -> (B,)` on what `make` makes of the samples."""
        options, defaults, ranks = self.options, self.type, self.ranks
        samples = self.dataset.splits["train"]
        size = min(options.batch_size or defaults.batch_size, len(samples))
        size = max(ranks.size, size - size % ranks.size)
        order = Shuffled(samples, batch_size=size, seed=options.seed, rank=ranks.rank, ranks=ranks.size)
        per_epoch = max(1, order.per_epoch // options.grad_accumulation_steps)
        steps = options.iters or (options.epochs or defaults.epochs) * per_epoch
        patience = 0 if self.type.features else PATIENCE  # heads alone are trained to the end in seconds
        plan = Plan(
            steps=steps,
            learning_rate=self.rates[0],
            weight_decay=self.decays[0],
            warm_up=min(defaults.warm_up_epochs * per_epoch, max(1, steps // 5)),
            groups=groups,
            accumulate=options.grad_accumulation_steps,
            eval_every=options.steps_per_eval or max(1, -(-steps // EVALUATIONS)),
            patience=patience if options.patience is None else options.patience,
            seed=options.seed,
        )
        watch = Watch(evaluate=evaluate, say=self.say, advance=self.progress(steps, "steps"))
        batches = Batches(order, lambda item: make(*item))

        def mean_loss(model: Any, batch: Any, key: mx.array) -> dict[str, mx.array]:
            return {"loss": loss(model, batch, key).mean()}

        try:
            return train(model, mean_loss, batches, plan, state=self.state, ranks=ranks, watch=watch)
        finally:
            batches.close()


@dataclass(frozen=True)
class Trained:
    """A head, how to get its outputs on samples, and what the head folder keeps of the training."""

    head: nn.Module
    outputs: OutputsOf
    head_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    adapters: dict[str, Any] | None = None
