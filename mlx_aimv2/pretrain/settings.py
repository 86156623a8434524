"""Everything that decides what a run of pre-training or LiT tuning computes, checked, and what it does beside."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mlx_aimv2.config import Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.pretrain.examples import PATCHES
from mlx_aimv2.pretrain.objective import ALPHA, DecoderConfig
from mlx_aimv2.train.augment import Augmentation
from mlx_aimv2.train.loop import Plan
from mlx_aimv2.train.optimizer import Group, Table

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 1e-4
PAPER_BATCH = 8192
PAPER_RATES = {1024: 1e-3, 1536: 8e-4, 2048: 8e-4, 3072: 4e-4}
"""Width -> learning rate at batch 8192. The paper gives the ends, 1e-3 (large) and 4e-4 (3B); between, our reading."""

MAX_NORM = 1.0
"""Gradients longer than this are scaled down to it."""

GROUPS: Table = [(r".*pos_embed", Group(decay=0.0))]
"""Positions are not decayed, as norms and biases are not."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes; a resumed run must have the same.

    `learning_rate` None is the paper's, scaled by the batch; `warm_up` None is a tenth of the steps. `batch` counts
    the examples of a step on all ranks, in `accumulate` parts on each. `first_caption` is how often the first of an
    example's captions is taken; otherwise all are drawn alike. `patches` are the fewest and the most of an image, for
    native encoders. `start` is an earlier result, whose weights go on in this run, at another resolution for example.
    """

    vision: Aimv2VisionConfig
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    batch: int = 64
    accumulate: int = 1
    steps: int = 1000
    learning_rate: float | None = None
    warm_up: int | None = None
    weight_decay: float = WEIGHT_DECAY
    alpha: float = ALPHA
    seed: int = 0
    dtype: str = "float32"
    first_caption: float = 0.0
    patches: tuple[int, int] = PATCHES
    start: str | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        low, high = self.patches
        if not 2 <= low <= high:
            raise ValueError(f"--patches are the fewest, 2 at least, and the most; got {low} {high}")
        if self.vision.image_size is not None and self.vision.image_size % self.vision.patch_size:
            raise ValueError(
                f"images of {self.vision.image_size} pixels do not divide into patches of {self.vision.patch_size}"
            )

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return scaled_rate(self.vision.hidden_size, self.batch)

    def plan(self, schedule: Schedule) -> Plan:
        """How the loop trains."""
        return Plan(
            steps=self.steps,
            learning_rate=self.rate,
            weight_decay=self.weight_decay,
            betas=BETAS,
            warm_up=self.steps // 10 if self.warm_up is None else self.warm_up,
            clip=MAX_NORM,
            groups=GROUPS,
            accumulate=self.accumulate,
            dtype=self.dtype,
            keep="last",
            save_every=schedule.save,
            seed=self.seed,
        )

    def part(self, ranks: int) -> int:
        """Examples in one part of a step on one rank. Raises ValueError for a batch that does not divide."""
        if self.batch % (self.accumulate * ranks):
            raise ValueError(
                f"a batch of {self.batch} does not divide into {self.accumulate} parts on {ranks} ranks; change --batch"
            )
        return self.batch // (self.accumulate * ranks)


@dataclass(frozen=True)
class Schedule:
    """How often, in steps, something is done beside training; 0 is never."""

    log: int = 10
    validate: int = 500
    save: int = 500
    samples: int = 1000


@dataclass(frozen=True)
class LitSettings:
    """Sizes of the text side and how it is trained; the text encoder's defaults are aimv2-large-patch14-224-lit's.

    `views` is how many crops of each image are kept: the whole image, and random ones. `first_caption` is how often a
    caption is an example's first one; otherwise all are drawn alike.
    """

    text: Aimv2TextConfig = field(default_factory=Aimv2TextConfig)
    projection_dim: int = 768
    batch: int = 256
    steps: int = 1000
    learning_rate: float = 1e-3
    warm_up: int | None = None
    weight_decay: float = WEIGHT_DECAY
    views: int = 1
    first_caption: float = 0.0
    log_every: int = 50
    save_every: int = 500
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")

    def plan(self) -> Plan:
        """How the loop trains."""
        return Plan(
            steps=self.steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=BETAS,
            warm_up=self.steps // 10 if self.warm_up is None else self.warm_up,
            clip=MAX_NORM,
            groups=GROUPS,
            keep="average",
            save_every=self.save_every,
            seed=self.seed,
        )


def scaled_rate(width: int, batch: int) -> float:
    """The paper's learning rate for a width, scaled by the square root of the batch, as Adam's noise goes."""
    rate = next((rate for size, rate in PAPER_RATES.items() if width <= size), PAPER_RATES[3072])
    return rate * math.sqrt(batch / PAPER_BATCH)
