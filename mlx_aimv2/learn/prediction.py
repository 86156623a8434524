"""Runs a head on new images, one after another; an image that cannot be read is reported and the rest is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_aimv2.find_images import list_images
from mlx_aimv2.learn.head_folder import Head, load_head
from mlx_aimv2.learn.learner import grid_of

BATCH_TOKENS = 4096

OnFailure = Callable[[str, str], None]
"""Called with a path and what is wrong with it, a sentence."""


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
    raises ValueError, or is passed to `on_failure(path, reason)` and left out.
    """
    fail = on_failure or _raise
    loaded = head if isinstance(head, Head) else load_head(head, model=model, dtype=dtype)
    listing = list_images([images] if isinstance(images, (str, os.PathLike)) else images)
    for missing in listing.missing:
        fail(missing, f"{missing} does not exist")
    for path, reason in listing.problems:
        fail(path, f"{path} {reason}")
    rows, columns = grid_of(loaded.processor)
    step = max(1, BATCH_TOKENS // (rows * columns))
    with ThreadPoolExecutor(os.cpu_count() or 1, "decode") as pool:
        for start in range(0, len(listing.files), step):
            batch = listing.files[start : start + step]
            done: list[tuple[str, Any, tuple[int, int]]] = []
            for path, result in zip(batch, pool.map(lambda path: _example(loaded, path), batch), strict=True):
                if isinstance(result, str):
                    fail(path, result)
                else:
                    done.append((path, *result))
            if not done:
                continue
            outputs = loaded.learner(mx.array(np.stack([pixels for _, pixels, _ in done])))
            arrays = {name: np.array(array.astype(mx.float32)) for name, array in outputs.items()}
            for i, (path, _, size) in enumerate(done):
                own = {name: array[i] for name, array in arrays.items()}
                yield path, loaded.task.decode(own, None, size)


def _example(head: Head, path: str) -> tuple[Any, tuple[int, int]] | str:
    """An image's pixels and its size, or what is wrong with it."""
    try:
        return head.task.pixels(path, head.processor)
    except Exception as error:  # decoders raise whatever they meet, and one file must not end the run
        return " ".join(str(error).split()) or f"{path} cannot be read"


def _raise(path: str, reason: str) -> None:
    raise ValueError(reason)


def save(predictions: list[tuple[str, Any]], head: Head, folder: Path) -> list[Path]:
    """Writes what the task can show of predictions into a folder: files for each image, and one of all."""
    from mlx_aimv2.images import to_rgb

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for path, prediction in predictions:
        written += head.task.save_prediction(prediction, to_rgb(path), head.classes, folder / Path(path).stem)
    head.task.save_all(predictions, head.classes, folder)
    return written
