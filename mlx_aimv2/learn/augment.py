"""Random changes of training images in Pillow: crop, flip, and RandAugment's operations (Cubuk et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_aimv2.images import ImageInput, to_rgb

if TYPE_CHECKING:
    from PIL import Image

OPERATIONS = 2
"""Operations on each image, drawn anew."""

MAGNITUDE = 0.5
"""Of each operation's full strength, as 9 to 15 of RandAugment's 30 steps are for most models."""

CROP = (0.5, 1.0)
"""Share of the area that a random crop keeps: less than for pre-training, as small objects must not be cut off."""

RATIO = (3 / 4, 4 / 3)
"""Width to height of a random crop."""

GREY = (124, 116, 104)
"""What comes in at the edge: the mean colour of photographs, nearly zero after normalisation."""

Chance = np.random.Generator


def augmented(
    image: ImageInput, chance: Chance, *, size: tuple[int, int] | None = None, flip: bool = False
) -> Image.Image:
    """A random crop brought to `size` (height, width) and changed by two random operations.

    With `flip` half of the images are mirrored, which digits, words and labels like "left hand" do not bear. The same
    state of `chance` gives the same image.
    """
    changed = random_crop(to_rgb(image), chance, size=size)
    if flip and chance.random() < 0.5:
        changed = mirrored(changed)
    return rand_augment(changed, chance)


def random_crop(image: Image.Image, chance: Chance, *, size: tuple[int, int] | None) -> Image.Image:
    """A part of the image of random area, shape and place, resized to `size`, or as large as the image if None."""
    from PIL import Image

    area = image.width * image.height * chance.uniform(*CROP)
    ratio = np.exp(chance.uniform(*np.log(RATIO))) * image.width / image.height
    width = min(image.width, max(1, round((area * ratio) ** 0.5)))
    height = min(image.height, max(1, round((area / ratio) ** 0.5)))
    left = chance.uniform(0, image.width - width)
    top = chance.uniform(0, image.height - height)
    high, wide = size or (image.height, image.width)
    box = (left, top, left + width, top + height)
    return image.resize((wide, high), Image.Resampling.BICUBIC, box=box)


def mirrored(image: Image.Image) -> Image.Image:
    """Left and right swapped."""
    from PIL import ImageOps

    return ImageOps.mirror(image)


def rand_augment(image: Image.Image, chance: Chance) -> Image.Image:
    """`OPERATIONS` of the table, each as strong as `MAGNITUDE` says, to either side."""
    names = list(TABLE)
    for number in chance.integers(0, len(names), OPERATIONS):
        strength = MAGNITUDE * chance.choice((-1.0, 1.0))
        image = TABLE[names[number]](image, strength)
    return image


def _enhanced(name: str) -> Callable[[Any, float], Any]:
    def change(image: Image.Image, strength: float) -> Image.Image:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(1 + 0.9 * strength)

    return change


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable[[Any, float], Any]:
    """An operation by Pillow's matrix, which says where each pixel of the result comes from."""

    def change(image: Image.Image, strength: float) -> Image.Image:
        from PIL import Image

        data = matrix(strength, image.width, image.height)
        return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=GREY)

    return change


def _rotated(image: Image.Image, strength: float) -> Image.Image:
    from PIL import Image

    return image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=GREY)


def _posterized(image: Image.Image, strength: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.posterize(image, round(8 - 4 * abs(strength)))


def _solarized(image: Image.Image, strength: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, round(256 * (1 - abs(strength))))


def _autocontrast(image: Image.Image, strength: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalized(image: Image.Image, strength: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


TABLE: dict[str, Callable[[Any, float], Any]] = {
    "identity": lambda image, strength: image,
    "autocontrast": _autocontrast,
    "equalize": _equalized,
    "rotate": _rotated,
    "solarize": _solarized,
    "posterize": _posterized,
    "colour": _enhanced("Color"),
    "contrast": _enhanced("Contrast"),
    "brightness": _enhanced("Brightness"),
    "sharpness": _enhanced("Sharpness"),
    "shear x": _affine(lambda s, width, height: (1, 0.3 * s, -0.15 * s * height, 0, 1, 0)),
    "shear y": _affine(lambda s, width, height: (1, 0, 0, 0.3 * s, 1, -0.15 * s * width)),
    "translate x": _affine(lambda s, width, height: (1, 0, 0.45 * s * width, 0, 1, 0)),
    "translate y": _affine(lambda s, width, height: (1, 0, 0, 0, 1, 0.45 * s * height)),
}
"""Name of an operation -> function of an image and a strength from -1 to 1 (RandAugment's fourteen)."""
