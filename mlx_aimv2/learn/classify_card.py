"""What a classifier's model card shows: precision by class, the confusion matrix, and the worst mistakes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2 import plot
from mlx_aimv2.images import to_rgb
from mlx_aimv2.learn import drawing

if TYPE_CHECKING:
    from PIL import Image

    from mlx_aimv2.learn.samples import Sample

CELL = 28
MAX_CLASSES = 40
"""Classes that the confusion matrix shows: the most confused ones."""

MISTAKES = 12

Array = NDArray[Any]


def confusion(labels: Array, found: Array, classes: int) -> Array:
    """How often each class (row) was called each class (column), `(n,), (n,) -> (classes, classes)`."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, found), 1)
    return counts


def table(samples: Sequence[Sample], predictions: Sequence[Any], classes: Sequence[str]) -> list[list[str]]:
    """Images, precision, recall and F1 of each class, the header first."""
    counts = confusion(*_labels(samples, predictions), len(classes))
    rows = [["class", "images", "precision", "recall", "F1"]]
    for i, name in enumerate(classes):
        right, called, there = counts[i, i], counts[:, i].sum(), counts[i].sum()
        rows.append([name, f"{there}", _share(right, called), _share(right, there), _share(2 * right, called + there)])
    return rows


def card(
    samples: Sequence[Sample], predictions: Sequence[Any], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """Writes `confusion.png` and, if there are any, `mistakes.png`."""
    labels, found = _labels(samples, predictions)
    confusion_image(confusion(labels, found, len(classes)), classes).save(folder / "confusion.png")
    images = [("Confusion matrix", "confusion.png")]
    wrong = np.flatnonzero(labels != found)
    if len(wrong):
        sure = np.array([predictions[int(i)].probabilities[found[i]] for i in wrong])
        worst = wrong[np.argsort(-sure, kind="stable")][:MISTAKES]
        mistakes_image([samples[int(i)] for i in worst], [predictions[int(i)] for i in worst], classes).save(
            folder / "mistakes.png"
        )
        images.append(("Worst mistakes", "mistakes.png"))
    return images


def confusion_image(counts: Array, classes: Sequence[str]) -> Image.Image:
    """The matrix as an image: rows are the labels, columns what was predicted, dark is often."""
    from PIL import Image, ImageDraw

    shown = np.arange(len(classes))
    if len(classes) > MAX_CLASSES:
        mistaken = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
        shown = np.sort(np.argsort(-mistaken, kind="stable")[:MAX_CLASSES])
    counts = counts[np.ix_(shown, shown)]
    names = [name if len(name) <= 18 else f"{name[:17]}…" for name in (classes[int(i)] for i in shown)]
    font = drawing.font(13)
    left = round(max(font.getlength(name) for name in names)) + 34
    side = CELL * len(names)
    canvas = Image.new("RGB", (left + side + 12, left + side + 28), plot.PAPER)
    draw = ImageDraw.Draw(canvas)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for r, c in np.ndindex(counts.shape):
        x, y = left + c * CELL, left + r * CELL
        colour = (30, 110, 60) if r == c else (190, 40, 30)
        ink = tuple(round(255 + (part - 255) * float(shares[r, c]) ** 0.5) for part in colour)
        draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=ink, outline=(225, 225, 225))
        if counts[r, c]:
            text = plot.INK if shares[r, c] < 0.4 else plot.PAPER
            draw.text((x + CELL / 2, y + CELL / 2), f"{counts[r, c]}", text, drawing.font(11), anchor="mm")
    for i, name in enumerate(names):
        draw.text((left - 8, left + (i + 0.5) * CELL), name, plot.INK, font, anchor="rm")
        strip = Image.new("RGB", (left - 8, CELL), plot.PAPER)
        ImageDraw.Draw(strip).text((0, CELL / 2), name, plot.INK, font, anchor="lm")
        canvas.paste(strip.rotate(90, expand=True), (left + i * CELL, 0))
    words = "rows: the label, columns: what was predicted"
    draw.text((left + side, left + side + 6), words, drawing.FAINT, drawing.font(11), anchor="rt")
    return canvas


def mistakes_image(samples: Sequence[Sample], predictions: Sequence[Any], classes: Sequence[str]) -> Image.Image:
    """Images whose wrong label was the most probable, each with what it is and what it was called."""
    images = [to_rgb(sample.path) for sample in samples]
    captions = [
        f"{classes[sample.target][:9]}, not {classes[prediction.best(1)[0]][:9]}"
        for sample, prediction in zip(samples, predictions, strict=True)
    ]
    rows = [slice(start, start + 6) for start in range(0, len(images), 6)]
    return drawing.contact_sheet(
        [images[row] for row in rows], captions=[captions[row] for row in rows], side=128, gap=14
    )


def write_csv(predictions: Sequence[tuple[str, Any]], classes: Sequence[str], file: Path) -> None:
    """A line for each image: path, best label, its probability."""
    with file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "probability"])
        for path, prediction in predictions:
            best = prediction.best(1)[0]
            writer.writerow([path, classes[best], f"{prediction.probabilities[best]:.6f}"])


def _labels(samples: Sequence[Sample], predictions: Sequence[Any]) -> tuple[Array, Array]:
    labels = np.array([sample.target for sample in samples], np.int64)
    return labels, np.array([prediction.best(1)[0] for prediction in predictions], np.int64)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"
