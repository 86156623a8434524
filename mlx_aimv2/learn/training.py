"""One run of `fit` as its steps see it, and the two ways of training.

Heads are trained on stored features of a frozen encoder; or the encoder is trained together with its head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
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
from mlx_aimv2.images import FAST, to_rgb
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import lora
from mlx_aimv2.learn.classify.head import MIN_STD, AttentiveHead
from mlx_aimv2.learn.learner import Learner, decoded, outputs_of_head, outputs_of_learner, visible_patches
from mlx_aimv2.learn.samples import DataError, Dataset, Sample, refusal
from mlx_aimv2.learn.task_options import Options, Task, Type
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.train.batches import Arrays, Batches, Shuffled
from mlx_aimv2.train.loop import LossError, Plan, Watch, drawn, train
from mlx_aimv2.train.optimizer import FROZEN, Group, Table, freeze, layer_decay
from mlx_aimv2.train.state import Progress, StateFile

OutputsOf: TypeAlias = "Callable[[Sequence[Sample]], Iterator[Outputs]]"
"""What a head, or an encoder with a head, gives for samples."""

EVALUATIONS, PATIENCE = 20, 8
"""Of a run where no flag says how many, and those without a better score before a fine-tuning stops."""

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
    """What the head folder keeps of the encoder, as it was before."""
    state: StateFile
    ranks: Ranks
    cache: Path | None
    say: Callable[[str], None]
    on_progress: Callable[[int, int, str], None]

    def head(self) -> nn.Module:
        """A new head for this run's classes."""
        return self.task.head.make_head(self.kind, self.encoder.config, len(self.dataset.classes), {})

    def score(self, outputs: OutputsOf) -> float:
        """The score on `val` that the best state goes by. Raises LossError for outputs that are no numbers."""
        val = self.dataset.splits["val"] or self.dataset.splits["test"]

        def checked() -> Iterator[Outputs]:
            for sample, found in zip(val, outputs(val), strict=True):
                if not all(np.isfinite(array).all() for array in found.values()):
                    raise LossError(f"what the head makes of {sample.path} is no number")
                yield found

        predictions = decoded(self.task, val, checked())
        scores, _ = self.task.results.score(val, predictions, self.dataset.classes)
        return scores[self.task.metric]

    def features(self, kind: str, samples: Sequence[Sample]) -> Features:
        """What the encoder makes of every sample, `mean` or `tokens` of each, from the cache where it has them.

        Raises OSError with one line where the disk is full; what was computed stays.
        """
        model, processor, (rows, columns) = self.encoder, self.processor, self.processor.grid
        shape = (*(() if kind == "mean" else (rows * columns,)), model.config.hidden_size)
        folder = (self.cache or cache_folder() / "features") / cache_key(model, processor, kind=kind)
        unique = {sample.sha256: sample.path for sample in samples}
        with open_features(folder, shape, KINDS[kind], advice="choose another --cache; what was done is kept") as cache:
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
                raise DataError([f"{path} was changed while it was read: run it again" for path in changed])
            return cache.features()

    def solve(
        self,
        kind: str,
        features_of: Callable[[Sequence[Sample]], Array],
        *,
        say: Callable[[str], None] = lambda line: None,
    ) -> nn.Module:
        """The head of a kind that no loop trains, from the mean token of each image."""
        train, val = ((features_of(part), part) for part in (self.dataset.splits["train"], self.dataset.splits["val"]))
        head: nn.Module = self.task.head.solve(kind, train, val, len(self.dataset.classes), say)
        return head

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
        options, ranks = self.options, self.ranks
        samples = self.dataset.splits["train"]
        size = min(self.type.batch_size, len(samples))
        size = max(ranks.size, size - size % ranks.size)
        order = Shuffled(samples, batch_size=size, seed=options.seed, rank=ranks.rank, ranks=ranks.size)
        per_epoch = max(1, order.per_epoch // options.grad_accumulation_steps)
        steps = options.iters or self.type.epochs * per_epoch
        patience = 0 if self.type.features else PATIENCE  # heads alone are trained to the end in seconds
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


def train_on_features(run: Run) -> Trained:
    """The head of this run on features that are computed once: solved for, or the best of several that are trained."""
    samples = [sample for part in run.dataset.splits.values() for sample in part]
    features, grid = run.features(run.type.features or "tokens", samples), run.processor.grid

    def outputs_of(head: nn.Module) -> OutputsOf:
        return lambda part: outputs_of_head(head, part, features, grid)

    if not run.type.learning_rates:
        solved = run.solve(run.kind, features.of, say=run.say)
        own = {"images": len(run.dataset.splits["train"])} if run.kind == "knn" else {}
        return Trained(solved, outputs_of(solved), own)
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
        losses = [run.task.head.loss(head(batch["tokens"], grid), batch) for head in candidates.heads]
        total: mx.array = sum(losses[1:], losses[0])
        return total

    def scores(candidates: Any) -> list[float]:
        return [run.score(outputs_of(head)) for head in candidates.heads]

    if len(heads) > 1:
        run.say(f"{len(heads)} heads are trained side by side, by different settings; the loss is that of all together")
    model = nn.Module()
    model.heads = heads
    progress = run.train(model, loss, make, evaluate=lambda candidates: max(scores(candidates)), groups=groups)
    best = int(np.argmax(scores(model)))
    rate, decay = settings[best]
    if len(settings) > 1:
        run.say(f"learning rate {rate:g} and weight decay {decay:g} are the best on val")
    about = {"learning_rate": rate, "weight_decay": decay, "step": progress.best_step}
    return Trained(model.heads[best], outputs_of(model.heads[best]), settings=about, history=progress.history)


def _candidates(run: Run, features: Features) -> tuple[list[nn.Module], list[tuple[float, float]]]:
    """A head for each learning rate and weight decay to be tried, all from the same start, and these settings.

    Attentive probes get the statistics of the tokens, and there is one more that begins as the linear probe: with that
    one among them, what `val` likes best is there no worse than the linear probe. A recipe of others is followed as it
    is, without.
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
        probe = run.solve("linear", lambda part: mean_tokens(features, part))
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


def fine_tune(run: Run) -> Trained:
    """The encoder and the head of this run, trained on pixels: in full, or by adapters."""
    options, own, depth = run.options, run.type, len(run.encoder.blocks)
    layers = depth if options.num_layers in (None, -1) else int(options.num_layers or 0)
    if layers > depth:
        raise ValueError(f"--num-layers must be at most {depth}, the blocks of this encoder, got {layers}")
    head = _first_head(run)  # before the encoder has adapters
    adapters = _with_adapters(run, layers)
    grid = run.processor.grid
    hidden = round(options.mask_ratio * math.prod(grid))
    learner = Learner(run.encoder, head, fills=run.task.dense and hidden > 0)
    groups = (
        _groups(depth, layers, own.layer_decay) if adapters is None else []
    )  # adapters have frozen all but themselves
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
        losses = run.task.head.loss(outputs, batch)
        if shares is None:
            return losses
        other = {name: array[order] for name, array in batch.items()}
        return shares[0] * losses + shares[1] * run.task.head.loss(outputs, other)

    def outputs(part: Sequence[Sample]) -> Iterator[Outputs]:
        return outputs_of_learner(learner, part, run.processor)

    progress = run.train(learner, loss, make, evaluate=lambda model: run.score(outputs), groups=groups)
    about = {"learning_rate": own.learning_rates[0], "weight_decay": own.weight_decays[0], "step": progress.best_step}
    return Trained(learner.head, outputs, settings=about, history=progress.history, adapters=adapters)


def _first_head(run: Run) -> nn.Module:
    """The head that training starts from: the linear probe, but for dense tasks.

    A head that fits the features first keeps the encoder from being bent to a random one (Kumar et al. 2022, LP-FT).
    """
    head = run.head()
    if run.task.dense or run.options.adapter_path is not None:
        return head
    features = run.features("mean", [*run.dataset.splits["train"], *run.dataset.splits["val"]])
    probe = run.solve("linear", features.of)
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
