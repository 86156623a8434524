"""What a classification says of images: probabilities, scores, and what is shown of them."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2 import plot
from mlx_aimv2.images import to_rgb
from mlx_aimv2.learn.samples import Sample, Scored
from mlx_aimv2.train.batches import Arrays

SHOWN, MISTAKES = 5, 12
"""Labels that a prediction tells, and images on the model card that were called what they are not."""

FORMULA = re.compile(r"[=@\t\r]|[+-](?!\d*\.?\d+$)")
"""How cells begin that spreadsheets compute, numbers aside; an apostrophe keeps them texts (OWASP, CSV injection)."""


@dataclass(frozen=True)
class Classification:
    """How probable each class is, (classes,), all together 1."""

    probabilities: NDArray[Any]

    def best(self, count: int = SHOWN) -> list[int]:
        """The most probable classes, best first."""
        return [int(i) for i in np.argsort(-self.probabilities, kind="stable")[:count]]


def decode(outputs: Arrays, size: tuple[int, int]) -> Classification:
    """The softmax of one image's logits."""
    logits = outputs["logits"].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return Classification(weights / weights.sum())


def score(samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str]) -> Scored:
    """`top1` and, from six classes on, `top5`, each from 0 to 1; `mean_class` is the mean recall of the classes.

    Of each class: images, precision, recall and F1.
    """
    counts = _confusion(samples, predictions, classes)
    scores = {"top1": accuracy(counts)}
    if len(classes) > 5:
        pairs = zip(samples, predictions, strict=True)
        scores["top5"] = float(np.mean([sample.target in prediction.best(5) for sample, prediction in pairs]))
    scores["mean_class"] = mean_recall(counts)
    rows = [["class", "images", "precision", "recall", "F1"]]
    for i, name in enumerate(classes):
        right, called, there = counts[i, i], counts[:, i].sum(), counts[i].sum()
        shares = ((right, called), (right, there), (2 * right, called + there))
        cells = (f"{100 * part / whole:.1f} %" if whole else "none" for part, whole in shares)
        rows.append([name, f"{there}", *cells])
    return scores, rows


def confusion(labels: NDArray[Any], found: NDArray[Any], classes: int) -> NDArray[Any]:
    """How often each class (row) was called each class (column): two `(n,)` of numbers -> `(classes, classes)`."""
    pairs = labels.astype(np.int64) * classes + found
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def accuracy(counts: NDArray[Any]) -> float:
    """The share that was called what it is, from 0 to 1."""
    return float(np.diag(counts).sum() / max(counts.sum(), 1))


def mean_recall(counts: NDArray[Any]) -> float:
    """The mean over the classes there are of the share of each that was found, from 0 to 1."""
    there = counts.sum(axis=1)
    return float((np.diag(counts)[there > 0] / there[there > 0]).mean())


def as_json(prediction: Classification, classes: Sequence[str]) -> dict[str, Any]:
    """`{"label": the most probable, "labels": [{"label", "probability"}, …]}`, best first."""
    best = prediction.best(len(classes))
    labels = [{"label": classes[i], "probability": float(prediction.probabilities[i])} for i in best]
    return {"label": classes[best[0]], "labels": labels}


def as_text(prediction: Classification, classes: Sequence[str]) -> str:
    """A line for each of the most probable labels."""
    return "\n".join(f"{100 * prediction.probabilities[i]:7.2f} %  {classes[i]}" for i in prediction.best())


def save_prediction(path: str, prediction: Classification, classes: Sequence[str], stem: Path) -> list[str]:
    """A label is nothing to see, so no file: `[path, best label, its probability]`."""
    best = prediction.best(1)[0]
    return [path, classes[best], f"{prediction.probabilities[best]:.6f}"]


def save_all(records: Sequence[list[str]], classes: Sequence[str], folder: Path) -> None:
    """`predictions.csv`: the best label and its probability for each image."""
    rows = ([f"'{cell}" if FORMULA.match(cell) else cell for cell in record] for record in records)
    with (folder / "predictions.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        csv.writer(stream).writerows([["path", "label", "probability"], *rows])


def card(
    samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """`confusion.png` and, if there are any, `mistakes.png`."""
    plot.confusion_image(_confusion(samples, predictions, classes), classes).save(folder / "confusion.png")
    images = [("Confusion matrix", "confusion.png")]
    pairs = zip(samples, predictions, strict=True)
    mistakes = [(sample, found.best(1)[0], found) for sample, found in pairs if found.best(1)[0] != sample.target]
    mistakes.sort(key=lambda mistake: -mistake[2].probabilities[mistake[1]])
    shown = [
        (to_rgb(sample.path), f"{classes[sample.target][:9]}, not {classes[label][:9]}")
        for sample, label, _ in mistakes[:MISTAKES]
    ]
    if shown:
        rows = [shown[start : start + 6] for start in range(0, len(shown), 6)]
        sheet = plot.contact_sheet(
            [[image for image, _ in row] for row in rows],
            captions=[[caption for _, caption in row] for row in rows],
            side=128,
            gap=14,
        )
        sheet.save(folder / "mistakes.png")
        images.append(("Worst mistakes", "mistakes.png"))
    return images


def _confusion(
    samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str]
) -> NDArray[Any]:
    labels = np.array([sample.target for sample in samples], np.int64)
    return confusion(labels, np.array([found.best(1)[0] for found in predictions], np.int64), len(classes))
