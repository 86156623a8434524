"""A number for each image, under `label` in `metadata.jsonl`, or in a column of `metadata.csv`.

Heads learn it with mean 0 and variance 1, and tell it in its own units. The target of a sample is a tuple of one float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.images.find import Scan
from mlx_aimv2.learn import samples
from mlx_aimv2.learn.classify import data, head, results
from mlx_aimv2.learn.samples import DataError, Dataset, Format, Found, Labels, Sample, Scored, Size, listed
from mlx_aimv2.learn.tables import LABEL, column
from mlx_aimv2.train.batches import Arrays

WANTED = "metadata.jsonl with a number under label in each row, or a metadata.csv with a column label of numbers"

CLASS = "number"
"""The one class, whatever its column is called."""


def recognise(data: Path) -> None:
    """Nothing: numbers may be classes, too, so --task says it."""


def _marks(file: Path, rows: Sequence[data.Row], scan: Scan) -> list[tuple[Any, str]]:
    """The number in each row."""
    names = data.value_columns(rows)
    found = column(names, LABEL) or [name for name in names if all(_number(row.get(name)) is not None for row in rows)]
    if len(found) != 1:
        which = f"{len(found)} columns that may be it ({listed(found)})" if found else f"no number in {listed(names)}"
        scan.faults.append(f"{file} has {which}: make a {WANTED}")
        return []
    values = [row.get(found[0]) for row in rows]
    numbers = [_number(value) for value in values]
    if not any(number is not None for number in numbers):
        scan.faults.append(f"{file} has texts as labels, {values[0]!r:.60} for one: --task classify takes those")
        return []
    faults = [
        "" if value in ("", None) or (number is not None and math.isfinite(number)) else f"has {value!r:.60}, no number"
        for value, number in zip(values, numbers, strict=True)
    ]
    return list(zip(numbers, faults, strict=True))


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def _labels(marked: Sequence[tuple[str, float, Size]], scan: Scan) -> list[Labels]:
    return [Labels((CLASS,), number) for _, number, _ in marked]


def _target(labels: Labels, numbers: Mapping[str, int]) -> tuple[float]:
    return (labels.value,)


def _find(place: Path, sources: Any, scan: Scan) -> Found:
    return data.find_in_tables(place, sources, scan, _marks, WANTED)


FORM = Format(partial(data.sources_of, of=None), _find, _labels, _target, min_classes=1, stratified=False)


def read(place: Path, **how: Any) -> Dataset:
    """As `samples.read`. DataError, too, where all images of `train` have the same number."""
    dataset = samples.read(place, FORM, **how)
    if how.get("classes") is None and len(found := {sample.target for sample in dataset.splits["train"]}) == 1:
        raise DataError([f"all images of train have the number {found.pop()[0]:g}: there is nothing to learn"])
    return dataset


example, targets, choose, solve = data.example, data.targets, head.choose, head.solve
make_head = partial(head.make_head, labels="number")


def first_options(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean and the standard deviation of what is learned, for the head to tell it in its own units."""
    numbers = np.array([sample.target for sample in samples], np.float64)
    return {"offset": float(numbers.mean()), "scale": float(numbers.std())}


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Half the squared error of each image, in standard deviations of the training images, `(B, 1), (B, 1) -> (B,)`."""
    error = (outputs["logits"].astype(mx.float32) - targets["label"]) / outputs.get("scale", mx.array(1.0))[..., None]
    return 0.5 * mx.square(error).sum(axis=1)


def calibrate(trained: Any, logits: NDArray[Any], samples: Sequence[Sample]) -> None:
    """Nothing: a number has no probability."""


def decode(outputs: Arrays, size: tuple[int, int]) -> float:
    """The number of one image."""
    return float(outputs["logits"][0])


def score(samples: Sequence[Sample], predictions: Sequence[float], classes: Sequence[str]) -> Scored:
    """`r2`, the share of the variance that is explained, `rmse` and `mae` in the units of the numbers, and their table.

    Where all numbers are the same `r2` is 0, or 1 if each is met, as in scikit-learn.
    """
    wanted = np.array([sample.target[0] for sample in samples])
    errors = np.array(predictions) - wanted
    squares, variance = float(errors @ errors), float(((wanted - wanted.mean()) ** 2).sum())
    scores = {
        "r2": 1 - squares / variance if variance else float(not squares),
        "rmse": math.sqrt(squares / len(wanted)),
        "mae": float(np.abs(errors).mean()),
    }
    ends = [f"{value:.4g}" for value in (wanted.min(), wanted.mean(), wanted.max(), errors.mean())]
    return scores, [["", "images", "lowest", "mean", "highest", "mean error"], [CLASS, f"{len(wanted)}", *ends]]


def as_json(prediction: float, classes: Sequence[str]) -> dict[str, Any]:
    """`{"label": the number}`."""
    return {"label": prediction}


def as_text(prediction: float, classes: Sequence[str]) -> str:
    """The number."""
    return f"{prediction:.6g}"


def save_prediction(path: str, prediction: float, classes: Sequence[str], stem: Path) -> list[str]:
    """A row: the path and the number."""
    return [path, repr(prediction)]


def save_all(records: Sequence[list[str]], classes: Sequence[str], folder: Path) -> None:
    """`predictions.csv`: the number for each image."""
    results.write_csv(folder, ["path", "label"], records)


def card(
    samples: Sequence[Sample], predictions: Sequence[float], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """`mistakes.png`: the images whose numbers are missed by most."""
    pairs = sorted(zip(samples, predictions, strict=True), key=lambda pair: -abs(pair[1] - pair[0].target[0]))
    missed = [(sample.path, f"{sample.target[0]:.4g}, not {found:.4g}") for sample, found in pairs]
    return results.draw_mistakes(missed, folder)
