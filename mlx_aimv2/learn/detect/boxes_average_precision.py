"""Boxes as four numbers: ground truth and detections, overlap, suppression of duplicates, COCO's average precision.

A box is `left, top, right, bottom` in pixels; its area is (right - left) * (bottom - top).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_BOXES = 100
"""Boxes of one class in one image that count: those with the highest scores."""

RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Areas in pixels by which COCO sorts objects; both ends belong to the range."""


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
    """What was found in an image of `size` (height, width): boxes (n, 4), class numbers (n,), scores (n,).

    `classes` are the names of the classes, in what `predict` gives.
    """

    boxes: NDArray[Any]
    labels: NDArray[Any]
    scores: NDArray[Any]
    size: tuple[int, int]
    classes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The class of each box by name."""
        return [self.classes[label] for label in self.labels]


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


def summary(
    truths: Sequence[GroundTruth], found: Sequence[Detections], classes: int
) -> tuple[dict[str, float], NDArray[Any]]:
    """COCO's six average precisions, one truth and one result per image; each from 0 to 1, NaN where no object is.

    Per class and image, detections are matched to the ground truth from the highest score down, at ten overlaps from
    0.50 to 0.95; the precision at 101 recalls, over all images, is averaged (cocodataset.org/#detection-eval,
    cocoeval.py). And precision averaged over recalls, by class and overlap, `(classes, 10)`; NaN without objects.
    `ap` is the mean over ten overlaps, `ap50` and `ap75` are at one, `ap_small` (up to 32 x 32 pixels), `ap_medium` and
    `ap_large` (from 96 x 96) at all ten.
    """
    tables = {
        size: np.stack([_of_class(truths, found, label, limits) for label in range(classes)])
        for size, limits in RANGES.items()
    }
    whole = tables.pop("all")
    parts = {"ap": whole, "ap50": whole[:, 0], "ap75": whole[:, 5]}
    parts |= {f"ap_{size}": table for size, table in tables.items()}
    known = {name: part[~np.isnan(part)] for name, part in parts.items()}
    return {name: float(part.mean()) if len(part) else math.nan for name, part in known.items()}, whole


def _of_class(
    truths: Sequence[GroundTruth], found: Sequence[Detections], label: int, limits: tuple[float, float]
) -> NDArray[Any]:
    parts = [
        _match(truth, result, label, limits)
        for truth, result in zip(truths, found, strict=True)
        if label in truth.labels or label in result.labels
    ]
    objects = sum(part[3] for part in parts)
    if objects == 0:
        return np.full(len(THRESHOLDS), np.nan)
    scores = np.concatenate([part[0] for part in parts])
    order = np.argsort(-scores, kind="mergesort")
    matched, ignored = (np.concatenate([part[i] for part in parts], axis=1)[:, order] for i in (1, 2))
    correct = np.cumsum(matched & ~ignored, axis=1).astype(np.float64)
    errors = np.cumsum(~matched & ~ignored, axis=1).astype(np.float64)
    precision = correct / (correct + errors + np.spacing(1))
    # The best precision at this recall or a higher one, zero beyond the last.
    precision = np.pad(np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1], [(0, 0), (0, 1)])
    at = [np.searchsorted(recall, RECALLS, side="left") for recall in correct / objects]
    return np.take_along_axis(precision, np.stack(at), axis=1).mean(axis=1)


def _match(
    truth: GroundTruth, found: Detections, label: int, limits: tuple[float, float]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]:
    """One class in one image: scores (n,), matched (10, n), not to be counted (10, n), objects that count."""
    predicted, labelled = found.labels == label, truth.labels == label
    order = np.argsort(-found.scores[predicted], kind="mergesort")[:MAX_BOXES]
    boxes, scores = found.boxes[predicted][order], found.scores[predicted][order]
    crowd, area = truth.crowd[labelled], truth.area[labelled]
    skipped = crowd | (area < limits[0]) | (area > limits[1])
    shared = overlaps(boxes, truth.boxes[labelled], crowd=crowd)
    matched, ignored = (np.zeros((len(THRESHOLDS), len(boxes)), bool) for _ in range(2))
    free = np.ones((len(THRESHOLDS), len(crowd)), bool)
    for column, overlap in enumerate(shared if len(crowd) else ()):
        # Objects that count come before all others; of equal overlaps the last one wins, as in pycocotools.
        best = np.lexsort((overlap, ~skipped))[::-1]
        near = (free | crowd) & (overlap >= np.minimum(THRESHOLDS, 1 - 1e-10)[:, None])  # (10, m)
        rows = np.flatnonzero(near.any(axis=1))
        taken = best[near[rows][:, best].argmax(axis=1)]
        free[rows, taken] = False
        matched[rows, column], ignored[rows, column] = True, skipped[taken]
    area = areas(np.asarray(boxes, np.float64))
    ignored |= ~matched & ((area < limits[0]) | (area > limits[1]))
    return scores, matched, ignored, int((~skipped).sum())
