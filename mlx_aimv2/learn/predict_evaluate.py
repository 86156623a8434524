"""Predicts with a head folder, and scores it on labelled images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from mlx_aimv2.embed.encode import OnFailure, listed_files, raise_failure
from mlx_aimv2.files import atomic_folder, check_target, expand_user, stems_below
from mlx_aimv2.learn.head_folder import Head, load_head, seen
from mlx_aimv2.learn.learner import decoded, outputs_of_files, outputs_of_learner

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, the number of images, their part of DATA, a table by class, and notes on DATA.

    `left_out` has a line for each thing in DATA that was left out.
    """

    scores: dict[str, float]
    images: int
    part: str
    table: list[list[str]]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def evaluate(
    head: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    model: str | None = None,
    dtype: str | None = None,
    card: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
) -> Evaluation:
    """Scores a head folder on labelled images: `HEAD, DATA -> Evaluation`.

    If DATA has parts, `test` counts, else `val`, else `train`; without parts all images. `card` is a folder for the
    card's images, which must not exist yet. DataError, a ValueError, lists everything that is wrong with DATA,
    including labels unknown to the head; with `skip_broken` unreadable images are left out.
    """
    target = None if card is None else expand_user(card)
    if target is not None:
        check_target(target)
    loaded = load_head(head, model=model, dtype=dtype)
    classes, results = loaded.classes, loaded.task.results
    dataset = loaded.task.data.read(expand_user(data), classes=classes, skip_broken=skip_broken)
    part, samples = dataset.to_score()
    _log.debug("evaluating %s images", f"{len(samples):,}")
    predictions = decoded(loaded.task, samples, outputs_of_learner(loaded.learner, samples, loaded.processor))
    if target is not None:
        with atomic_folder(target) as folder:
            results.card(samples, predictions, classes, folder)
    scores, table = results.score(samples, predictions, classes)
    notes = (*dataset.notes, *seen(samples, loaded.trained_on))
    return Evaluation(scores, len(samples), part, table, notes, dataset.left_out)


def predict(
    head: str | os.PathLike[str] | Head,
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    model: str | None = None,
    dtype: str | None = None,
    output: str | os.PathLike[str] | None = None,
    min_score: float | None = None,
    on_failure: OnFailure = raise_failure,
) -> Iterator[tuple[str, Any]]:
    """Predictions for files, folders and patterns: `HEAD, images -> (path, prediction) …`, sorted by name.

    The prediction is the task's own type, with its labels by name; for `classify` it has `label`, `labels` with their
    probabilities, best first, and `probabilities` (classes,). An unreadable image raises ValueError, or is passed to
    `on_failure(path, reason)`, as in `embed`, and left out. `output` is a folder for predictions as files, which must
    not exist yet and appears when everything is written; a file below a given folder keeps its path in there. A label
    or box below `min_score` is left out: an image without any is "none of these"; it replaces the thresholds of
    `multilabel`. Raises ValueError for a task without scores.
    """
    loaded = head if isinstance(head, Head) else load_head(head, model=model, dtype=dtype)
    if min_score is not None and not (0 <= min_score <= 1 and hasattr(loaded.task.results, "at_least")):
        wanted = "is not for segment and regression" if 0 <= min_score <= 1 else "must be from 0 to 1"
        raise ValueError(f"--min-score {wanted}, got {min_score:g} for a head to {loaded.task.name}")
    given = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    files, results, records = listed_files(given, on_failure), loaded.task.results, list[Any]()
    with nullcontext() if output is None else atomic_folder(expand_user(output)) as folder:
        stems = {} if folder is None else stems_below(given, files)
        _log.debug("predicting %s images", f"{len(files):,}")
        for image, outputs in outputs_of_files(loaded.learner, files, loaded.processor, on_failure):
            prediction = results.decode(outputs, image.upright)
            if min_score is not None:
                prediction = results.at_least(prediction, min_score)
            if folder is not None:
                stem = folder / stems[image.path]
                stem.parent.mkdir(parents=True, exist_ok=True)
                records.append(results.save_prediction(image.path, prediction, loaded.classes, stem))
            if hasattr(prediction, "classes"):
                prediction = replace(prediction, classes=loaded.classes)
            yield image.path, prediction
        if folder is not None:
            results.save_all(records, loaded.classes, folder)
