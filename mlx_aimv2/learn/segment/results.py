"""What a segmentation says of images: a class for every pixel, scores, and what is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_aimv2 import plot
from mlx_aimv2.images import to_rgb
from mlx_aimv2.learn.classify.results import accuracy, confusion
from mlx_aimv2.learn.dense import linear_weights, worst
from mlx_aimv2.learn.samples import Sample, Scored
from mlx_aimv2.learn.segment.data import read_mask
from mlx_aimv2.plot import IGNORED
from mlx_aimv2.train.batches import Arrays


@dataclass(frozen=True)
class Segmentation:
    """The class of every pixel, `labels` (H, W) uint8, and how sure it is, `confidence` (H, W) from 0 to 1.

    `classes` are the names of the classes, in what `predict` gives.
    """

    labels: NDArray[Any]
    confidence: NDArray[Any]
    classes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The classes there are, by name."""
        return [self.classes[label] for label in np.unique(self.labels)]


def decode(outputs: Arrays, size: tuple[int, int]) -> Segmentation:
    """One image's logits (h, w, K) at its own size, by linear interpolation of the probabilities."""
    probabilities = mx.softmax(mx.array(outputs["logits"]).astype(mx.float32), axis=-1)
    high, wide = probabilities.shape[:2]
    labels, confidence = (np.empty(size, kind) for kind in (np.uint8, np.float32))
    across = mx.array(linear_weights(wide, size[1]))
    down = mx.array(linear_weights(high, size[0]))
    # A few rows at a time: 150 classes of a photograph's 12 million pixels would be 7 GB.
    narrow = across @ probabilities  # (h, W, K)
    step = max(1, (1 << 24) // (size[1] * probabilities.shape[-1]))
    for row in range(0, size[0], step):
        part = mx.tensordot(down[row : row + step], narrow, axes=1)  # (step, W, K)
        labels[row : row + step] = np.array(part.argmax(axis=-1))
        confidence[row : row + step] = np.array(part.max(axis=-1))
    return Segmentation(labels, confidence)


def score(samples: Sequence[Sample], predictions: Sequence[Segmentation], classes: Sequence[str]) -> Scored:
    """`miou` and `pixel_accuracy`, each from 0 to 1, at the size of the masks.

    Of each class: images that have it, its share of the labelled pixels, IoU.
    """
    counts, images = np.zeros((len(classes), len(classes)), np.int64), np.zeros(len(classes), int)
    for sample, prediction in zip(samples, predictions, strict=True):
        own = pixel_confusion(read_mask(sample.target), prediction.labels, len(classes))
        counts += own
        images += own.any(axis=1)
    ious, shares = iou_by_class(counts), counts.sum(axis=1) / max(counts.sum(), 1)
    rows = [
        [name, f"{images[i]:,}", f"{100 * shares[i]:.1f} %", "-" if np.isnan(ious[i]) else f"{ious[i]:.3f}"]
        for i, name in enumerate(classes)
    ]
    scores = {"miou": mean_iou(counts), "pixel_accuracy": accuracy(counts)}
    return scores, [["class", "images", "pixels", "IoU"], *rows]


def pixel_confusion(labels: NDArray[Any], found: NDArray[Any], classes: int) -> NDArray[Any]:
    """`confusion` of the pixels of a ground truth and a prediction, each `(H, W)`, without `IGNORED` ones."""
    known = labels != IGNORED
    return confusion(labels[known], found[known], classes)


def iou_by_class(counts: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of each class, `(classes, classes) -> (classes,)`; NaN where a class is nowhere."""
    both = np.diag(counts).astype(np.float64)
    either = counts.sum(axis=0) + counts.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def mean_iou(counts: NDArray[Any]) -> float:
    """The mean over classes that occur in the ground truth or in a prediction, as in PASCAL VOC; 0 without pixels."""
    return float(np.nanmean(iou_by_class(counts))) if counts.any() else 0.0


def as_json(prediction: Segmentation, classes: Sequence[str]) -> dict[str, Any]:
    """The classes there are, the largest first, with their share of the pixels and their mean confidence."""
    (height, width), flat = prediction.labels.shape, prediction.labels.ravel()
    pixels = np.bincount(flat, minlength=len(classes))
    sure = np.bincount(flat, weights=prediction.confidence.ravel(), minlength=len(classes))
    found = [
        {"label": classes[i], "share": float(pixels[i] / flat.size), "confidence": float(sure[i] / pixels[i])}
        for i in np.argsort(-pixels, kind="stable")
        if pixels[i]
    ]
    return {"height": height, "width": width, "classes": found}


def as_text(prediction: Segmentation, classes: Sequence[str]) -> str:
    """A line for each class there is, the largest first."""
    found = as_json(prediction, classes)["classes"]
    return "\n".join(f"{100 * one['share']:7.2f} %  {one['label']}" for one in found)


def save_prediction(path: str, prediction: Segmentation, classes: Sequence[str], stem: Path) -> None:
    """`STEM-mask.png`, a palette PNG whose values are the classes, and `STEM-overlay.jpg`."""
    plot.palette_image(prediction.labels).save(f"{stem}-mask.png")
    plot.with_mask(to_rgb(path), prediction.labels, classes).save(f"{stem}-overlay.jpg", quality=92)


def save_all(records: Sequence[None], classes: Sequence[str], folder: Path) -> None:
    """`classes.txt`: the class of each value of the masks, one a line."""
    (folder / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")


def card(
    samples: Sequence[Sample], predictions: Sequence[Segmentation], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """`overlays.jpg`: images with the ground truth above and the prediction below, the worst first."""

    def quality(sample: Sample, prediction: Segmentation) -> float:
        return accuracy(pixel_confusion(read_mask(sample.target), prediction.labels, len(classes)))

    def draw(image: Image.Image, sample: Sample, prediction: Segmentation) -> list[Image.Image]:
        masks = (read_mask(sample.target), prediction.labels)
        return [plot.with_mask(image, mask, classes) for mask in masks]

    worst(samples, predictions, quality, draw).save(folder / "overlays.jpg", quality=92)
    return [("The images with most wrong pixels: labelled above, predicted below", "overlays.jpg")]
