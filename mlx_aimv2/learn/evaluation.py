"""Runs a head over labelled images and scores it: the last step of `fit`, and `evaluate` on new data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.learn.features import Features
from mlx_aimv2.learn.head_folder import load_head
from mlx_aimv2.learn.learner import Learner
from mlx_aimv2.learn.samples import Sample, seen
from mlx_aimv2.learn.task import Task
from mlx_aimv2.processor import Aimv2Processor

BATCH_TOKENS = 4096
"""Tokens of one batch: 16 images at 224 pixels."""

Outputs = dict[str, np.ndarray[Any, Any]]


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
    card's images. DataError, a ValueError, lists everything that is wrong with DATA, labels that the head does not know
    among it.
    """
    loaded = load_head(head, model=model, dtype=dtype)
    dataset = loaded.task.read(Path(data), classes=loaded.classes)
    part, samples = dataset.to_score()
    outputs = outputs_of_learner(loaded.learner, loaded.task, samples, loaded.processor)
    predictions = decoded(loaded.task, samples, outputs)
    if card is not None:
        Path(card).mkdir(parents=True, exist_ok=True)
        loaded.task.card(samples, predictions, loaded.classes, Path(card))
    return Evaluation(
        loaded.task.score(samples, predictions, loaded.classes),
        len(samples),
        part,
        loaded.task.table(samples, predictions, loaded.classes),
        (*dataset.notes, *seen(samples, loaded.trained_on)),
    )


def outputs_of_head(
    head: nn.Module, samples: Sequence[Sample], features: Features, grid: tuple[int, int]
) -> Iterator[Outputs]:
    """A head's outputs on stored features, image after image."""
    step = max(1, BATCH_TOKENS // math.prod(grid))
    for start in range(0, len(samples), step):
        tokens = features.of(samples[start : start + step])
        yield from _apart(head(mx.array(tokens if tokens.ndim == 3 else tokens[:, None]), grid))


def outputs_of_learner(
    learner: Learner, task: Task, samples: Sequence[Sample], processor: Aimv2Processor
) -> Iterator[Outputs]:
    """The outputs of encoder and head on images as they are, image after image."""
    rows, columns = processor.preprocessing.final_size or (0, 0)
    tokens = max(1, (rows // processor.patch_size) * (columns // processor.patch_size))
    step = max(1, BATCH_TOKENS // tokens)
    with ThreadPoolExecutor(os.cpu_count() or 1, "decode") as pool:

        def submitted(start: int) -> list[Any]:
            batch = samples[start : start + step]
            return [pool.submit(task.pixels, sample.path, processor) for sample in batch]

        coming = submitted(0)
        for start in range(0, len(samples), step):
            now, coming = coming, submitted(start + step)
            pixels = np.stack([future.result()[0] for future in now])
            yield from _apart(learner(mx.array(pixels)))


def decoded(task: Task, samples: Sequence[Sample], outputs: Iterator[Outputs]) -> list[Any]:
    """A prediction for each sample from its outputs."""
    return [task.decode(output, sample, sample.size) for sample, output in zip(samples, outputs, strict=True)]


def _apart(outputs: dict[str, mx.array]) -> Iterator[Outputs]:
    """Outputs of a batch as those of each image."""
    arrays = {name: np.array(array.astype(mx.float32)) for name, array in outputs.items()}
    for i in range(len(next(iter(arrays.values())))):
        yield {name: array[i] for name, array in arrays.items()}
