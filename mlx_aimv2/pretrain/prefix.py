"""Prefix attention: the first M patches are seen by all, the others only by those that follow them."""

from __future__ import annotations

from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

Lengths: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"


def draw_lengths(count: int, patches: int, chance: np.random.Generator) -> Lengths:
    """A prefix length for each image, uniform in 1 … I - 1: `(B,)`. Raises ValueError for images of one patch."""
    if patches < 2:
        raise ValueError(f"pre-training predicts patches from patches: an image needs two at least, it has {patches}")
    return chance.integers(1, patches, count, dtype=np.int32)


def prefix_mask(lengths: mx.array, patches: int) -> mx.array:
    """Which patch attends to which: prefix lengths `(B,) -> (B, I, I)` boolean, rows attend to columns."""
    position = mx.arange(patches)
    in_prefix = position[None, None, :] < lengths[:, None, None]  # (B, 1, I)
    before = position[None, :] <= position[:, None]  # (I, I)
    return in_prefix | before[None]
