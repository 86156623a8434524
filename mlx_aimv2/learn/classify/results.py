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

SHOWN, MISTAKES, WIDE = 5, 12, 16
"""Labels that a prediction tells, images on the model card that were called what they are not, letters below one."""

BINS = 15
"""Of confidence, of equal width, over which the calibration error is summed (Guo et al. 2017)."""

NONE = "none of these"
"""What is said of an image to which no label is probable enough."""

FORMULA = re.compile(r"[=@\t\r]|[+-](?!\d*\.?\d+$)")
"""How cells begin that spreadsheets compute, numbers aside; an apostrophe keeps them texts (OWASP, CSV injection)."""


@dataclass(frozen=True)
class Classification:
    """How probable each class is, (classes,), all together 1; below `min_score` none of them is told.

    `classes` are their names, in what `predict` gives.
    """

    probabilities: NDArray[Any]
    min_score: float = 0.0
    classes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name of the most probable class."""
        return NONE if self.is_none else self.classes[self.best(1)[0]]

    @property
    def labels(self) -> list[tuple[str, float]]:
        """The names of all classes and how probable they are, best first."""
        return [(self.classes[i], float(self.probabilities[i])) for i in self.best(len(self.classes))]

    @property
    def is_none(self) -> bool:
        """Whether no class is probable enough."""
        return bool(self.probabilities.max() < self.min_score)

    def best(self, count: int = SHOWN) -> list[int]:
        """The most probable classes, best first."""
        return [int(i) for i in np.argsort(-self.probabilities, kind="stable")[:count]]


def decode(outputs: Arrays, size: tuple[int, int]) -> Classification:
    """The softmax of one image's logits."""
    logits = outputs["logits"].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return Classification(weights / weights.sum())


def at_least(prediction: Classification, min_score: float) -> Classification:
    """The same where a class less probable than that is not told."""
    return Classification(prediction.probabilities, min_score)


def score(samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str]) -> Scored:
    """`top1` and, from six classes on, `top5`, each from 0 to 1; `mean_class` is the mean recall of the classes, `ece`
    the expected calibration error of the best label's probability.

    Of each class: images, precision, recall and F1.
    """
    counts = _confusion(samples, predictions, classes)
    scores = {"top1": accuracy(counts)}
    if len(classes) > 5:
        pairs = zip(samples, predictions, strict=True)
        scores["top5"] = float(np.mean([sample.target in prediction.best(5) for sample, prediction in pairs]))
    scores["mean_class"] = mean_recall(counts)
    best = [
        (found.probabilities.max(), found.best(1)[0] == sample.target)
        for sample, found in zip(samples, predictions, strict=True)
    ]
    scores["ece"] = calibration_error(*np.array(best, float).T)
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


def calibration_error(sure: NDArray[Any], right: NDArray[Any]) -> float:
    """How far probabilities are from the share that is right, on average: `(n,) from 0 to 1, (n,) -> from 0 to 1`."""
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, weights=sure - right)).sum() / len(sure))


def precision_recall(marks: NDArray[Any], scores: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Precision and recall from each score on, the highest first: `(n,) of bool, (n,) -> two (m,)`."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores come together
    right = marks[order].cumsum()[ends]
    return right / (ends + 1), right / marks.sum()


def average_precision(marks: NDArray[Any], scores: NDArray[Any]) -> float:
    """The mean of the precisions, each weighted by the recall that it adds; not interpolated, as scikit-learn's."""
    precision, recall = precision_recall(marks, scores)
    return float(np.diff(recall, prepend=0) @ precision)


def draw_precision_recall(
    marks: NDArray[Any], likely: NDArray[Any], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """Writes `precision_recall.png`, a curve for each class there is, the worst first: two `(n, classes)`."""
    there = sorted(
        np.flatnonzero(marks.any(axis=0)).tolist(), key=lambda i: average_precision(marks[:, i], likely[:, i])
    )
    lines = {classes[i]: precision_recall(marks[:, i], likely[:, i])[::-1] for i in there}
    plot.curves(lines, x="recall", y="precision", bounds=(0, 0, 1, 1)).save(folder / "precision_recall.png")
    return [("Precision and recall, by class", "precision_recall.png")]


def as_json(prediction: Classification, classes: Sequence[str]) -> dict[str, Any]:
    """`{"label": the most probable, "labels": [{"label", "probability"}, …]}`, best first."""
    best = prediction.best(len(classes))
    labels = [{"label": classes[i], "probability": float(prediction.probabilities[i])} for i in best]
    return {"label": NONE if prediction.is_none else classes[best[0]], "labels": labels}


def as_text(prediction: Classification, classes: Sequence[str]) -> str:
    """A line for each of the most probable labels."""
    lines = [f"{100 * prediction.probabilities[i]:7.2f} %  {classes[i]}" for i in prediction.best()]
    return "\n".join([*([NONE] if prediction.is_none else []), *lines])


def save_prediction(path: str, prediction: Classification, classes: Sequence[str], stem: Path) -> list[str]:
    """A label is nothing to see, so no file: `[path, best label, its probability]`."""
    best = prediction.best(1)[0]
    return [path, NONE if prediction.is_none else classes[best], f"{prediction.probabilities[best]:.6f}"]


def save_all(records: Sequence[list[str]], classes: Sequence[str], folder: Path) -> None:
    """`predictions.csv`: the best label and its probability for each image."""
    write_csv(folder, ["path", "label", "probability"], records)


def write_csv(folder: Path, header: Sequence[str], records: Sequence[Sequence[str]]) -> None:
    """Writes `predictions.csv`."""
    rows = ([f"'{cell}" if FORMULA.match(cell) else cell for cell in record] for record in [header, *records])
    with (folder / "predictions.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        csv.writer(stream).writerows(rows)


def card(
    samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """`confusion.png`, `precision_recall.png` and, if there are any, `mistakes.png`."""
    plot.confusion_image(_confusion(samples, predictions, classes), classes).save(folder / "confusion.png")
    marks = np.array([sample.target for sample in samples])[:, None] == np.arange(len(classes))
    likely = np.array([found.probabilities for found in predictions])
    images = [("Confusion matrix", "confusion.png"), *draw_precision_recall(marks, likely, classes, folder)]
    pairs = zip(samples, predictions, strict=True)
    mistakes = [(sample, found.best(1)[0], found) for sample, found in pairs if found.best(1)[0] != sample.target]
    mistakes.sort(key=lambda mistake: -mistake[2].probabilities[mistake[1]])
    shown = [(sample.path, f"{classes[sample.target]}\nnot {classes[label]}") for sample, label, _ in mistakes]
    return images + draw_mistakes(shown, folder)


def draw_mistakes(mistakes: Sequence[tuple[str, str]], folder: Path) -> list[tuple[str, str]]:
    """Writes `mistakes.png`, the first images of these paths with their captions of one or two lines, if there are."""
    shown = [
        (to_rgb(path), "\n".join(line if len(line) <= WIDE else f"{line[: WIDE - 1]}…" for line in caption.split("\n")))
        for path, caption in mistakes[:MISTAKES]
    ]
    if not shown:
        return []
    rows = [shown[start : start + 4] for start in range(0, len(shown), 4)]
    sheet = plot.contact_sheet(
        [[image for image, _ in row] for row in rows],
        captions=[[caption for _, caption in row] for row in rows],
        side=160,
        gap=20,
    )
    sheet.save(folder / "mistakes.png")
    return [("Worst mistakes", "mistakes.png")]


def _confusion(
    samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str]
) -> NDArray[Any]:
    labels = np.array([sample.target for sample in samples], np.int64)
    return confusion(labels, np.array([found.best(1)[0] for found in predictions], np.int64), len(classes))
