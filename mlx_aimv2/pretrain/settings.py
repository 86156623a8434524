"""Everything that decides what a run of pre-training computes, checked, and what it does beside."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.pretrain import losses, optimise
from mlx_aimv2.pretrain.augment import Augmentation
from mlx_aimv2.pretrain.decoder import DecoderConfig
from mlx_aimv2.pretrain.grids import PATCHES


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes; a resumed run must have the same.

    `learning_rate` None is the paper's, scaled by the batch; `warm_up` None is a tenth of the steps. `batch` counts
    the examples of a step on all ranks, in `accumulate` parts on each. `first_caption` is how often the first of an
    example's captions is taken; otherwise all are drawn alike. `patches` are the fewest and the most of an image, for
    native encoders.
    """

    vision: Aimv2VisionConfig
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    batch: int = 64
    accumulate: int = 1
    steps: int = 1000
    learning_rate: float | None = None
    warm_up: int | None = None
    weight_decay: float = optimise.WEIGHT_DECAY
    alpha: float = losses.ALPHA
    seed: int = 0
    dtype: str = "float32"
    first_caption: float = 0.0
    patches: tuple[int, int] = PATCHES
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
        return optimise.scaled_rate(self.vision.hidden_size, self.batch)

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
