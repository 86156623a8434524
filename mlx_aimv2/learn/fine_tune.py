"""Trains an encoder together with a head: in full, or by adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.learn import lora
from mlx_aimv2.learn.batches import Batches
from mlx_aimv2.learn.data import Sample
from mlx_aimv2.learn.evaluation import decoded, outputs_of_learner
from mlx_aimv2.learn.features import compute_features
from mlx_aimv2.learn.learner import Learner, grid_of
from mlx_aimv2.learn.optimizer import layer_wise
from mlx_aimv2.learn.run import Run, Trained
from mlx_aimv2.model import Aimv2VisionModel


def fine_tune(run: Run) -> Trained:
    """The encoder and the head of this run, trained on pixels."""
    options, defaults = run.options, run.defaults
    depth = len(run.encoder.blocks)
    layers = depth if options.num_layers in (None, -1) else int(options.num_layers or 0)
    if layers > depth:
        raise ValueError(f"--num-layers must be at most {depth}, the blocks of this encoder, got {layers}")
    head = _first_head(run)  # before the encoder has adapters
    adapters = _prepare(run, layers)
    learner = Learner(run.encoder, head)
    drop_path = defaults.drop_path if options.drop_path is None else options.drop_path
    rows, columns = grid_of(run.processor)
    hidden = round(options.mask_ratio * rows * columns)

    def make(sample: Sample, chance: np.random.Generator) -> dict[str, Any]:
        example = run.task.example(sample, run.processor, chance=chance if options.augment else None, flip=options.flip)
        if hidden:
            example["patch_mask"] = random_mask(rows * columns, hidden, chance)
        return example

    def forward(model: Any, batch: dict[str, mx.array], key: mx.array) -> mx.array:
        pixels, other, share = batch["pixels"], batch, 1.0
        if options.mixup:
            share, order = mixing(options.mixup, len(pixels), key)
            pixels = share * pixels + (1 - share) * pixels[order]
            other = {name: array[order] for name, array in batch.items()}
        outputs = model(
            pixels,
            patch_mask=batch.get("patch_mask"),
            checkpoint=options.grad_checkpoint,
            drop_path=drop_path,
            key=key,
        )
        losses = run.task.loss(outputs, batch)
        return losses if share == 1 else share * losses + (1 - share) * run.task.loss(outputs, other)

    def evaluate(model: Any) -> float:
        val = run.dataset.splits["val"] or run.dataset.splits["test"]
        predictions = decoded(run.task, val, outputs_of_learner(model, run.task, val, run.processor))
        return run.task.score(val, predictions, run.dataset.classes)[run.task.METRIC]

    batches = Batches(
        run.dataset.splits["train"],
        make,
        batch_size=run.batch_size(),
        seed=options.seed,
        rank=run.ranks.rank,
        ranks=run.ranks.size,
    )
    decay = defaults.layer_decay if options.layer_decay is None else options.layer_decay
    rate = options.learning_rate or defaults.learning_rates[0]
    weight_decay = defaults.weight_decays[0] if options.weight_decay is None else options.weight_decay
    progressed = run.train(
        learner,
        forward,
        batches,
        evaluate=evaluate,
        groups=layer_wise(depth, decay),
        learning_rate=rate,
        weight_decay=weight_decay,
    )
    return Trained(
        learner.head,
        lambda part: outputs_of_learner(learner, run.task, part, run.processor),
        settings={"learning_rate": rate, "weight_decay": weight_decay, "step": progressed.best_step},
        history=progressed.history,
        adapters=adapters,
    )


def random_mask(patches: int, hidden: int, chance: np.random.Generator) -> np.ndarray[Any, Any]:
    """Which patches of an image are hidden, `(N,)` of bool with `hidden` of them true."""
    mask = np.zeros(patches, bool)
    mask[chance.permutation(patches)[:hidden]] = True
    return mask


def mixing(alpha: float, batch: int, key: mx.array) -> tuple[float, mx.array]:
    """How much of each image stays, and which other one is mixed in (mixup; Zhang et al. 2018)."""
    chance = np.random.default_rng(np.array(key))
    return float(chance.beta(alpha, alpha)), mx.array(chance.permutation(batch))


def _first_head(run: Run) -> nn.Module:
    """The head that training starts from: the linear probe where the task solves for one.

    A head that fits the features first keeps the encoder from being bent to a random one (Kumar et al. 2022, LP-FT).
    """
    head = run.head()
    if run.task.FROZEN.get("linear") != "mean" or run.options.adapter_path is not None:
        return head
    train, val = run.dataset.splits["train"], run.dataset.splits["val"]
    advance = run.progress(len({sample.sha256 for sample in (*train, *val)}), "images")
    features = compute_features(
        [*train, *val], run.encoder, run.processor, kind="mean", folder=run.cache, advance=advance
    )
    probe = run.task.solve(
        "linear", (features.of(train), train), (features.of(val), val), len(run.dataset.classes), say=lambda line: None
    )
    if probe is not None:
        run.say("the head starts as the linear probe")
        head.update(probe.parameters())
    return head


def _prepare(run: Run, layers: int) -> dict[str, Any] | None:
    """Freezes what is not trained and adds adapters; returns their configuration."""
    encoder, options = run.encoder, run.options
    encoder.freeze()
    if run.kind not in lora.KINDS:
        _unfreeze(encoder, layers)
        return None
    if options.adapter_path is not None:
        return lora.load_adapters(encoder, Path(options.adapter_path))
    settings: dict[str, Any] = {
        "num_layers": layers,
        "rank": options.lora_rank or lora.RANK,
        "scale": lora.SCALE if options.lora_scale is None else options.lora_scale,
        "dropout": options.lora_dropout or lora.DROPOUT,
    }
    lora.add_adapters(encoder, run.kind, **settings)
    return lora.config_of(run.kind, **settings)


def _unfreeze(encoder: Aimv2VisionModel, layers: int) -> None:
    """Trains the last blocks and the final norm; with all blocks also patches and positions."""
    for block in encoder.blocks[len(encoder.blocks) - layers :]:
        block.unfreeze()
    encoder.norm.unfreeze()
    if layers == len(encoder.blocks):
        encoder.patch_embed.unfreeze()
        encoder.unfreeze(recurse=False, keys=["pos_embed"])
