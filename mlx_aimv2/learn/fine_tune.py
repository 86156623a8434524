"""Trains an encoder together with a head: in full, or by adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.learn import lora
from mlx_aimv2.learn.evaluation import decoded, outputs_of_learner
from mlx_aimv2.learn.frozen import compute_features
from mlx_aimv2.learn.learner import Learner, grid_of
from mlx_aimv2.learn.run import Run, Trained
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.train.optimizer import FROZEN, Table, freeze, layer_decay


def fine_tune(run: Run) -> Trained:
    """The encoder and the head of this run, trained on pixels."""
    options, defaults = run.options, run.defaults
    depth = len(run.encoder.blocks)
    layers = depth if options.num_layers in (None, -1) else int(options.num_layers or 0)
    if layers > depth:
        raise ValueError(f"--num-layers must be at most {depth}, the blocks of this encoder, got {layers}")
    head = _first_head(run)  # before the encoder has adapters
    adapters = _with_adapters(run, layers)
    learner = Learner(run.encoder, head)
    decay = defaults.layer_decay if options.layer_decay is None else options.layer_decay
    groups = _groups(depth, layers, decay) if adapters is None else []  # adapters have frozen all but themselves
    freeze(learner, groups)
    drop_path = defaults.drop_path if options.drop_path is None else options.drop_path
    rows, columns = grid_of(run.processor)
    hidden = round(options.mask_ratio * rows * columns)

    def make(sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        example = run.task.example(sample, run.processor, chance=rng if options.augment else None, flip=options.flip)
        if hidden:
            example["patch_mask"] = random_mask(rows * columns, hidden, rng)
        return example

    def loss(model: Any, batch: dict[str, mx.array], key: mx.array) -> mx.array:
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
        predictions = decoded(run.task, run.val, outputs_of_learner(model, run.task, run.val, run.processor))
        return run.task.score(run.val, predictions, run.dataset.classes)[run.task.METRIC]

    rate = options.learning_rate or defaults.learning_rates[0]
    weight_decay = defaults.weight_decays[0] if options.weight_decay is None else options.weight_decay
    progress = run.train(
        learner,
        loss,
        make,
        evaluate=evaluate,
        groups=groups,
        learning_rate=rate,
        weight_decay=weight_decay,
    )
    return Trained(
        learner.head,
        lambda part: outputs_of_learner(learner, run.task, part, run.processor),
        settings={"learning_rate": rate, "weight_decay": weight_decay, "step": progress.best_step},
        history=progress.history,
        adapters=adapters,
    )


def random_mask(patches: int, hidden: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Which patches of an image are hidden, `(N,)` of bool with `hidden` of them true."""
    mask = np.zeros(patches, bool)
    mask[rng.permutation(patches)[:hidden]] = True
    return mask


def mixing(alpha: float, batch: int, key: mx.array) -> tuple[float, mx.array]:
    """How much of each image stays, and which other one is mixed in (mixup; Zhang et al. 2018)."""
    rng = np.random.default_rng(np.array(key))
    return float(rng.beta(alpha, alpha)), mx.array(rng.permutation(batch))


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


def _with_adapters(run: Run, layers: int) -> dict[str, Any] | None:
    """Adds the adapters of `lora` and `dora` to the encoder; returns their configuration, None for `full`."""
    encoder, options = run.encoder, run.options
    if run.kind not in lora.KINDS:
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


def _groups(depth: int, layers: int, decay: float) -> Table:
    """The last blocks, the final norm and the head learn; with all blocks also patches and positions."""
    first = depth - layers
    frozen = [r"encoder\.head\..*", *(rf"encoder\.blocks\.{i}\..*" for i in range(first))]
    frozen += [r"encoder\.(patch_embed|pos_embed).*"] if first else []
    return [*((pattern, FROZEN) for pattern in frozen), *layer_decay(depth, decay)]
