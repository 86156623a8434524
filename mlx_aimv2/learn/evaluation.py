"""Runs a head over images: the last step of `fit`, `evaluate` on labelled images, `predict` on new ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.embed.cache import Features
from mlx_aimv2.embed.encode import OnFailure, listed_files, raise_failure
from mlx_aimv2.embed.loader import Decoded, Decoder, Outputs, images_at_once, run_ahead, split_into_chunks
from mlx_aimv2.files import atomic_folder, check_target, expand_user, stems_below
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn.head_folder import Head, load_head
from mlx_aimv2.learn.learner import Learner, grid_of
from mlx_aimv2.learn.samples import Sample, seen
from mlx_aimv2.learn.task import Task


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, of how many images, the part of DATA that they are from, a table by class, and notes on DATA."""

    scores: dict[str, float]
    images: int
    part: str
    table: list[list[str]]
    notes: tuple[str, ...] = ()


def evaluate(
    head: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    model: str | None = None,
    dtype: str | None = None,
    card: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Scores a head folder on labelled images: `HEAD, DATA -> Evaluation`.

    Of DATA with parts `test` counts, else `val`, else `train`; without parts all images. `card` is a folder for the
    card's images, which must not exist yet. DataError, a ValueError, lists everything that is wrong with DATA, labels
    that the head does not know among it.
    """
    if card is not None:
        check_target(expand_user(card))
    loaded = load_head(head, model=model, dtype=dtype)
    task, classes = loaded.task, loaded.classes
    dataset = task.data.read(expand_user(data), classes=classes)
    part, samples = dataset.to_score()
    predictions = decoded(task, samples, outputs_of_learner(loaded.learner, task, samples, loaded.processor))
    if card is not None:
        with atomic_folder(expand_user(card)) as folder:
            task.results.card(samples, predictions, classes, folder)
    scores, table = task.results.score(samples, predictions, classes), task.results.table(samples, predictions, classes)
    return Evaluation(scores, len(samples), part, table, (*dataset.notes, *seen(samples, loaded.trained_on)))


def predict(
    head: str | os.PathLike[str] | Head,
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    model: str | None = None,
    dtype: str | None = None,
    on_failure: OnFailure | None = None,
) -> Iterator[tuple[str, Any]]:
    """Predictions for files, folders and patterns: `HEAD, images -> (path, prediction) …`, sorted by name.

    The prediction is the task's own; for `classify` it has `probabilities` (classes,). An image that cannot be read
    raises ValueError, or is passed to `on_failure(path, reason)`, as `embed` does it, and left out.
    """
    fail = on_failure or raise_failure
    loaded = head if isinstance(head, Head) else load_head(head, model=model, dtype=dtype)
    for image, outputs in _outputs_of_files(listed_files(images, fail), loaded.learner, loaded.processor):
        if image.failure is not None:
            fail(image.path, image.failure)
        elif outputs is not None:
            yield image.path, loaded.task.results.decode(outputs, image.upright)


def outputs_of_head(
    head: nn.Module, samples: Sequence[Sample], features: Features, grid: tuple[int, int]
) -> Iterator[Outputs]:
    """A head's outputs on stored features, image after image."""
    for part in split_into_chunks(samples, images_at_once(math.prod(grid))):
        tokens = features.of(part)
        outputs = head(mx.array(tokens if tokens.ndim == 3 else tokens[:, None]), grid)
        arrays = {name: np.array(array.astype(mx.float32)) for name, array in outputs.items()}
        yield from ({name: array[row] for name, array in arrays.items()} for row in range(len(part)))


def outputs_of_learner(
    learner: Learner, task: Task, samples: Sequence[Sample], processor: Aimv2Processor
) -> Iterator[Outputs]:
    """The outputs of encoder and head on images as they are, image after image."""
    for image, outputs in _outputs_of_files([sample.path for sample in samples], learner, processor):
        if outputs is None:
            raise_failure(image.path, image.failure or "")
        else:
            yield outputs


def _outputs_of_files(
    files: Sequence[str], learner: Learner, processor: Aimv2Processor
) -> Iterator[tuple[Decoded, Outputs | None]]:
    tokens = math.prod(grid_of(processor))
    for chunk in run_ahead(
        split_into_chunks(files, images_at_once(tokens)),
        Decoder(processor),
        lambda levels: learner(processor.normalised(levels)),
        patch=processor.patch_size,
        tokens=tokens,
    ):
        yield from chunk


def decoded(task: Task, samples: Sequence[Sample], outputs: Iterator[Outputs]) -> list[Any]:
    """A prediction for each sample from its outputs."""
    return [task.results.decode(output, sample.size) for sample, output in zip(samples, outputs, strict=True)]


@contextmanager
def saving(
    head: Head, given: Iterable[str | os.PathLike[str]], files: Sequence[str], output: Path
) -> Iterator[Callable[[str, Any], None]]:
    """A function that writes a file's prediction, `(path, prediction)`, into the folder `output`.

    A file below a folder that was `given` keeps its path in there. The folder must not exist yet, and appears when all
    is written.
    """
    stems = stems_below(given, files)
    records: list[Any] = []
    with atomic_folder(output) as folder:

        def save(path: str, prediction: Any) -> None:
            stem = folder / stems[path]
            stem.parent.mkdir(parents=True, exist_ok=True)
            records.append(head.task.results.save_prediction(path, prediction, head.classes, stem))

        yield save
        head.task.results.save_all(records, head.classes, folder)
