"""Random crops, flips and colours of training images; the paper's are crops of 0.4 to 1.0 of the area, and flips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ASPECT = (3 / 4, 4 / 3)
"""Width over height of a crop, as torchvision's RandomResizedCrop draws it."""

ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image; the defaults are the paper's.

    `min_area` is the smallest crop as a share of the image; `flip` mirrors half of the images; `jitter` is the largest
    change of brightness, contrast and saturation as a share; `grey` the share of images that lose their colours.
    """

    min_area: float = 0.4
    flip: bool = True
    jitter: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        for name, low in (("min_area", 0.01), ("jitter", 0.0), ("grey", 0.0)):
            if not low <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from {low} to 1, got {getattr(self, name)}")

    def __call__(
        self, image: Image.Image, size: tuple[int, int], chance: np.random.Generator, *, keep_shape: bool = False
    ) -> Image.Image:
        """An RGB image of any size -> one of `size` (height, width); `keep_shape` for crops of just that shape."""
        from PIL import Image, ImageEnhance, ImageOps

        aspects = (size[1] / size[0],) * 2 if keep_shape else ASPECT
        box = random_crop(image.width, image.height, self.min_area, chance, aspects=aspects)
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
        if self.flip and chance.random() < 0.5:
            image = ImageOps.mirror(image)
        if self.jitter:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = change(image).enhance(chance.uniform(1 - self.jitter, 1 + self.jitter))
        if self.grey and chance.random() < self.grey:
            image = ImageOps.grayscale(image).convert("RGB")
        return image


def random_crop(
    width: int,
    height: int,
    min_area: float,
    chance: np.random.Generator,
    *,
    aspects: tuple[float, float] = ASPECT,
) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) of a crop of random area, shape and place.

    Where none fits in ten attempts, the largest centred one of the nearest shape.
    """
    for _ in range(ATTEMPTS):
        area = chance.uniform(min_area, 1) * width * height
        aspect = math.exp(chance.uniform(math.log(aspects[0]), math.log(aspects[1])))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = chance.uniform(0, width - w), chance.uniform(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, aspects[0]), aspects[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2
