"""Runs pre-training: data -> batches -> objective -> AdamW -> a checkpoint in Apple's layout.

While it runs, OUTPUT.training holds what `resume` needs (state.safetensors), the tokenizer, log.jsonl with the losses,
and patches-STEP.png now and then. OUTPUT itself appears at the end, whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_aimv2.backend import WIDE_SIGHT, prepared
from mlx_aimv2.config import Aimv2TextConfig
from mlx_aimv2.conversion.folder import save_pytorch
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.files import atomic_folder, check_target
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.loading import AnyModel, load, resample_positions
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.captioned import Data
from mlx_aimv2.pretrain.examples import (
    Grid,
    Preparation,
    Prepared,
    Stream,
    collate,
    first_examples,
    grid_of,
    middle_grid,
)
from mlx_aimv2.pretrain.objective import DecoderConfig, Pretraining, initialise
from mlx_aimv2.pretrain.samples import draw_samples
from mlx_aimv2.pretrain.settings import Schedule, Settings
from mlx_aimv2.tokenizer import VOCAB_SIZE, Tokenizer, train_tokenizer
from mlx_aimv2.train.batches import Batches
from mlx_aimv2.train.loop import Watch, is_due, number_of, train
from mlx_aimv2.train.optimizer import flat
from mlx_aimv2.train.state import StateFile, check_training_folder, saved_weights, training_folder

TOKENIZER_CAPTIONS = 1_000_000
"""Captions that a tokenizer is trained on at most."""

VALIDATION_EXAMPLES = 512


@prepared(WIDE_SIGHT)
def pretrain(
    data: Data,
    output: str | Path,
    *,
    settings: Settings,
    validation: Data | None = None,
    schedule: Schedule | None = None,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Aimv2VisionModel:
    """Trains an encoder by the paper's objective and writes it to `output` in Apple's layout; returns it.

    `tokenizer` reads the captions; by default it is that of `settings.start`, or one trained on them. Of the ranks of
    `mlx.launch` each takes its share of a batch, and rank 0 writes. `resume` goes on with a run that was stopped.
    `report` gets the entries of the log.

    Raises FileExistsError if something stands at `output` (or an interrupted run does, without `resume`), ValueError
    for settings that do not fit the data or the interrupted run, and for a loss that is no number.
    """
    output, schedule, ranks = Path(output), schedule or Schedule(), Ranks()
    check_target(output)
    start = settings.start
    folder = check_training_folder(output, resume=resume)
    part = settings.part(ranks.size)
    check_enough(sum(1 for _ in islice(data.epoch(None), settings.batch_size)), settings.batch_size)
    if start is not None and tokenizer is None and not resume:
        tokenizer = tokenizer_of(Path(start))
    tokenizer = tokenizer_for(data, settings.decoder, tokenizer, folder if resume else None)
    settings = replace(settings, decoder=replace(settings.decoder, vocab_size=tokenizer.size))
    state = StateFile(folder, asdict(settings) | {"ranks": ranks.size})
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_to(folder)
    model = Pretraining(settings.vision, settings.decoder, eos=tokenizer.eos)
    initialise(model, settings.vision.num_hidden_layers, seed=settings.seed)
    if start is not None and not resume and not start_from(model, start):
        report(f"{start} has no {training_folder(Path(start)).name} beside it: the decoder starts at random")

    order = Stream(
        data,
        lambda number: grid_of_step(settings, number // settings.grad_accumulation_steps + 1),
        size=part,
        seed=settings.seed,
        start=state.progress["positions"][ranks.rank] if state.progress is not None else 0,
        rank=ranks.rank,
        ranks=ranks.size,
    )
    prepare = Preparation(
        settings.vision,
        seed=settings.seed,
        augmentation=settings.augmentation,
        first_caption=settings.first_caption,
    )
    batches = Batches(order, lambda item: prepare(*item), collate=lambda examples: collate(examples, tokenizer))
    after_step = _reports(data, validation, model, tokenizer, settings, schedule, folder, report)
    try:
        train(
            model,
            lambda model, batch, key: model.losses(batch, settings.alpha),
            batches,
            settings.plan(schedule),
            state=state,
            ranks=ranks,
            watch=Watch(after_step=after_step if ranks.rank == 0 else lambda step, losses: None, say=report),
        )
    finally:
        batches.close()
    if ranks.rank == 0:
        write_checkpoint(model.encoder, output, tokenizer=tokenizer)
    return model.encoder


def grid_of_step(settings: Settings, step: int) -> Grid:
    """The grid of a step's batches, the same for all ranks."""
    return grid_of(settings.vision, np.random.default_rng((settings.seed, 5, step)), patches=settings.patches)


def _reports(
    data: Data,
    validation: Data | None,
    model: Pretraining,
    tokenizer: Tokenizer,
    settings: Settings,
    schedule: Schedule,
    folder: Path,
    report: Callable[[str], None],
) -> Callable[[int, dict[str, float]], None]:
    """What rank 0 does after a step: log the losses, validate, draw predicted patches."""
    as_is = Preparation(settings.vision, seed=settings.seed)
    grid = middle_grid(settings.vision, patches=settings.patches)
    held_out = [] if validation is None else first_examples(validation, as_is, grid, VALIDATION_EXAMPLES)
    shown = held_out[:4] or first_examples(data, as_is, grid, 4)
    log = Log(folder / "log.jsonl", report)

    def after_step(step: int, losses: dict[str, float]) -> None:
        is_last = step == settings.iters
        if is_due(step, schedule.steps_per_report) or is_last:
            log.add(step, **losses)
        if held_out and (is_due(step, schedule.steps_per_eval) or is_last):
            log.add(step, **validate(model, held_out, tokenizer, settings.batch_size))
        if is_due(step, schedule.samples_every) or (is_last and schedule.samples_every):
            draw_samples(model, collate(shown, tokenizer), folder / f"patches-{step:06d}.png")

    return after_step


def validate(model: Pretraining, examples: list[Prepared], tokenizer: Tokenizer, size: int) -> dict[str, float]:
    """Mean losses over held-out examples, uncropped, with prefix lengths that stay the same."""
    sums = np.zeros(2)
    for start in range(0, len(examples), size):
        image, text = model(collate(examples[start : start + size], tokenizer))
        sums += [number_of(image.sum()), number_of(text.sum())]
    image_mean, text_mean = sums / len(examples)
    return {"validation_image_loss": float(image_mean), "validation_text_loss": float(text_mean)}


def write_checkpoint(model: AnyModel, output: Path, *, tokenizer: Tokenizer | None = None) -> None:
    """A folder in Apple's layout: weights in float32, config.json, preprocessor_config.json, the tokenizer if any."""
    vision = model.vision.config
    with atomic_folder(output) as folder:
        weights = list(flat(model.parameters()).items())
        save_pytorch(model.config, weights, folder, layout="apple", dtype=mx.float32)
        Aimv2Processor(published(vision.image_size), patch_size=vision.patch_size).save_to(folder)
        if tokenizer is not None:
            tokenizer.save_to(folder)


class Log:
    """Losses as JSON lines in a file, and as text for whoever watches."""

    def __init__(self, file: Path, report: Callable[[str], None]) -> None:
        self.file, self.report = file, report
        self.began = time.monotonic()

    def add(self, step: int, **values: float) -> None:
        """One entry."""
        seconds = time.monotonic() - self.began
        rounded = {name: round(value, 5) for name, value in values.items()}
        entry = {"step": step, "seconds": round(seconds, 1), **rounded}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.report(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def tokenizer_for(
    data: Data, text: DecoderConfig | Aimv2TextConfig, given: Tokenizer | None, resumed: Path | None
) -> Tokenizer:
    """The tokenizer that is given, the interrupted run's in `resumed`, or one trained on the captions."""
    context = text.max_position_embeddings
    if given is None and resumed is not None:
        given = Tokenizer.from_folder(resumed)
    if given is None:
        size = min(text.vocab_size, VOCAB_SIZE)
        return train_tokenizer(all_captions(data), vocab_size=size, context=context)
    given.context = context
    return given


def all_captions(data: Data) -> Iterable[str]:
    """The captions of the data, the first million of them."""
    count = 0
    for example in data.epoch(None):
        yield from example.texts
        count += len(example.texts)
        if count >= TOKENIZER_CAPTIONS:
            return


def check_enough(found: int, batch: int) -> None:
    """Raises ValueError for data of fewer examples than a batch."""
    if found < batch:
        raise ValueError(
            f"the data has {found} images with captions, fewer than a batch of {batch}; lower --batch-size"
        )


def tokenizer_of(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer beside the earlier run's encoder, None for an encoder that came without (Apple's)."""
    return Tokenizer.from_folder(checkpoint) if (checkpoint / "tokenizer.json").is_file() else None


def start_from(model: Pretraining, checkpoint: str | Path) -> bool:
    """Fills the model from an earlier run's checkpoint; returns whether there was a decoder, in CHECKPOINT.training.

    Position tables are resampled to the new number of patches. Raises ValueError for an encoder of other sizes.
    """
    earlier, _ = load(checkpoint, dtype="float32")
    weights = {
        f"encoder.{name}": array
        for name, array in flat(earlier.vision.parameters()).items()
        if not name.startswith("head.")
    }
    decoder = saved_weights(Path(checkpoint), prefix="decoder.")
    weights |= decoder
    table = "encoder.pos_embed"
    if table in weights and (patches := model.encoder.config.num_patches) is not None:
        old, new = math.isqrt(weights[table].shape[0]), math.isqrt(patches)
        weights[table] = resample_positions(weights[table], (old, old), (new, new))
    shapes = {name: array.shape for name, array in flat(model.parameters()).items()}
    for name, array in weights.items():
        if shapes.get(name) != array.shape:
            raise ValueError(f"{checkpoint}: {name} is {array.shape}, this run's is {shapes.get(name)}; give its sizes")
    model.load_weights(list(weights.items()), strict=False)
    return bool(decoder)
