"""One run of `fit` as seen by its steps, and training an encoder together with its head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.embed.cache import KINDS, Array, Features, cache_key, open_features
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.embed.encode import Pooling, embed_chunks
from mlx_aimv2.embed.loader import Decoder, Outputs, split_into_chunks
from mlx_aimv2.files import cache_folder
from mlx_aimv2.images import FAST
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import lora
from mlx_aimv2.learn.classify.head import balanced
from mlx_aimv2.learn.learner import Learner, outputs_of_learner, visible_patches
from mlx_aimv2.learn.samples import DataError, Dataset, Sample, folds, refusal
from mlx_aimv2.learn.task_options import Options, Task, Type
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.train.batches import Arrays, Batches, Shuffled
from mlx_aimv2.train.loop import LossError, Plan, Watch, drawn, train
from mlx_aimv2.train.optimizer import FROZEN, Table, freeze, layer_decay
from mlx_aimv2.train.state import Progress, StateFile

OutputsOf: TypeAlias = "Callable[[Sequence[Sample]], Iterator[Outputs]]"
"""Gives the outputs of a head, or of an encoder with a head, for samples."""

EVALUATIONS, PATIENCE = 20, 8
"""Default number of evaluations in a run, and how many without a better score stop a fine-tuning."""

STEP = 64
"""Images whose tokens are in memory at a time."""


@dataclass(frozen=True)
class Run:
    """Everything that training needs."""

    task: Task
    kind: str
    dataset: Dataset
    encoder: Aimv2VisionModel
    processor: Aimv2Processor
    options: Options
    type: Type
    described: dict[str, Any]
    """What the head folder records about the encoder before training."""
    state: StateFile
    ranks: Ranks
    cache: Path | None
    say: Callable[[str], None]
    on_progress: Callable[[int, int, str], None]

    @property
    def is_balanced(self) -> bool:
        """Whether all classes count equally."""
        return self.options.class_weights is not None

    @property
    def metric(self) -> str:
        """The score that is chosen by."""
        return self.options.metric or self.task.metric

    def head(self) -> nn.Module:
        """A new head for this run's classes."""
        head, classes = self.task.head, len(self.dataset.classes)
        first = {} if self.task.dense else head.first_options(self.dataset.splits["train"])
        return head.make_head(self.kind, self.encoder.config, classes, first)

    def loss(self, outputs: dict[str, mx.array], batch: dict[str, mx.array]) -> mx.array:
        """The loss of each image, weighted by its class if classes have weights: `-> (B,)`."""
        losses: mx.array = self.task.head.loss(outputs, batch)
        if not self.is_balanced:
            return losses
        return losses * mx.array(self._balance)[batch["label"]]

    @cached_property
    def _balance(self) -> Array:
        """The weight of each class, (classes,)."""
        labels = np.array([sample.target for sample in self.dataset.splits["train"]])
        return balanced(labels, len(self.dataset.classes))

    def score(self, outputs: OutputsOf) -> tuple[float, float]:
        """`judged` on `val`, which picks the best state."""
        val = self.dataset.splits["val"] or self.dataset.splits["test"]
        return self.judged(val, outputs(val))

    def judged(self, samples: Sequence[Sample], outputs: Iterable[Outputs]) -> tuple[float, float]:
        """The score of outputs by the chosen metric, and their mean loss.

        Raises LossError for outputs that are not numbers.
        """
        predictions, total = list[Any](), 0.0
        pairs = zip(samples, outputs, strict=True)
        while chunk := list(islice(pairs, 8 if self.task.dense else STEP)):
            for sample, found in chunk:
                if not all(np.isfinite(array).all() for array in found.values()):
                    raise LossError(f"the head's output for {sample.path} is not a number")
                predictions.append(self.task.results.decode(found, sample.size))
            targets = [self.task.data.targets(sample, self.processor) for sample, _ in chunk]
            total += float(np.array(self.loss(_batch([found for _, found in chunk]), _batch(targets))).sum())
        scores, _ = self.task.results.score(samples, predictions, self.dataset.classes)
        return scores[self.metric], total / len(samples)

    def features(self, kind: str, samples: Sequence[Sample]) -> Features:
        """The encoder's `mean` or `tokens` for every sample, from the cache if it has them.

        Raises OSError with one line if the disk is full; finished work is kept.
        """
        model, processor, (rows, columns) = self.encoder, self.processor, self.processor.grid
        shape = (*(() if kind == "mean" else (rows * columns,)), model.config.hidden_size)
        folder = (self.cache or cache_folder() / "features") / cache_key(model, processor, kind=kind)
        unique = {sample.sha256: sample.path for sample in samples}
        with open_features(folder, shape, KINDS[kind], advice="choose another --cache; finished work is kept") as cache:
            missing = {sha256: path for sha256, path in unique.items() if sha256 not in cache.index}
            cache.reserve(len(missing))
            done, failed = len(unique) - len(missing), list[str]()
            self.on_progress(done, len(unique), "images")
            decoder, chunks = Decoder(processor, policy=FAST), split_into_chunks(sorted(missing.values()))
            for result in embed_chunks(chunks, decoder, model, Pooling.of(model, kind)):
                cache.append((one.sha256, one.vector) for one in result.embeddings if one.sha256 in missing)
                failed += [f"{path} {reason}" for path, reason in result.failures]
                done += len(result.embeddings)
                self.on_progress(done, len(unique), "images")
            if failed:
                raise refusal(failed, broken=len(failed))
            if changed := [path for sha256, path in missing.items() if sha256 not in cache.index]:
                raise DataError([f"{path} changed while it was read: run it again" for path in changed])
            return cache.features()

    def solve(
        self,
        kind: str,
        features_of: Callable[[Sequence[Sample]], Array],
        train: Sequence[Sample] | None = None,
        *,
        is_balanced: bool,
        say: Callable[[str], None] = lambda line: None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The head of a kind solved without a loop, from the mean token of each image, and its settings.

        They are chosen on `val`, or without it on the `folds` of the training images.
        """
        classes, own = len(self.dataset.classes), self.dataset.splits
        train = own["train"] if train is None else train
        pairs = [(train, own["val"])] if own["val"] else folds(train)

        def judge(settings: Mapping[str, Any], samples: Sequence[Sample], logits: Array) -> tuple[float, float]:
            score, loss = self.judged(samples, ({"logits": row} for row in logits))
            named = ", ".join(f"{name} {value:g}" for name, value in settings.items())
            say(f"{named}: val loss {loss:.4f}, val {self.metric} {100 * score:.2f} %")
            return score, -loss

        labelled = [tuple((features_of(part), part) for part in pair) for pair in pairs]
        settings: dict[str, Any] = self.task.head.choose(kind, labelled, classes, judge, is_balanced=is_balanced)
        chosen = ", ".join(f"{name} {value:g}" for name, value in settings.items() if name != "is_balanced")
        if pairs:
            say(f"{chosen}: the best on {'val' if own['val'] else 'images held out in turn'}")
        head: nn.Module = self.task.head.solve(kind, (features_of(train), train), classes, settings)
        return head, settings

    def train(
        self,
        model: nn.Module,
        loss: Callable[[Any, dict[str, mx.array], mx.array], mx.array],
        make: Callable[[Sample, np.random.Generator], Arrays],
        *,
        evaluate: Callable[[Any], tuple[float, float]],
        groups: Table,
    ) -> Progress:
        """The loop with this run's settings: `loss(model, batch, key) -> (B,)` on batches that `make` builds."""
        options, ranks = self.options, self.ranks
        samples = self.dataset.splits["train"]
        size = min(self.type.batch_size, len(samples))
        size = max(ranks.size, size - size % ranks.size)
        order = Shuffled(samples, batch_size=size, seed=options.seed, rank=ranks.rank, ranks=ranks.size)
        per_epoch = max(1, order.per_epoch // options.grad_accumulation_steps)
        steps = options.iters or self.type.epochs * per_epoch
        patience = 0 if self.type.features else PATIENCE  # heads on their own are trained to the end in seconds
        plan = Plan(
            steps=steps,
            learning_rate=self.type.learning_rates[0],
            weight_decay=self.type.weight_decays[0],
            warm_up=min(self.type.warm_up_epochs * per_epoch, max(1, steps // 5)),
            min_rate=self.type.min_rate,
            groups=groups,
            accumulate=options.grad_accumulation_steps,
            eval_every=options.steps_per_eval or max(1, -(-steps // EVALUATIONS)),
            patience=patience if options.patience is None else options.patience,
            seed=options.seed,
            models=len(getattr(model, "heads", [None])),
        )
        self.on_progress(0, steps, "steps")
        watch = Watch(evaluate, say=self.say, on_progress=lambda done: self.on_progress(done, steps, "steps"))

        def mean_loss(model: Any, batch: Any, key: mx.array) -> dict[str, mx.array]:
            return {"loss": loss(model, batch, key).mean()}

        def mixed(number: int) -> tuple[dict[str, mx.array], int]:
            batch, position = batches(number)
            if options.mixup:  # Zhang et al. 2018; drawn here, since a compiled step draws nothing
                rng = np.random.default_rng(np.array(drawn(options.seed, number, ranks.rank)[1]))
                share, order = float(rng.beta(options.mixup, options.mixup)), rng.permutation(len(batch["pixels"]))
                batch |= {"shares": mx.array([share, 1 - share]), "order": mx.array(order)}
            return batch, position

        with closing(Batches(order, lambda item: make(*item))) as batches:
            return train(model, mean_loss, mixed, plan, state=self.state, ranks=ranks, watch=watch)


@dataclass(frozen=True)
class Trained:
    """A head, how to get its outputs on samples, and what the head folder keeps of the training."""

    head: nn.Module
    outputs: OutputsOf
    head_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    adapters: dict[str, Any] | None = None
    refit: Callable[[Sequence[Sample]], tuple[nn.Module, dict[str, Any]]] | None = None
    """The head with the same settings on other samples, and its options, where no loop trains it."""
    balanced: Callable[[], OutputsOf] | None = None
    """What the same would give with balanced class weights."""


def _batch(examples: Sequence[Mapping[str, Any]]) -> dict[str, mx.array]:
    return {name: mx.array(np.stack([one[name] for one in examples])) for name in examples[0]}


def fine_tune(run: Run) -> Trained:
    """The encoder and the head of this run, trained on pixels: in full, or by adapters."""
    options, own, depth = run.options, run.type, len(run.encoder.blocks)
    layers = depth if options.num_layers in (None, -1) else int(options.num_layers or 0)
    if layers > depth:
        raise ValueError(f"--num-layers must be at most {depth}, the blocks of this encoder, got {layers}")
    head = _first_head(run)  # before adapters are added to the encoder
    adapters = _with_adapters(run, layers)
    grid = run.processor.grid
    hidden = round(options.mask_ratio * math.prod(grid))
    learner = Learner(run.encoder, head, fills=run.task.dense and hidden > 0)
    groups = (
        _groups(depth, layers, own.layer_decay) if adapters is None else []
    )  # with adapters everything else is frozen
    freeze(learner, groups)

    def make(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        example = run.task.data.example(sample, run.processor, rng=rng if options.augment else None, flip=options.flip)
        if hidden:
            example["visible"] = visible_patches(grid, hidden, options.mask_shape, rng)
        return example

    def loss(model: Any, batch: dict[str, mx.array], key: mx.array) -> mx.array:
        batch = dict(batch)
        shares, order = batch.pop("shares", None), batch.pop("order", None)
        pixels = batch["pixels"]
        if shares is not None:
            pixels = shares[0] * pixels + shares[1] * pixels[order]
        outputs = model(
            pixels, visible=batch.get("visible"), checkpoint=options.grad_checkpoint, drop_path=own.drop_path, key=key
        )
        losses = run.loss(outputs, batch)
        if shares is None:
            return losses
        other = {name: array[order] for name, array in batch.items()}
        return shares[0] * losses + shares[1] * run.loss(outputs, other)

    def outputs(part: Sequence[Sample]) -> Iterator[Outputs]:
        return outputs_of_learner(learner, part, run.processor)

    progress = run.train(learner, loss, make, evaluate=lambda model: run.score(outputs), groups=groups)
    about = {"learning_rate": own.learning_rates[0], "weight_decay": own.weight_decays[0], "step": progress.best_step}
    return Trained(learner.head, outputs, settings=about, history=progress.history, adapters=adapters)


def _first_head(run: Run) -> nn.Module:
    """The head that training starts from: the linear probe, but for dense tasks.

    A head that already fits the features keeps a random one from distorting the encoder (Kumar et al. 2022, LP-FT).
    """
    head = run.head()
    if run.task.dense or run.options.adapter_path is not None:
        return head
    features = run.features("mean", [*run.dataset.splits["train"], *run.dataset.splits["val"]])
    probe, _ = run.solve("linear", features.of, is_balanced=run.is_balanced)
    head.update(probe.parameters())
    run.say("the head starts as the linear probe")
    return head


def _with_adapters(run: Run, layers: int) -> dict[str, Any] | None:
    """Adds the adapters of `lora` and `dora` to the encoder; returns their configuration, None for `full`."""
    encoder, options = run.encoder, run.options
    if run.kind not in lora.KINDS:
        return None
    if options.adapter_path is not None:
        return lora.load_adapters(encoder, Path(options.adapter_path))
    return lora.add_adapters(
        encoder,
        run.kind,
        num_layers=layers,
        rank=options.lora_rank or lora.RANK,
        scale=lora.SCALE if options.lora_scale is None else options.lora_scale,
        dropout=options.lora_dropout or lora.DROPOUT,
    )


def _groups(depth: int, layers: int, decay: float) -> Table:
    """The last blocks, the final norm and the head learn; with all blocks also patches and positions."""
    first = depth - layers
    frozen = [r"encoder\.head\..*", *(rf"encoder\.blocks\.{i}\..*" for i in range(first))]
    frozen += [r"encoder\.(patch_embed|pos_embed).*"] if first else []
    return [*((pattern, FROZEN) for pattern in frozen), *layer_decay(depth, decay)]
