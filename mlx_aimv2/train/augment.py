"""Random changes of training images: crop, flip, colours, and RandAugment's operations (Cubuk et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mlx_aimv2.train.settings import check, setting

Operation: TypeAlias = Callable[[Image.Image, float], Image.Image]

MAGNITUDE = 0.5
"""Of each operation's full strength, as 9 to 15 of RandAugment's 30 steps are for most models."""

ASPECT = (3 / 4, 4 / 3)
"""Width over height of a crop, as torchvision's RandomResizedCrop draws it."""

ATTEMPTS = 10

GREY = (124, 116, 104)
"""What comes in at the edge: the mean colour of photographs, nearly zero after normalisation."""


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image; the defaults are the paper's for pre-training.

    `flip` mirrors half of the images; `operations` is how many of RandAugment's are drawn for each image, each of them
    done with a `probability`, at a `strength` drawn by mean and deviation.
    """

    min_area: float = setting(0.4, "augmentation", "smallest random crop, as a share of the image", "from 0.01 to 1")
    flip: bool = setting(True, "augmentation", "do not mirror images: for data where left and right differ")
    jitter: float = setting(0.0, "augmentation", "change brightness, contrast, saturation by up to X", "from 0 to 1")
    grey: float = setting(0.0, "augmentation", "share of crops turned grey", "from 0 to 1")
    operations: int = 0
    probability: float = 1.0
    strength: tuple[float, float] = (MAGNITUDE, 0.0)

    def __post_init__(self) -> None:
        check(self)

    def __call__(
        self,
        image: Image.Image,
        size: tuple[int, int],
        rng: np.random.Generator,
        *,
        aspects: tuple[float, float] = ASPECT,
    ) -> Image.Image:
        """An RGB image of any size -> one of `size` (height, width), the same for the same state of `rng`."""
        box = random_crop(image.width, image.height, self.min_area, rng, aspects=aspects)
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if self.jitter:
            image = jittered(image, self.jitter, rng)
        if self.grey and rng.random() < self.grey:
            image = ImageOps.grayscale(image).convert("RGB")
        return rand_augment(image, self.operations, rng, probability=self.probability, strength=self.strength)


def random_crop(
    width: int, height: int, min_area: float, rng: np.random.Generator, *, aspects: tuple[float, float] = ASPECT
) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) of a crop of random area, shape and position.

    Where none fits in ten attempts, the largest centred one of the nearest shape.
    """
    for _ in range(ATTEMPTS):
        area = rng.uniform(min_area, 1) * width * height
        aspect = math.exp(rng.uniform(math.log(aspects[0]), math.log(aspects[1])))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, aspects[0]), aspects[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def jittered(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation changed by up to `amount` to either side of 1."""
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(float(rng.uniform(1 - amount, 1 + amount)))
    return image


def rand_augment(
    image: Image.Image,
    operations: int,
    rng: np.random.Generator,
    *,
    probability: float = 1.0,
    strength: tuple[float, float] = (MAGNITUDE, 0.0),
) -> Image.Image:
    """So many operations of the table, each done or not, its strength drawn by mean and deviation, to either side."""
    names, (mean, deviation) = list(TABLE), strength
    for number in rng.integers(0, len(names), operations):
        own = mean if deviation == 0 else float(np.clip(rng.normal(mean, deviation), 0, 1))
        if probability == 1 or rng.random() < probability:
            image = TABLE[names[number]](image, own * float(rng.choice((-1.0, 1.0))))
    return image


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """By Pillow's matrix, which says where each pixel of the result comes from."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


TABLE: dict[str, Operation] = {
    "identity": lambda image, s: image,
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "rotate": lambda image, s: image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=GREY),
    "solarize": lambda image, s: ImageOps.solarize(image, round(256 * (1 - abs(s)))),
    "posterize": lambda image, s: ImageOps.posterize(image, round(8 - 4 * abs(s))),
    "colour": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear x": lambda image, s: _affine(image, 1, 0.3 * s, -0.15 * s * image.height, 0, 1, 0),
    "shear y": lambda image, s: _affine(image, 1, 0, 0, 0.3 * s, 1, -0.15 * s * image.width),
    "translate x": lambda image, s: _affine(image, 1, 0, 0.45 * s * image.width, 0, 1, 0),
    "translate y": lambda image, s: _affine(image, 1, 0, 0, 0, 1, 0.45 * s * image.height),
}
"""Name of an operation -> function of an image and a strength from -1 to 1 (RandAugment's fourteen)."""
