"""Boxes as four numbers: overlap, generalised overlap, and suppression of doubles.

A box is `left, top, right, bottom` in pixels; its area is (right - left) * (bottom - top).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

TINY = 1e-9


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
        doubles = np.triu(overlaps(boxes[order[mine]], boxes[order[mine]]) > threshold, 1)
        for row, place in enumerate(mine):
            if keep[place]:
                keep[mine[doubles[row]]] = False
    result: NDArray[Any] = order[keep]
    return result


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
