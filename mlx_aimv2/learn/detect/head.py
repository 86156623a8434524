"""The detection head: a simple feature pyramid on the last patch map, FCOS's branches on each of its levels, the loss.

ViTDet's pyramid (arXiv 2203.16527) makes maps of several strides from one; FCOS (arXiv 1904.01355) gives each position
class scores, the distances to the four sides of its object, and how near the object's centre it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.learn.dense import Double, Refine, halve
from mlx_aimv2.learn.detect.boxes_average_precision import areas

WIDTH, DEPTH = 256, 2
"""Channels of the pyramid, or half the encoder's width where that is less; convolutions of a branch: FCOS has four."""

PRIOR = 0.01
"""Score that each position starts with (arXiv 1708.02002): most of them see no object."""

LEVELS = (0.5, 1.0, 2.0, 4.0)
"""Patches from one position to the next, level by level: 7, 14, 28 and 56 pixels, as FCOS's levels P3 to P6."""

REACH, RADIUS = 8.0, 1.5
"""Strides from a position to the farthest side of its object, of which larger ones belong to the next level; and
around an object's centre those within which positions answer for it (centre sampling)."""

MIN_WEIGHT = 0.1
"""Of a box in its loss, however far its position is from the centre: for boxes too small to hold any position."""

NOTHING, UNDECIDED = -1, -2
"""Class of a position that sees no object, and of one that lies in a crowd and is left alone."""

ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (arXiv 1708.02002)."""

TINY = 1e-9


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

    P positions of all levels in the order of `points`; class scores and centre-ness before the sigmoid, distances
    in pixels, points as x, y and stride in pixels; `canvas` (B, 2) is the height and width that the grid covers.
    """

    def __init__(self, width: int, classes: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        channels = min(WIDTH, max(1, width // 2))
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
        classes, distances, centre = [], [], []
        for scale, x in zip(self.scales, self.pyramid(mx.unflatten(tokens, 1, grid)), strict=True):
            by_class, by_box = self.class_branch(x), self.box_branch(x)
            classes.append(self.classes(by_class).flatten(1, 2))
            distances.append((scale * self.distances(by_box)).flatten(1, 2))
            centre.append(self.centre(by_box).flatten(1, 3))
        batch = tokens.shape[0]
        where = mx.array(points(grid, self.patch_size))
        canvas = mx.array(grid, mx.float32) * self.patch_size
        # exp, as in FCOS, of numbers near zero: objects start some strides large.
        sides = mx.exp(mx.clip(mx.concatenate(distances, axis=1), -6, 6))
        return {
            "classes": mx.concatenate(classes, axis=1),
            "distances": sides * (2 * where[:, 2:]).astype(sides.dtype),
            "centre": mx.concatenate(centre, axis=1),
            "points": mx.broadcast_to(where, (batch, *where.shape)),
            "canvas": mx.broadcast_to(canvas, (batch, 2)),
        }

    def pyramid(self, x: mx.array) -> list[mx.array]:
        """Maps of half, one, two and four patches a position: `(B, h, w, D) -> four (B, h', w', C)`."""
        half = halve(x)
        maps = [self.double(x), self.same(x), self.half(half), self.half(halve(half))]
        return [smooth(norm(level)) for level, norm, smooth in zip(maps, self.norms, self.smooth, strict=True)]


def make_head(kind: str, config: Aimv2VisionConfig, classes: int, options: Mapping[str, Any]) -> nn.Module:
    """The pyramid with FCOS's branches, for every type."""
    return DetectHead(config.hidden_size, classes, config.patch_size)


def points(grid: tuple[int, int], patch_size: int) -> NDArray[Any]:
    """Centres of all positions, level by level, row by row: `-> (P, 3)` float32 of x, y and stride in pixels."""
    levels = []
    rows, columns = 2 * grid[0], 2 * grid[1]
    for level in LEVELS:
        stride = level * patch_size
        row, column = np.divmod(np.arange(rows * columns), columns)
        levels.append(np.stack([(column + 0.5) * stride, (row + 0.5) * stride, np.full(row.shape, stride)], axis=1))
        rows, columns = -(-rows // 2), -(-columns // 2)
    return np.concatenate(levels).astype(np.float32)


def assign(
    points: NDArray[Any], boxes: NDArray[Any], labels: NDArray[Any], crowd: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What each position should say: `(P, 3), (n, 4), (n,), (n,) -> class (P,) int32, distances (P, 4) float32`.

    A position answers for an object in whose box it lies, near the centre, and whose farthest side fits its level; of
    several such objects for the smallest. A box too small to hold any position gets the nearest one of the finest
    level. Distances are zero where the class is `NOTHING` or `UNDECIDED`.
    """
    wanted = np.full(len(points), NOTHING, np.int32)
    distances = np.zeros((len(points), 4), np.float32)
    if len(boxes) == 0:
        return wanted, distances
    boxes = np.asarray(boxes, np.float64)
    x, y, stride = (points[:, i, None].astype(np.float64) for i in range(3))
    sides = np.stack([x - boxes[:, 0], y - boxes[:, 1], boxes[:, 2] - x, boxes[:, 3] - y], axis=2)  # (P, n, 4)
    inside = sides.min(axis=2) > 0
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = np.maximum(np.abs(x - centre[:, 0]), np.abs(y - centre[:, 1])) < RADIUS * stride
    farthest = sides.max(axis=2)
    first, last = stride == stride.min(), stride == stride.max()
    fits = (first | (farthest > REACH / 2 * stride)) & (last | (farthest <= REACH * stride))
    possible = inside & near & fits & ~crowd
    lost = np.flatnonzero(~possible.any(axis=0) & ~crowd)
    for box in lost:
        possible[_nearest(points, boxes[box], inside[:, box], fits[:, box]), box] = True
    size = np.where(possible, areas(boxes), np.inf)
    best = size.argmin(axis=1)
    answers = np.isfinite(size.min(axis=1))
    wanted[(inside & crowd).any(axis=1)] = UNDECIDED
    wanted[answers] = labels[best[answers]]
    distances[answers] = np.maximum(sides[answers, best[answers]], 0)
    return wanted, distances


def _nearest(points: NDArray[Any], box: NDArray[Any], inside: NDArray[Any], fits: NDArray[Any]) -> int:
    """The position that answers for a box that none fits: the one nearest to its centre, of its level if it can be."""
    away = np.hypot(points[:, 0] - (box[0] + box[2]) / 2, points[:, 1] - (box[1] + box[3]) / 2)
    finest = points[:, 2] == points[:, 2].min()
    among = next((found for found in (inside & fits, inside, finest) if found.any()), finest)
    return int(np.where(among, away, np.inf).argmin())


def focal(logits: mx.array, labels: mx.array) -> mx.array:
    """Focal loss of every position, summed over classes: `(..., K), (...) -> (...)`; `NOTHING` has no class."""
    wanted = labels[..., None] == mx.arange(logits.shape[-1])
    signed = mx.where(wanted, logits, -logits)
    # -log(p) and 1 - p of the probability that the right answer has.
    cost = mx.logaddexp(mx.zeros_like(signed), -signed)
    weight = mx.where(wanted, ALPHA, 1 - ALPHA) * mx.sigmoid(-signed) ** GAMMA
    return (weight * cost).sum(axis=-1)


def centreness(distances: mx.array) -> mx.array:
    """How near positions are to the centre of their object, `(..., 4) -> (...)`: 1 in the centre, 0 at a side."""
    first, second = distances[..., :2], distances[..., 2:]
    ratios = mx.minimum(first, second) / mx.maximum(mx.maximum(first, second), 1e-6)
    return mx.sqrt(ratios[..., 0] * ratios[..., 1])


def giou_of_distances(first: mx.array, second: mx.array) -> mx.array:
    """Generalised intersection over union of boxes around one point, two `(..., 4)` of distances -> `(...)`.

    From -1 (far apart) to 1 (equal): IoU - (hull - union) / hull (arXiv 1902.09630). Both boxes hold the point, so
    they always overlap and sums of the smaller and of the larger distances give intersection and hull.
    """
    shared, hull = (_area(pick(first, second)) for pick in (mx.minimum, mx.maximum))
    union = _area(first) + _area(second) - shared
    return shared / mx.maximum(union, TINY) - (hull - union) / mx.maximum(hull, TINY)


def _area(distances: mx.array) -> mx.array:
    return (distances[..., 0] + distances[..., 2]) * (distances[..., 1] + distances[..., 3])


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Focal loss + GIoU loss + cross-entropy of centre-ness, for each image: `label (B, P), distances … -> (B,)`.

    Each is divided by the positions of that image that answer for an object, the GIoU loss by their centre-ness.
    """
    classes, distances = targets["label"], targets["distances"]
    logits, found, centre = (outputs[name].astype(mx.float32) for name in ("classes", "distances", "centre"))
    answers = (classes >= 0).astype(mx.float32)
    count = mx.maximum(answers.sum(axis=1), 1)
    by_class = (focal(logits, classes) * (classes != UNDECIDED)).sum(axis=1) / count
    wanted = centreness(distances) * answers
    # Where there is no object, boxes are compared with themselves: a square root or quotient of zeros has no gradient.
    weight = mx.maximum(wanted, MIN_WEIGHT) * answers
    target = mx.where(answers[..., None] > 0, distances, mx.stop_gradient(found))
    by_box = ((1 - giou_of_distances(found, target)) * weight).sum(axis=1) / mx.maximum(weight.sum(axis=1), MIN_WEIGHT)
    cross = mx.logaddexp(mx.zeros_like(centre), centre) - wanted * centre
    by_centre = (cross * answers).sum(axis=1) / count
    return by_class + by_box + by_centre
