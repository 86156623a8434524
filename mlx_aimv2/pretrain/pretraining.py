"""Pre-training: data -> batches -> objective -> AdamW -> a checkpoint in Apple's layout; what decides it, and the run.

While it runs, OUTPUT.training holds what `resume` needs (state.safetensors), the tokenizer, log.jsonl with the losses,
and patches-STEP.png now and then. OUTPUT itself appears at the end, whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_aimv2.backend import WIDE_SIGHT, prepared
from mlx_aimv2.checkpoint.read import read_safetensors
from mlx_aimv2.config import DTYPES, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.conversion.folder import save_pytorch, write_safetensors
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.files import atomic_file, atomic_folder
from mlx_aimv2.images.preprocessing import CLIP_MEAN, CLIP_STD, published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.layers import patches_of, pixels_of
from mlx_aimv2.loading import AnyModel, load, resample_positions
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.data import Data, Preparation, Prepared, Stream, collate, content_of, first_examples
from mlx_aimv2.pretrain.objective import (
    ALPHA,
    PATCHES,
    Batch,
    Decoder,
    DecoderConfig,
    Grid,
    Pretraining,
    grid_of,
    images_of,
    initialise,
    mean_and_deviation,
)
from mlx_aimv2.tokenizer import VOCAB_SIZE, Tokenizer, train_tokenizer
from mlx_aimv2.train.augment import Augmentation
from mlx_aimv2.train.batches import Batches, share_of
from mlx_aimv2.train.loop import Plan, Watch, is_due, train
from mlx_aimv2.train.optimizer import Group, Table, flat
from mlx_aimv2.train.settings import MAX_SEED, check, setting
from mlx_aimv2.train.state import StateFile, digest_of, training_run

DECODER_FILE = "decoder.safetensors"
"""Beside an encoder's weights: those of the decoder that it was trained with, its sizes in the metadata."""

TOKENIZER_CAPTIONS = 1_000_000
"""Captions that a tokenizer is trained on at most."""

VALIDATION_EXAMPLES = 512

PAPER_BATCH, PAPER_MIN_RATE, PAPER_WARM_UP = 8192, 1e-5, 12_500 / 1_500_000
PAPER_RATES = {1024: 1e-3, 1536: 8e-4, 2048: 8e-4, 3072: 4e-4}
"""Width -> highest learning rate at that batch (arXiv 2411.14402, table A1, as the betas, decay and clipping below).

It is reached after that share of the steps and falls to the same lowest rate for each width.
"""

GROUPS: Table = [(r".*pos_embed", Group(decay=0.0))]
"""Positions are not decayed, as norms and biases are not."""

AUTO = "auto"
"""bfloat16 on a GPU, float32 on a CPU."""


MAY_CHANGE = ("learning_rate", "steps_per_report", "steps_per_eval", "save_every", "samples_every")
"""Settings that a resumed run may change: a rate that was too high, and how often something is done beside training."""


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """What training on images with captions is told, by the paper's objective or by LiT's; defaults of the former.

    What is done every so many steps is never done with 0.
    """

    batch_size: int = setting(64, "optimisation", "images per batch, across all ranks", "at least 1")
    iters: int = setting(1000, "optimisation", "steps", "at least 1")
    learning_rate: float | None = setting(
        None, "optimisation", "peak learning rate (default: the paper's times sqrt(batch size / 8,192))", "above 0"
    )
    warm_up: int | None = setting(
        None, "optimisation", "steps to the peak rate (default: 1/120 of all; lit: 1/10)", "at least 0"
    )
    weight_decay: float = setting(1e-4, "optimisation", "weight decay of AdamW", "from 0 to 1")
    """The share of a matrix that a step at the peak rate removes: fully decoupled, unlike `fit`'s."""
    first_caption: float = setting(0.0, "data", "how often the first of several captions is used", "from 0 to 1")
    seed: int = setting(0, "run", "random seed", "at least 0", maximum=MAX_SEED)
    steps_per_report: int = setting(10, "run", "steps between loss reports", "at least 0")
    save_every: int = setting(500, "run", "steps between saved states", "at least 0")
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        check(self)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must have the same."""
        return {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}

    def _plan(self, rate: float) -> Plan:
        """What the loop does for both. Decay is fully decoupled: `p *= 1 - weight_decay * (rate now) / rate`."""
        return Plan(
            steps=self.iters,
            learning_rate=rate,
            weight_decay=self.weight_decay / rate,
            betas=(0.9, 0.95),
            warm_up=self.iters // 10 if self.warm_up is None else self.warm_up,
            clip=1.0,
            groups=GROUPS,
            save_every=self.save_every,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Settings(Captioned):
    """What pre-training is told."""

    vision: Aimv2VisionConfig
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    patches: tuple[int, int] = setting(
        PATCHES, "what is trained", "with --native: minimum and maximum", "the fewest, 2 at least, and the most"
    )
    start: str | None = setting(
        None, "what is trained", "continue from an earlier result, for example at another --image-size", metavar="MODEL"
    )
    generative: bool = setting(
        False, "what is trained", "also predict the mean and contrast of patches, so `generate` can draw them"
    )
    grad_accumulation_steps: int = setting(1, "optimisation", "batches per step", "at least 1")
    alpha: float = setting(ALPHA, "optimisation", "weight of the image loss", "at least 0")
    dtype: str = setting(
        AUTO, "optimisation", f"{', '.join(DTYPES)} or auto (default: bfloat16 on a GPU)", choices=(*DTYPES, AUTO)
    )
    steps_per_eval: int = setting(500, "run", "steps between evaluations", "at least 0")
    samples_every: int = setting(1000, "run", "steps between images of predicted patches", "at least 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vision.image_size is not None and self.vision.image_size % self.vision.patch_size:
            raise ValueError(
                f"images of {self.vision.image_size} pixels do not divide into patches of {self.vision.patch_size}"
            )

    @property
    def rate(self) -> float:
        """The highest learning rate; the paper's is scaled by the root of a step's examples, as Adam's noise goes."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self._paper_rate * math.sqrt(self.batch_size * self.grad_accumulation_steps / PAPER_BATCH)

    @property
    def _paper_rate(self) -> float:
        return next((rate for width, rate in PAPER_RATES.items() if self.vision.hidden_size <= width), 4e-4)

    def plan(self) -> Plan:
        """How the loop trains; the rate falls to the same share of its highest as in the paper."""
        is_on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return replace(
            self._plan(self.rate),
            warm_up=round(self.iters * PAPER_WARM_UP) if self.warm_up is None else self.warm_up,
            min_rate=self.rate * PAPER_MIN_RATE / self._paper_rate,
            accumulate=self.grad_accumulation_steps,
            dtype=("bfloat16" if is_on_gpu else "float32") if self.dtype == AUTO else self.dtype,
            keep="last",
        )


@prepared(WIDE_SIGHT)
def pretrain(
    data: Data,
    output: str | Path,
    *,
    settings: Settings,
    validation: Data | None = None,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Aimv2VisionModel:
    """Trains an encoder by the paper's objective and writes it to `output` in Apple's layout; returns it.

    `tokenizer` reads the captions; by default it is that of `settings.start`, or one trained on them. Of the ranks of
    `mlx.launch` each takes its share of a batch, and rank 0 writes. `resume` continues a run that was stopped.
    `report` gets the entries of the log.

    Raises FileExistsError if something stands at `output` (or an interrupted run does, without `resume`), ValueError
    for settings that do not fit the data or the interrupted run, and for a loss that is no number.
    """
    output, ranks = Path(output), Ranks()
    with training_run(output, resume=resume, rank=ranks.rank) as folder:
        start, share = settings.start, share_of(settings.batch_size, ranks.size)
        check_enough(sum(1 for _ in islice(data.epoch(None), settings.batch_size)), settings.batch_size)
        tokenizer = tokenizer_for(data, settings.decoder, tokenizer, folder if resume else start)
        settings = replace(settings, decoder=replace(settings.decoder, vocab_size=tokenizer.size))
        state = begin(folder, data, tokenizer, settings.identity)
        model = Pretraining(settings.vision, settings.decoder, eos=tokenizer.eos, generative=settings.generative)
        initialise(model, settings.vision.num_hidden_layers, seed=settings.seed)
        if start is not None and not resume and not start_from(model, start):
            report(f"{start} has no {DECODER_FILE}: the decoder starts at random")

        def grid(number: int) -> Grid:
            """The same for all batches of a step and for all ranks."""
            step = number // settings.grad_accumulation_steps + 1
            return grid_of(settings.vision, np.random.default_rng((settings.seed, 5, step)), patches=settings.patches)

        order = Stream(
            data,
            grid,
            size=lambda grid: images_of(settings.vision, grid, share, patches=settings.patches),
            seed=settings.seed,
            start=state.progress.positions[ranks.rank] if state.progress is not None else 0,
            rank=ranks.rank,
            ranks=ranks.size,
        )
        prepare = Preparation(settings.vision, settings.seed, settings.augmentation, settings.first_caption)
        with closing(
            Batches(order, lambda item: prepare(*item), collate=lambda some: collate(some, tokenizer))
        ) as batches:
            after_step = _reports(data, validation, model, tokenizer, settings, folder, report)
            train(
                model,
                lambda model, batch, key: model.losses(batch, settings.alpha),
                batches,
                settings.plan(),
                state=state,
                ranks=ranks,
                watch=Watch(after_step=after_step, say=report),
            )
        if ranks.rank == 0:
            write_checkpoint(model.encoder, output, tokenizer=tokenizer, decoder=model.decoder)
        return model.encoder


def begin(folder: Path, data: Data, tokenizer: Tokenizer, identity: Mapping[str, Any]) -> StateFile:
    """The state of a run on these captions, and its tokenizer beside it. ValueError for a state of another run."""
    ranks = Ranks()
    about = {"data": content_of(data), "tokenizer": digest_of([tokenizer.backend.to_str()]), "ranks": ranks.size}
    about |= {"decay": "fully decoupled"}  # another one in earlier versions
    state = StateFile(folder, {**identity, **about})
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_to(folder)
    return state


def _reports(
    data: Data,
    validation: Data | None,
    model: Pretraining,
    tokenizer: Tokenizer,
    settings: Settings,
    folder: Path,
    report: Callable[[str], None],
) -> Callable[[int, dict[str, float]], None]:
    """What rank 0 does after a step: log the losses, validate, draw predicted patches."""
    as_is = Preparation(settings.vision, settings.seed)
    grid = grid_of(settings.vision, None, patches=settings.patches)
    held_out = [] if validation is None else first_examples(validation, as_is, grid, VALIDATION_EXAMPLES)
    shown = held_out[:4] or first_examples(data, as_is, grid, 4)
    log = log_to(folder / "log.jsonl", report)

    def after_step(step: int, losses: dict[str, float]) -> None:
        is_last = step == settings.iters
        if is_due(step, settings.steps_per_report) or is_last:
            log(step, losses)
        if held_out and (is_due(step, settings.steps_per_eval) or is_last):
            log(step, validate(model, held_out, tokenizer, settings.batch_size))
        if is_due(step, settings.samples_every) or (is_last and settings.samples_every):
            draw_samples(model, collate(shown, tokenizer), folder / f"patches-{step:06d}.png")

    return after_step


def validate(model: Pretraining, examples: list[Prepared], tokenizer: Tokenizer, size: int) -> dict[str, float]:
    """Mean losses over held-out examples, uncropped, with prefix lengths that stay the same."""
    sums = np.zeros(2)
    for start in range(0, len(examples), size):
        sums += [np.asarray(losses).sum() for losses in model(collate(examples[start : start + size], tokenizer))]
    image_mean, text_mean = (sums / len(examples)).tolist()
    return {"validation_image_loss": image_mean, "validation_text_loss": text_mean}


def write_checkpoint(
    model: AnyModel,
    output: Path,
    *,
    tokenizer: Tokenizer | None = None,
    processor: Aimv2Processor | None = None,
    decoder: Decoder | None = None,
) -> None:
    """A folder in Apple's layout: weights in float32, config.json, preprocessor_config.json, the tokenizer if any.

    Without `processor` images are prepared as for Apple's checkpoints. The decoder, if any, lies beside in a file of
    its own, with its sizes.
    """
    vision = model.vision.config
    processor = processor or Aimv2Processor(published(vision.image_size), patch_size=vision.patch_size)
    with atomic_folder(output) as folder:
        weights = list(flat(model.parameters()).items())
        save_pytorch(model.config, weights, folder, layout="apple", dtype=mx.float32)
        processor.save_to(folder)
        if tokenizer is not None:
            tokenizer.save_to(folder)
        if decoder is not None:
            about = {"config": json.dumps(asdict(decoder.config))}
            write_safetensors(folder / DECODER_FILE, flat(decoder.parameters()), metadata=about)


def log_to(file: Path, report: Callable[[str], None]) -> Callable[[int, Mapping[str, float]], None]:
    """Gives what writes the losses of a step, as JSON lines in a file and as text for whoever watches."""
    began = time.monotonic()

    def log(step: int, losses: Mapping[str, float]) -> None:
        rounded = {name: round(value, 5) for name, value in losses.items()}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "seconds": round(time.monotonic() - began, 1), **rounded}) + "\n")
        report(f"step {step:,}  " + "  ".join(f"{name} {value:.4f}" for name, value in losses.items()))

    return log


def tokenizer_for(
    data: Data, text: DecoderConfig | Aimv2TextConfig, given: Tokenizer | None, earlier: str | Path | None
) -> Tokenizer:
    """The tokenizer that is given, else that in the folder of an `earlier` run, else one trained on the captions."""
    if given is None and earlier is not None and (Path(earlier) / "tokenizer.json").is_file():  # Apple's have none
        given = Tokenizer.from_folder(Path(earlier))
    if given is None:
        captions = (caption for example in data.epoch(None) for caption in example.texts)
        given = train_tokenizer(islice(captions, TOKENIZER_CAPTIONS), vocab_size=min(text.vocab_size, VOCAB_SIZE))
    given.context = text.max_position_embeddings
    return given


def check_enough(found: int, batch: int) -> None:
    """Raises ValueError for data of fewer examples than a batch."""
    if found < batch:
        raise ValueError(
            f"the data has {found:,} images with captions, fewer than a batch of {batch:,}; lower --batch-size"
        )


def start_from(model: Pretraining, checkpoint: str | Path) -> bool:
    """Fills the model from an earlier run's checkpoint; returns whether it has a decoder.

    Position tables are resampled to the new number of patches. Raises ValueError for an encoder of other sizes.
    """
    earlier, _ = load(checkpoint, dtype="float32")
    encoder, file = flat(earlier.vision.parameters()), Path(checkpoint) / DECODER_FILE
    weights = {f"encoder.{name}": array for name, array in encoder.items() if not name.startswith("head.")}
    if file.is_file():
        weights |= {f"decoder.{name}": array for name, array in read_safetensors(file)[0].items()}
    table = "encoder.pos_embed"
    if table in weights and (patches := model.encoder.config.num_patches) is not None:
        old, new = math.isqrt(weights[table].shape[0]), math.isqrt(patches)
        weights[table] = resample_positions(weights[table], (old, old), (new, new))
    shapes = {name: array.shape for name, array in flat(model.parameters()).items()}
    for name, array in weights.items():
        if shapes.get(name) != array.shape:
            raise ValueError(f"{checkpoint}: {name} is {array.shape}, this run's is {shapes.get(name)}; give its sizes")
    model.load_weights(list(weights.items()), strict=False)
    return file.is_file()


def draw_samples(model: Pretraining, batch: Batch, file: Path) -> None:
    """A PNG with a row for each image: the original; its prefix and the patches predicted from those before each.

    Predictions are of normalised patches, so they are shown with the mean and deviation of the true ones.
    """
    patch_size = model.encoder.config.patch_size
    grid = model.encoder.grid(batch.pixels)
    patches = patches_of(batch.pixels, patch_size)
    predicted, _ = model.predict(batch)
    mean, deviation = mean_and_deviation(patches)
    shown = predicted[..., : patches.shape[-1]].astype(mx.float32) * deviation[:, 1:] + mean[:, 1:]
    shown = mx.concatenate([patches[:, :1], shown], axis=1)
    is_prefix = mx.arange(patches.shape[1])[None] < batch.lengths[:, None]
    shown = mx.where(is_prefix[..., None], patches, shown)
    sides = mx.concatenate([pixels_of(side, grid, patch_size) for side in (patches, shown)], axis=2)
    with atomic_file(file) as stream:
        Image.fromarray(levels_of(sides).reshape(-1, *sides.shape[2:])).save(stream, format="PNG")


def levels_of(pixels: mx.array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Normalised pixels as 0 … 255, `(B, H, W, 3) -> (B, H, W, 3)`."""
    levels = (np.array(pixels) * np.array(CLIP_STD) + np.array(CLIP_MEAN)).clip(0, 1) * 255
    return np.rint(levels).astype(np.uint8)
