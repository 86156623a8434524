"""Runs pre-training: data -> batches -> objective -> AdamW -> a checkpoint in Apple's layout.

While it runs, OUTPUT.training holds what `resume` needs (state.safetensors), the tokenizer, log.jsonl with the losses,
and patches-STEP.png now and then. OUTPUT itself appears at the end, whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_aimv2 import x86_training
from mlx_aimv2.conversion.folder import save_pytorch
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.preprocessing import published
from mlx_aimv2.pretrain import optimise, state
from mlx_aimv2.pretrain.batches import Ahead, Preparation, Prepared, Stream, collate, first_examples
from mlx_aimv2.pretrain.captioned import Data
from mlx_aimv2.pretrain.captions import VOCAB_SIZE, as_tokenizer, save_tokenizer, train_tokenizer
from mlx_aimv2.pretrain.grids import Grid, grid_of, middle_grid
from mlx_aimv2.pretrain.objective import Pretraining, initialise
from mlx_aimv2.pretrain.samples import draw_samples
from mlx_aimv2.pretrain.settings import Schedule, Settings
from mlx_aimv2.pretrain.start import start_from, tokenizer_of
from mlx_aimv2.processor import Aimv2Processor
from mlx_aimv2.safe_write import atomic_folder, check_target
from mlx_aimv2.tokenizer import Tokenizer

TOKENIZER_CAPTIONS = 1_000_000
"""Captions that a tokenizer is trained on at most."""

VALIDATION_EXAMPLES = 512

GROUP = 1 << 27
"""Numbers of weights and moments that are updated at a time: 512 MB in float32."""


@x86_training.prepared(x86_training.WIDE_SIGHT)
def pretrain(
    data: Data,
    output: str | Path,
    *,
    settings: Settings,
    validation: Data | None = None,
    schedule: Schedule | None = None,
    tokenizer: Tokenizer | None = None,
    start: str | Path | None = None,
    resume: bool = False,
    group: mx.distributed.Group | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Aimv2VisionModel:
    """Trains an encoder by the paper's objective and writes it to `output` in Apple's layout; returns it.

    `tokenizer` reads the captions; by default one is trained on them. With `group` every rank takes its share of each
    batch and rank 0 writes. `start` is an earlier run's checkpoint, whose weights and tokenizer go on in this one, at
    another resolution for example; `resume` goes on with this run itself. `report` gets the entries of the log.

    Raises FileExistsError if something stands at `output` (or an interrupted run does, without `resume`), ValueError
    for settings that do not fit the data or the interrupted run, and for a loss that is no number.
    """
    output, schedule = Path(output), schedule or Schedule()
    check_target(output)
    rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
    part = settings.part(ranks)
    _check_enough(data, settings.batch)
    place = prepare_place(output, resume=resume, is_writer=rank == 0)

    if start is not None and tokenizer is None:
        tokenizer = tokenizer_of(Path(start))
    tokenizer = _tokenizer_for(data, settings, tokenizer, place, resume=resume)
    settings = _with_vocabulary(settings, tokenizer)
    context = settings.decoder.max_position_embeddings
    if rank == 0:
        save_tokenizer(tokenizer.backend, place, context=context)
    model = Pretraining(settings.vision, settings.decoder, eos=tokenizer.eos)
    initialise(model, settings.vision.num_hidden_layers, seed=settings.seed)
    if start is not None and not resume and not start_from(model, start):
        report(f"{start} has no {state.place_of(Path(start)).name} beside it: the decoder starts at random")
    warm_up = settings.warm_up if settings.warm_up is not None else settings.steps // 10
    optimizer = optimise.adamw(settings.rate, steps=settings.steps, warm_up=warm_up, weight_decay=settings.weight_decay)
    first, positions = 0, [0] * ranks
    if resume:
        first, positions = state.load(place, model, optimizer, asdict(settings))
        if len(positions) != ranks:
            raise ValueError(f"{place} was started on {len(positions)} ranks, now there are {ranks}; resume with those")
    optimise.lay_out(model, optimizer)

    prepare = Preparation(
        settings.vision,
        seed=settings.seed,
        augmentation=settings.augmentation,
        first_caption=settings.first_caption,
    )
    as_is, grid = (
        Preparation(settings.vision, seed=settings.seed),
        middle_grid(settings.vision, patches=settings.patches),
    )
    held_out = [] if validation is None else first_examples(validation, as_is, grid, VALIDATION_EXAMPLES)
    shown = held_out[:4] or first_examples(data, as_is, grid, 4)
    stream = Stream(data, prepare, seed=settings.seed, start=positions[rank], rank=rank, ranks=ranks)
    log = Log(place / "log.jsonl", report, is_writer=rank == 0)
    ahead = Ahead(stream, part * settings.accumulate, grids(settings, first + 1))
    dtype = getattr(mx, settings.dtype)
    try:
        for step in range(first + 1, settings.steps + 1):
            examples, position = ahead()
            parts = [collate(examples[i : i + part], tokenizer) for i in range(0, len(examples), part)]
            means, gradient = optimise.gradients(
                model, lambda batch: model.loss(batch, settings.alpha), parts, dtype=dtype
            )
            means, gradient = averaged(means, gradient, group)
            optimise.check_finite(means, step, state=str(place / state.STATE_FILE))
            take_step(model, optimizer, gradient)
            is_last = step == settings.steps
            if _due(step, schedule.log) or is_last:
                log.add(step, loss=means[0], image_loss=means[1], text_loss=means[2])
            if held_out and rank == 0 and (_due(step, schedule.validate) or is_last):
                log.add(step, **validate(model, held_out, tokenizer, part))
            if rank == 0 and (_due(step, schedule.samples) or (is_last and schedule.samples)):
                draw_samples(model, collate(shown, tokenizer), place / f"patches-{step:06d}.png")
            if _due(step, schedule.save) or is_last:
                positions = gathered(position, group)
                if rank == 0:
                    state.save(place, model, optimizer, settings=asdict(settings), step=step, positions=positions)
    finally:
        ahead.close()
    if rank == 0:
        write_encoder(model.encoder, output, tokenizer=tokenizer)
    return model.encoder


def grids(settings: Settings, step: int) -> Iterator[Grid]:
    """The grid of each batch from a step on; the same for all ranks."""
    for number in count(step):
        yield grid_of(settings.vision, np.random.default_rng((settings.seed, 5, number)), patches=settings.patches)


def take_step(model: nn.Module, optimizer: optim.Optimizer, gradient: Any) -> None:
    """One update with gradients of at most `MAX_NORM`.

    Evaluated some weights at a time: the old and the new ones and their moments never stand side by side in whole.
    """
    optimizer.update(model, optimise.clipped(gradient))
    weights: Any = tree_flatten(model.trainable_parameters())
    moments: Any = dict(tree_flatten(optimizer.state))
    group: list[mx.array] = []
    for path, weight in weights:
        group += [weight, *(moments[f"{path}.{name}"] for name in ("m", "v"))]
        if sum(x.size for x in group) > GROUP:
            mx.eval(group)
            group = []
    mx.eval(model.parameters(), optimizer.state)


def averaged(means: list[float], gradient: Any, group: mx.distributed.Group | None) -> tuple[list[float], Any]:
    """Losses and gradients over all ranks."""
    if group is None:
        return means, gradient
    total = mx.distributed.all_sum(mx.array(means, mx.float32), group=group) / group.size()
    values: Any = total.tolist()
    return values, nn.average_gradients(gradient, group=group)


def gathered(position: int, group: mx.distributed.Group | None) -> list[int]:
    """The next example of each rank."""
    if group is None:
        return [position]
    all_of_them: Any = mx.distributed.all_gather(mx.array([position]), group=group).tolist()
    return all_of_them


def validate(model: Pretraining, examples: list[Prepared], tokenizer: Tokenizer, size: int) -> dict[str, float]:
    """Mean losses over held-out examples, uncropped, with prefix lengths that stay the same."""
    sums = np.zeros(2)
    for start in range(0, len(examples), size):
        image, text = model(collate(examples[start : start + size], tokenizer))
        sums += [optimise.number(image.sum()), optimise.number(text.sum())]
    image_mean, text_mean = sums / len(examples)
    return {"validation_image_loss": float(image_mean), "validation_text_loss": float(text_mean)}


def write_encoder(encoder: Aimv2VisionModel, output: Path, *, tokenizer: Tokenizer | None = None) -> None:
    """A folder in Apple's layout: weights in float32, config.json, preprocessor_config.json, the tokenizer if any."""
    config = encoder.config
    with atomic_folder(output) as folder:
        weights: Any = tree_flatten(encoder.parameters())
        save_pytorch(config, weights, folder, layout="apple", dtype=mx.float32)
        Aimv2Processor(published(config.image_size), patch_size=config.patch_size).save_to(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer.backend, folder, context=tokenizer.context)


class Log:
    """Losses as JSON lines in a file, and as text for whoever watches."""

    def __init__(self, file: Path, report: Callable[[str], None], *, is_writer: bool) -> None:
        self.file, self.report, self.is_writer = file, report, is_writer
        self.began = time.monotonic()

    def add(self, step: int, **values: float) -> None:
        """One entry."""
        if not self.is_writer:
            return
        seconds = time.monotonic() - self.began
        rounded = {name: round(value, 5) for name, value in values.items()}
        entry = {"step": step, "seconds": round(seconds, 1), **rounded}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.report(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def prepare_place(output: Path, *, resume: bool, is_writer: bool) -> Path:
    """OUTPUT.training, made where it is not there. Raises FileExistsError for an interrupted run without `resume`."""
    place = state.place_of(output)
    if resume:
        if not (place / state.STATE_FILE).is_file():
            raise FileNotFoundError(f"{place} has no {state.STATE_FILE} to resume from; start without --resume")
    elif is_writer:
        if (place / state.STATE_FILE).exists():
            raise FileExistsError(f"{place} holds an interrupted run; go on with --resume or remove it")
        place.mkdir(parents=True, exist_ok=True)
    return place


def _tokenizer_for(
    data: Data, settings: Settings, tokenizer: Tokenizer | None, place: Path, *, resume: bool
) -> Tokenizer:
    """The tokenizer that is given, the interrupted run's, or one trained on the captions."""
    context = settings.decoder.max_position_embeddings
    if tokenizer is None and not resume:
        most = min(settings.decoder.vocab_size, VOCAB_SIZE)
        return as_tokenizer(train_tokenizer(all_captions(data), vocab_size=most), context=context)
    tokenizer = tokenizer or Tokenizer.from_folder(place)
    tokenizer.context = context
    return tokenizer


def _with_vocabulary(settings: Settings, tokenizer: Tokenizer) -> Settings:
    size = tokenizer.backend.get_vocab_size(with_added_tokens=True)
    return replace(settings, decoder=replace(settings.decoder, vocab_size=size))


def all_captions(data: Data) -> Iterable[str]:
    """The captions of the data, the first million of them."""
    count = 0
    for example in data.epoch(None):
        yield from example.texts
        count += len(example.texts)
        if count >= TOKENIZER_CAPTIONS:
            return


def _check_enough(data: Data, batch: int) -> None:
    found = sum(1 for _, _ in zip(data.epoch(None), range(batch), strict=False))
    if found < batch:
        raise ValueError(f"the data has {found} images with captions, fewer than a batch of {batch}; lower --batch")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
