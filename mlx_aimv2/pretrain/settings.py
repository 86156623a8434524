"""Everything that decides what a run of pre-training or LiT tuning computes, checked, and what it does beside."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mlx.core as mx

from mlx_aimv2.config import DTYPES, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.pretrain.examples import PATCHES
from mlx_aimv2.pretrain.objective import ALPHA, DecoderConfig
from mlx_aimv2.train.augment import Augmentation
from mlx_aimv2.train.loop import Plan
from mlx_aimv2.train.optimizer import Group, Table
from mlx_aimv2.train.settings import MAX_SEED, check, setting

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 1e-4
PAPER_BATCH = 8192
PAPER_RATES = {1024: 1e-3, 1536: 8e-4, 2048: 8e-4, 3072: 4e-4}
"""Width -> learning rate at batch 8192. The paper gives the ends, 1e-3 (large) and 4e-4 (3B); between, our reading."""

MAX_NORM = 1.0
"""Gradients longer than this are scaled down to it."""

GROUPS: Table = [(r".*pos_embed", Group(decay=0.0))]
"""Positions are not decayed, as norms and biases are not."""

AUTO = "auto"
"""bfloat16 on a GPU, float32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """What training on images with captions is told, by the paper's objective or by LiT's.

    `batch_size` counts examples on all ranks; `warm_up` None is a tenth of the steps. `first_caption` is how often the
    first of an example's captions is taken; otherwise all are drawn alike.
    """

    batch_size: int = 1  # this and the rate have their places here, their flags and defaults below
    iters: int = setting(1000, "optimisation", "steps", "at least 1")
    learning_rate: float | None = None
    warm_up: int | None = setting(
        None, "optimisation", "steps until the highest rate (default: a tenth of all)", "at least 0"
    )
    weight_decay: float = setting(WEIGHT_DECAY, "optimisation", "of AdamW", "at least 0")
    first_caption: float = setting(0.0, "data", "how often the first of several captions is read", "from 0 to 1")
    seed: int = setting(0, "run", "of everything random", "at least 0", maximum=MAX_SEED)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        check(self)

    def _plan(self, rate: float) -> Plan:
        """What the loop does for both."""
        return Plan(
            steps=self.iters,
            learning_rate=rate,
            weight_decay=self.weight_decay,
            betas=BETAS,
            warm_up=self.iters // 10 if self.warm_up is None else self.warm_up,
            clip=MAX_NORM,
            groups=GROUPS,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Settings(Captioned):
    """Everything that decides what pre-training computes; a resumed run must have the same.

    `learning_rate` None is the paper's, scaled by the examples of a step, which are `grad_accumulation_steps` batches.
    `patches` are the fewest and the most of an image, for native encoders. `start` is an earlier result, whose weights
    go on in this run, at another resolution for example.
    """

    vision: Aimv2VisionConfig
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    patches: tuple[int, int] = setting(
        PATCHES, "what is trained", "with --native: fewest and most", "the fewest, 2 at least, and the most"
    )
    start: str | None = setting(
        None,
        "what is trained",
        "go on from an earlier result, at another --image-size for example",
        metavar="MODEL",
    )
    batch_size: int = setting(64, "optimisation", "images of a batch, on all ranks", "at least 1")
    learning_rate: float | None = setting(
        None, "optimisation", "highest rate (default: the paper's times the root of a batch / 8192)", "above 0"
    )
    grad_accumulation_steps: int = setting(1, "optimisation", "batches of a step", "at least 1")
    alpha: float = setting(ALPHA, "optimisation", "weight of the image loss", "at least 0")
    dtype: str = setting(
        AUTO,
        "optimisation",
        "float32, float16, bfloat16 or auto (default: auto, bfloat16 on a GPU)",
        choices=(*DTYPES, AUTO),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vision.image_size is not None and self.vision.image_size % self.vision.patch_size:
            raise ValueError(
                f"images of {self.vision.image_size} pixels do not divide into patches of {self.vision.patch_size}"
            )

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return scaled_rate(self.vision.hidden_size, self.batch_size * self.grad_accumulation_steps)

    def plan(self, schedule: Schedule) -> Plan:
        """How the loop trains."""
        is_on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return replace(
            self._plan(self.rate),
            accumulate=self.grad_accumulation_steps,
            dtype=("bfloat16" if is_on_gpu else "float32") if self.dtype == AUTO else self.dtype,
            keep="last",
            save_every=schedule.save_every,
        )

    def part(self, ranks: int) -> int:
        """Examples of a batch on one rank. Raises ValueError for a batch that does not divide."""
        if self.batch_size % ranks:
            raise ValueError(f"--batch-size {self.batch_size} does not divide by {ranks} ranks")
        return self.batch_size // ranks


@dataclass(frozen=True)
class Schedule:
    """How often, in steps, something is done beside pre-training; 0 is never."""

    steps_per_report: int = setting(10, "run", "steps between two lines of losses", "at least 0")
    steps_per_eval: int = setting(500, "run", "steps between evaluations", "at least 0")
    save_every: int = setting(500, "run", "steps between two states", "at least 0")
    samples_every: int = setting(1000, "run", "steps between images of predicted patches", "at least 0")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class LitSettings(Captioned):
    """Sizes of the text side and how it is trained; the text encoder's defaults are aimv2-large-patch14-224-lit's.

    `views` is how many crops of each image are kept: the whole image, and random ones.
    """

    text: Aimv2TextConfig = field(default_factory=Aimv2TextConfig)
    projection_dim: int = 768
    batch_size: int = setting(256, "optimisation", "images of a batch, on all ranks", "at least 1")
    learning_rate: float = setting(1e-3, "optimisation", "highest rate", "above 0")
    views: int = setting(1, "augmentation", "crops kept of each image, the whole one among them", "at least 1")
    steps_per_report: int = setting(50, "run", "steps between two lines of losses", "at least 0")
    save_every: int = setting(500, "run", "steps between two states", "at least 0")

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have the same: all but how often it reports and saves."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps_per_report", "save_every")}

    def plan(self) -> Plan:
        """How the loop trains."""
        return replace(self._plan(self.learning_rate), keep="average", save_every=self.save_every)


def scaled_rate(width: int, batch: int) -> float:
    """The paper's learning rate for a width, scaled by the square root of the batch, as Adam's noise goes."""
    rate = next((rate for size, rate in PAPER_RATES.items() if width <= size), PAPER_RATES[3072])
    return rate * math.sqrt(batch / PAPER_BATCH)
