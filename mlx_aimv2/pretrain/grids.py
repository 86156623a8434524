"""How many patches an image has: always as many, or for native encoders a number drawn for each batch.

The paper draws 2 ** n patches with n from a normal distribution cut to 7 … 12, and resizes images to that area in their
own shape. Here a batch has one shape, drawn with the number, and crops of that shape: so nothing is distorted and
nothing is filled up. Centre and deviation of n are not in the paper: here the middle, and 1.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.pretrain.augment import ASPECT

Grid: TypeAlias = tuple[int, int]
"""Rows and columns of patches."""

PATCHES = (1 << 7, 1 << 12)
"""The fewest and the most patches of an image."""


def grid_of(vision: Aimv2VisionConfig, chance: np.random.Generator, *, patches: tuple[int, int] = PATCHES) -> Grid:
    """The grid of a batch: that of the fixed size, or one drawn between the fewest and the most patches."""
    if vision.image_size is not None:
        side = vision.image_size // vision.patch_size
        return side, side
    low, high = (math.log2(count) for count in patches)
    n = math.inf
    while not low <= n <= high:
        n = chance.normal((low + high) / 2, 1)
    aspect = math.exp(chance.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    rows = max(1, round(math.sqrt(2**n / aspect)))
    return rows, max(2, int(2**n / rows))


def middle_grid(vision: Aimv2VisionConfig, *, patches: tuple[int, int] = PATCHES) -> Grid:
    """The grid for validation: that of the fixed size, or a square in the middle of what is drawn."""
    if vision.image_size is not None:
        side = vision.image_size // vision.patch_size
        return side, side
    side = max(2, round((patches[0] * patches[1]) ** 0.25))
    return side, side
