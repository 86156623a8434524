"""Scores label maps: intersection over union of every class, their mean, and the share of pixels that are right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = 255
"""The value of pixels that nobody labelled; they count nowhere."""


def confusion(truth: NDArray[Any], predicted: NDArray[Any], classes: int) -> NDArray[Any]:
    """How many pixels of each class were given each class: two `(H, W)` of class numbers -> `(classes, classes)`.

    Rows are the truth, columns the prediction; pixels whose truth is `IGNORED` are left out.
    """
    known = truth != IGNORED
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def iou_by_class(counts: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of each class, `(classes, classes) -> (classes,)`; NaN where a class is nowhere."""
    both = np.diag(counts).astype(np.float64)
    either = counts.sum(axis=0) + counts.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def summary(maps: Iterable[tuple[NDArray[Any], NDArray[Any]]], classes: int) -> dict[str, float]:
    """Scores of pairs of truth and prediction, each `(H, W)`: mIoU and pixel accuracy, from 0 to 1.

    As in PASCAL VOC, pixels are counted over all images first; the mean is over classes that occur in the truth or in
    a prediction.
    """
    counts = total_confusion(maps, classes)
    found = iou_by_class(counts)
    pixels = counts.sum()
    return {
        "mIoU": float(np.nanmean(found)) if pixels else 0.0,
        "pixel_accuracy": float(np.diag(counts).sum() / max(pixels, 1)),
    }


def total_confusion(maps: Iterable[tuple[NDArray[Any], NDArray[Any]]], classes: int) -> NDArray[Any]:
    """`confusion` summed over pairs of truth and prediction."""
    counts = np.zeros((classes, classes), np.int64)
    for truth, predicted in maps:
        counts += confusion(truth, predicted, classes)
    return counts
