"""Counts which class was called which, and scores by these counts: accuracy, recall, intersection over union."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = 255
"""The value of pixels in a mask that nobody labelled; they count nowhere."""


def confusion(labels: NDArray[Any], found: NDArray[Any], classes: int) -> NDArray[Any]:
    """How often each class (row) was called each class (column): two `(n,)` of numbers -> `(classes, classes)`."""
    pairs = labels.astype(np.int64) * classes + found
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def pixel_confusion(maps: Iterable[tuple[NDArray[Any], NDArray[Any]]], classes: int) -> NDArray[Any]:
    """`confusion` of the pixels of all pairs of ground truth and prediction, each `(H, W)`, without `IGNORED` ones."""
    counts = np.zeros((classes, classes), np.int64)
    for labels, found in maps:
        known = labels != IGNORED
        counts += confusion(labels[known], found[known], classes)
    return counts


def iou_by_class(counts: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of each class, `(classes, classes) -> (classes,)`; NaN where a class is nowhere."""
    both = np.diag(counts).astype(np.float64)
    either = counts.sum(axis=0) + counts.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def mean_iou(counts: NDArray[Any]) -> float:
    """The mean over classes that occur in the ground truth or in a prediction, as in PASCAL VOC; 0 without pixels."""
    return float(np.nanmean(iou_by_class(counts))) if counts.any() else 0.0


def accuracy(counts: NDArray[Any]) -> float:
    """The share that was called what it is, from 0 to 1."""
    return float(np.diag(counts).sum() / max(counts.sum(), 1))


def mean_recall(counts: NDArray[Any]) -> float:
    """The mean over the classes there are of the share of each that was found, from 0 to 1."""
    there = counts.sum(axis=1)
    return float((np.diag(counts)[there > 0] / there[there > 0]).mean())
