"""COCO's average precision, as pycocotools counts it.

Per class and image, detections are matched to the ground truth from the highest score down, at ten overlaps from 0.50
to 0.95; the precision at 101 recalls, over all images, is averaged (cocodataset.org/#detection-eval, cocoeval.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.learn.detect.boxes import Detections, GroundTruth, areas, overlaps

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_BOXES = 100
"""Boxes of one class in one image that count: those with the highest scores."""

RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Areas in pixels by which COCO sorts objects; both ends belong to the range."""


def summary(
    truths: Sequence[GroundTruth], found: Sequence[Detections], classes: int
) -> tuple[dict[str, float], NDArray[Any]]:
    """COCO's six average precisions, one truth and one result per image; each from 0 to 1, NaN where no object is.

    And precision averaged over recalls, by class and overlap, `(classes, 10)`; NaN where a class has no object.
    `AP` is the mean over ten overlaps, `AP50` and `AP75` are at one, `AP_small` (up to 32 x 32 pixels), `AP_medium` and
    `AP_large` (from 96 x 96) at all ten.
    """
    tables = {
        size: np.stack([_of_class(truths, found, label, limits) for label in range(classes)])
        for size, limits in RANGES.items()
    }
    whole = tables.pop("all")
    parts = {"AP": whole, "AP50": whole[:, 0], "AP75": whole[:, 5]}
    parts |= {f"AP_{size}": table for size, table in tables.items()}
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
    # The best precision at this recall or a higher one.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    means = np.zeros(len(THRESHOLDS))
    for row, recall in enumerate(correct / objects):
        at = np.searchsorted(recall, RECALLS, side="left")
        means[row] = precision[row, at[at < len(recall)]].sum() / len(RECALLS)
    return means


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
