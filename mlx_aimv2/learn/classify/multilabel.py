"""Several labels an image, or none: a list of them in `metadata.jsonl`, or a column of 0 and 1 for each.

A label is a yes or no of its own: logistic regression one against the rest, a probability that is calibrated on `val`,
and a threshold for each label, the one of best F1 on `val`. The target of a sample has a 0 or 1 for each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.embed.cache import Array
from mlx_aimv2.images.find import Scan
from mlx_aimv2.learn import samples
from mlx_aimv2.learn.classify import data, head, results
from mlx_aimv2.learn.classify.linear import sigmoid, sigmoid_losses
from mlx_aimv2.learn.classify.results import NONE, average_precision, calibration_error
from mlx_aimv2.learn.samples import DataError, Dataset, Format, Found, Labels, Sample, Scored, Size, listed, same_form
from mlx_aimv2.learn.tables import LABEL, column
from mlx_aimv2.train.batches import Arrays

WANTED = (
    "metadata.jsonl with a list under labels in each row, or a metadata.csv with a column of 0 and 1 for each label"
)

RESAMPLES = 1000
"""Of the images, drawn with replacement, for the 95 % intervals of F1 (the percentile bootstrap; Efron 1979)."""


def recognise(data: Path) -> None:
    """Nothing: lists and columns may mean other things, so --task says it."""


def _marks(file: Path, rows: Sequence[data.Row], scan: Scan) -> list[tuple[Any, str]]:
    """The labels in each row, and all that there are columns for."""
    names = data.value_columns(rows)
    cells = {name: [str(row.get(name, "")).removesuffix(".0") for row in rows] for name in names}
    is_mark = {name: {*own} - {""} <= {"0", "1"} for name, own in cells.items()}
    labels = next((name for name in column(names, LABEL) if not is_mark[name]), None)
    if labels is None and not any(is_mark.values()):
        scan.faults.append(f"{file} has no labels in its columns ({listed(names)}): make a {WANTED}")
        return []
    if labels is not None:
        return [_listed(row.get(labels)) for row in rows]
    scan.note([name for name, is_one in is_mark.items() if not is_one], f"of {file} is no column of 0 and 1: not read")
    columns = {name: own for name, own in cells.items() if is_mark[name]}
    marks: list[tuple[Any, str]] = []
    for i in range(len(rows)):
        empty = [name for name, own in columns.items() if not own[i]]
        found = tuple(same_form(name) for name, own in columns.items() if own[i] == "1")
        marks.append(((found, tuple(columns)), f"has neither 0 nor 1 under {listed(empty)}" if empty else ""))
    return marks


def _listed(value: Any) -> tuple[Any, str]:
    """What a row says in a list, or in one text."""
    if value in (None, "") or value != value:
        return None, ""
    own = value if isinstance(value, list) else [value]
    fault = "" if all(isinstance(one, (str, int)) for one in own) else "has no list of texts as its labels"
    return (tuple(dict.fromkeys(same_form(str(one)) for one in own)), ()), fault


def _find(place: Path, sources: Any, scan: Scan) -> Found:
    found = data.find_in_tables(place, sources, scan, _marks, WANTED)
    columns = dict.fromkeys(name for pairs in found.parts.values() for _, (_, own) in pairs for name in own)
    return Found(found.parts, [same_form(name) for name in columns] or None)


def _labels(marked: Sequence[tuple[str, Any, Size]], scan: Scan) -> list[Labels]:
    return [Labels(names, None) for _, (names, _), _ in marked]


def _target(labels: Labels, numbers: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(name in labels.names) for name in numbers)


FORM = Format(partial(data.sources_of, of=None), _find, _labels, _target, min_classes=1)


def read(place: Path, **how: Any) -> Dataset:
    """As `samples.read`. DataError, too, where a label is on no image of `train` or `val`, or on all of `train`."""
    dataset = samples.read(place, FORM, **how)
    faults = []
    parts = {part: dataset.splits[part] for part in ("train", "val") if how.get("classes") is None}
    for part, own in parts.items():
        shares = np.mean([sample.target for sample in own], axis=0).tolist() if own else []
        for word, share in (("no", 0.0), ("every", 1.0 if part == "train" else None)):
            if names := [name for name, one in zip(dataset.classes, shares, strict=False) if one == share]:
                faults.append(f"{listed(names)} is on {word} image of {part}: add images, or take the label out")
    if faults:
        raise DataError(faults)
    return dataset


example, targets = data.example, data.targets
choose, solve, first_options = head.choose, head.solve, head.first_options
make_head = partial(head.make_head, labels="classes")


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Binary cross-entropy of each image, the mean over the classes, `(B, classes), (B, classes) -> (B,)`."""
    logits, wanted = outputs["logits"].astype(mx.float32), targets["label"].astype(mx.float32)
    return nn.losses.binary_cross_entropy(logits, wanted, reduction="none").mean(axis=1)


def calibrate(trained: Any, logits: Array, samples: Sequence[Sample]) -> None:
    """Gives a head the temperature of its probabilities, and to each class the threshold of best F1 on `val`.

    `logits` (n, classes) are the head's on the samples.
    """
    marks = np.array([sample.target for sample in samples])
    trained.scale = 1 / head.temperature(sigmoid_losses, logits, marks, at_random=0.5)
    likely = sigmoid(logits.astype(np.float64) * trained.scale)
    trained.thresholds = np.array([best_threshold(*pair) for pair in zip(marks.T, likely.T, strict=True)])


def best_threshold(marks: NDArray[Any], likely: NDArray[Any]) -> float:
    """Where F1 is best, halfway to the next probability below: `(n,) of 0 and 1, (n,) -> from 0 to 1`."""
    steps = np.unique(likely)[::-1]
    right = np.array([marks[likely >= step].sum() for step in steps])
    called = np.array([(likely >= step).sum() for step in steps])
    best = int((2 * right / (called + marks.sum())).argmax())
    return float((steps[best] + np.append(steps, 0.0)[best + 1]) / 2)


@dataclass(frozen=True)
class Tags:
    """How probable each label is, (classes,), each for itself, and from where on an image has it, (classes,).

    `classes` are their names, in what `predict` gives.
    """

    probabilities: NDArray[Any]
    thresholds: NDArray[Any]
    classes: tuple[str, ...] = ()

    @property
    def labels(self) -> list[tuple[str, float]]:
        """The names of the labels that the image has and how probable they are, best first."""
        return [(self.classes[i], float(self.probabilities[i])) for i in self.best()]

    def best(self) -> list[int]:
        """The labels that the image has, the most probable first."""
        order = np.argsort(-self.probabilities, kind="stable")
        return [int(i) for i in order if self.probabilities[i] >= self.thresholds[i]]


def decode(outputs: Arrays, size: tuple[int, int]) -> Tags:
    """The sigmoid of one image's logits; one half where no threshold was chosen yet."""
    likely = sigmoid(outputs["logits"].astype(np.float64))
    return Tags(likely, outputs.get("thresholds", np.full(likely.shape, 0.5)).astype(np.float64))


def at_least(prediction: Tags, min_score: float) -> Tags:
    """The same with one threshold for all labels."""
    return Tags(prediction.probabilities, np.full(prediction.thresholds.shape, min_score))


def score(samples: Sequence[Sample], predictions: Sequence[Tags], classes: Sequence[str]) -> Scored:
    """`map`, the mean average precision, and `f1`, both the mean over the labels that are on any image; `f1_micro`.

    All are scikit-learn's: `average_precision_score` and `f1_score`, "macro" and "micro". `ece` is the expected
    calibration error of all labels together. Of each label: images, AP, threshold, precision, recall, F1 with the 95 %
    interval that a bootstrap over the images gives.
    """
    marks, likely = _arrays(samples, predictions)
    called = likely >= np.array([one.thresholds for one in predictions])
    there = np.flatnonzero(marks.any(axis=0))
    drawn = np.random.default_rng(0).multinomial(len(marks), np.full(len(marks), 1 / len(marks)), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, len(marks)), int), drawn])  # the images as they are first
    right, both = weights @ (called & marks), weights @ called + weights @ marks  # (1 + R, classes)
    f1 = 2 * right / np.maximum(both, 1)
    f1 = np.concatenate([f1, f1[:, there].mean(axis=1, keepdims=True)], axis=1)
    low, high = np.percentile(f1[1:], [2.5, 97.5], axis=0)
    rows = [["label", "images", "AP", "threshold", "precision", "recall", "F1", "95 % interval"]]
    precisions = {int(i): average_precision(marks[:, i], likely[:, i]) for i in there}
    for i, name in enumerate(classes):
        shares = ((right[0, i], called[:, i].sum()), (right[0, i], marks[:, i].sum()))
        cells = [f"{100 * part / whole:.1f} %" if whole else "none" for part, whole in shares]
        known = [f"{100 * precisions[i]:.1f} %" if i in precisions else "none", f"{predictions[0].thresholds[i]:.2f}"]
        rows.append([name, f"{marks[:, i].sum()}", *known, *cells, *_interval(f1[0, i], low[i], high[i])])
    mean = float(np.mean(list(precisions.values()) or [0.0]))
    rows.append(["all", f"{len(marks)}", f"{100 * mean:.1f} %", *[""] * 3, *_interval(f1[0, -1], low[-1], high[-1])])
    micro = 2 * right[0].sum() / max(both[0].sum(), 1)
    error = calibration_error(likely.ravel(), marks.ravel())
    return {"map": mean, "f1": float(f1[0, -1]), "f1_micro": float(micro), "ece": error}, rows


def _interval(value: float, low: float, high: float) -> tuple[str, str]:
    return f"{100 * value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}"


def _arrays(samples: Sequence[Sample], predictions: Sequence[Tags]) -> tuple[NDArray[Any], NDArray[Any]]:
    """What is so and how probable it is called, `(n, classes)` of bool and from 0 to 1."""
    marks = np.array([sample.target for sample in samples], bool)
    return marks, np.array([found.probabilities for found in predictions])


def as_json(prediction: Tags, classes: Sequence[str]) -> dict[str, Any]:
    """`{"labels": those that the image has, "probabilities": {label: from 0 to 1}}`, both best first."""
    order = np.argsort(-prediction.probabilities, kind="stable")
    likely = {classes[i]: float(prediction.probabilities[i]) for i in order}
    return {"labels": [classes[i] for i in prediction.best()], "probabilities": likely}


def as_text(prediction: Tags, classes: Sequence[str]) -> str:
    """A line for each label that the image has."""
    lines = [f"{100 * prediction.probabilities[i]:7.2f} %  {classes[i]}" for i in prediction.best()]
    return "\n".join(lines) or NONE


def save_prediction(path: str, prediction: Tags, classes: Sequence[str], stem: Path) -> list[str]:
    """A row: the path, a 0 or 1 for each class, as `fit` reads it."""
    best = prediction.best()
    return [path, *(str(int(i in best)) for i in range(len(classes)))]


def save_all(records: Sequence[list[str]], classes: Sequence[str], folder: Path) -> None:
    """`predictions.csv`: a column of 0 and 1 for each class."""
    results.write_csv(folder, ["path", *classes], records)


def card(
    samples: Sequence[Sample], predictions: Sequence[Tags], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """`precision_recall.png`."""
    return results.draw_precision_recall(*_arrays(samples, predictions), classes, folder)
