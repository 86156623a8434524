"""The detection head: a simple feature pyramid on the last patch map, and FCOS's branches on each of its levels.

ViTDet's pyramid (arXiv 2203.16527) makes maps of several strides from one; FCOS (arXiv 1904.01355) gives each position
class scores, the distances to the four sides of its object, and how near the object's centre it is.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.learn.detect import fcos
from mlx_aimv2.learn.detect.fcos import LEVELS, points
from mlx_aimv2.learn.upsample import Double, Refine, as_map, halve

WIDTH = 256
"""Channels of the pyramid, or half the encoder's width where that is less."""

DEPTH = 2
"""Convolutions of each branch; FCOS has four."""

PRIOR = 0.01
"""Score that each position starts with (arXiv 1708.02002): most of them see no object."""


class Branch(nn.Module):
    """Convolutions shared by all levels: `(B, h, w, C) -> (B, h, w, C)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = [Refine(channels) for _ in range(DEPTH)]
        self.norm = nn.LayerNorm(channels)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class DetectHead(nn.Module):
    """`(B, N, D), grid -> {"classes": (B, P, K), "distances": (B, P, 4), "centre": (B, P), "points": (B, P, 3)}`.

    P positions of all levels in the order of `fcos.points`; class scores and centre-ness before the sigmoid, distances
    in pixels, points as x, y and stride in pixels; `canvas` (B, 2) is the height and width that the grid covers.
    """

    def __init__(self, width: int, classes: int, patch_size: int, *, channels: int | None = None) -> None:
        super().__init__()
        self.patch_size = patch_size
        channels = channels or min(WIDTH, max(1, width // 2))
        self.double = Double(width, channels)
        self.same = nn.Linear(width, channels)
        self.half = nn.Linear(width, channels)
        self.norms = [nn.LayerNorm(channels) for _ in LEVELS]
        self.smooth = [nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in LEVELS]
        self.class_branch, self.box_branch = Branch(channels), Branch(channels)
        self.classes = nn.Linear(channels, classes)
        self.classes.bias = mx.full((classes,), -math.log((1 - PRIOR) / PRIOR))
        self.distances = nn.Linear(channels, 4)
        self.centre = nn.Linear(channels, 1)
        self.scales = mx.ones(len(LEVELS))

    def __call__(self, tokens: mx.array, grid: tuple[int, int]) -> dict[str, mx.array]:
        maps = self.pyramid(as_map(tokens, grid))
        classes, distances, centre = [], [], []
        for level, x in enumerate(maps):
            by_class, by_box = self.class_branch(x), self.box_branch(x)
            stride = LEVELS[level] * self.patch_size
            classes.append(self.classes(by_class).flatten(1, 2))
            # exp, as in FCOS, of numbers near zero: objects start some strides large.
            sides = mx.exp(mx.clip(self.scales[level] * self.distances(by_box), -6, 6)) * (2 * stride)
            distances.append(sides.flatten(1, 2))
            centre.append(self.centre(by_box).flatten(1, 3))
        batch = tokens.shape[0]
        where = mx.array(points(grid, self.patch_size))
        canvas = mx.array([grid[0] * self.patch_size, grid[1] * self.patch_size], mx.float32)
        return {
            "classes": mx.concatenate(classes, axis=1),
            "distances": mx.concatenate(distances, axis=1),
            "centre": mx.concatenate(centre, axis=1),
            "points": mx.broadcast_to(where, (batch, *where.shape)),
            "canvas": mx.broadcast_to(canvas, (batch, 2)),
        }

    def pyramid(self, x: mx.array) -> list[mx.array]:
        """Maps of half, one, two and four patches a position: `(B, h, w, D) -> four (B, h', w', C)`."""
        half = halve(x)
        maps = [self.double(x), self.same(x), self.half(half), self.half(halve(half))]
        return [smooth(norm(level)) for level, norm, smooth in zip(maps, self.norms, self.smooth, strict=True)]


def make_head(
    kind: str, *, classes: int, width: int, heads: int, patch_size: int, options: dict[str, Any]
) -> nn.Module:
    """The pyramid with FCOS's branches, for every type."""
    return DetectHead(width, classes, patch_size)


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """FCOS's loss of each image, `-> (B,)`."""
    return fcos.loss(outputs, targets["label"], targets["distances"])
