"""Boxes as four numbers: the ground truth and the detections of an image, overlap, suppression of duplicates.

A box is `left, top, right, bottom` in pixels; its area is (right - left) * (bottom - top).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GroundTruth:
    """What is in an image: boxes (n, 4), class numbers (n,), whether each is a crowd (n,), areas (n,).

    `area` decides small, medium and large: COCO takes that of the object's outline.
    """

    boxes: NDArray[Any]
    labels: NDArray[Any]
    crowd: NDArray[Any]
    area: NDArray[Any]


@dataclass(frozen=True)
class Detections:
    """What was found in an image of `size` (height, width): boxes (n, 4), class numbers (n,), scores (n,)."""

    boxes: NDArray[Any]
    labels: NDArray[Any]
    scores: NDArray[Any]
    size: tuple[int, int]


def overlaps(first: NDArray[Any], second: NDArray[Any], *, crowd: NDArray[Any] | None = None) -> NDArray[Any]:
    """Intersection over union of every pair, `(n, 4), (m, 4) -> (n, m)` float64.

    Where `crowd` (m,) is true the second box covers many objects, and the intersection is divided by the first box's
    own area instead, as COCO does.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    own, other = areas(first)[:, None], areas(second)[None]
    union = own + other - shared
    if crowd is not None:
        union = np.where(crowd[None], own, union)
    result: NDArray[Any] = np.where(shared > 0, shared / np.where(union > 0, union, 1), 0.0)
    return result


def areas(boxes: NDArray[Any]) -> NDArray[Any]:
    """`(n, 4) -> (n,)`."""
    result: NDArray[Any] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return result


def suppress(
    boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any], *, threshold: float = 0.6
) -> NDArray[Any]:
    """Non-maximum suppression within each class: `(n, 4), (n,), (n,) -> (k,)` row numbers to keep, best first.

    A box goes where one of its class with a higher score (of equal ones the earlier) overlaps it by more than
    `threshold`.
    """
    order = np.argsort(-scores, kind="stable")
    keep = np.ones(len(order), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels[order] == label)
        duplicates = np.triu(overlaps(boxes[order[mine]], boxes[order[mine]]) > threshold, 1)
        for row, place in enumerate(mine):
            if keep[place]:
                keep[mine[duplicates[row]]] = False
    result: NDArray[Any] = order[keep]
    return result
