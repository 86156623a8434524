"""Features of a frozen encoder, computed once for each image and kept on disk.

A cache is a folder named after everything that decides the numbers: weights, preprocessing, what is kept of an image.
In it `rows.bin` holds one row of numbers for each image and `keys.bin` the SHA-256 of each image, in the same order. A
row is written before its key, so a run that is interrupted anywhere leaves whole rows, and the next one goes on.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.embed.pipeline import embed_chunks, split_into_chunks
from mlx_aimv2.embed.pooling import Pooling
from mlx_aimv2.embed.provenance import fingerprint
from mlx_aimv2.files import cache_folder
from mlx_aimv2.learn.learner import grid_of
from mlx_aimv2.learn.samples import DataError, Sample
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.processor import Aimv2Processor

Array: TypeAlias = NDArray[Any]

FORMAT = 1

KEY_BYTES = 32

KINDS: dict[str, np.dtype[Any]] = {"mean": np.dtype("<f4"), "tokens": np.dtype("<f2")}
"""What is kept of an image -> its numbers: the mean token (D,), or all tokens (N, D) in half the bytes."""


class Features:
    """Features of images by their content: `features[sample.sha256]` is (D,) or (N, D)."""

    def __init__(self, rows: Array, places: dict[bytes, int]) -> None:
        self.rows = rows
        self.places = places

    def __getitem__(self, sha256: bytes) -> Array:
        return self.rows[self.places[sha256]]

    def of(self, samples: Sequence[Sample]) -> Array:
        """Those of several samples as one array, `(n, …)` float32."""
        places = [self.places[sample.sha256] for sample in samples]
        return np.asarray(self.rows[places], np.float32)


def compute_features(
    samples: Sequence[Sample],
    model: Aimv2VisionModel,
    processor: Aimv2Processor,
    *,
    kind: str,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """Features of every sample, from the cache where it has them: `samples -> Features`.

    `kind` is one of `KINDS`; `folder` is where caches lie. `advance` gets how many images are done. Raises OSError
    with one line where the disk is full; what was computed stays.
    """
    shape = _row_shape(kind, model, processor)
    place = (folder or cache_folder() / "features") / cache_key(model, processor, kind=kind)
    unique = {sample.sha256: sample.path for sample in samples}
    with _opened(place) as cache:
        places = cache.places(shape, KINDS[kind])
        missing = {sha256: path for sha256, path in unique.items() if sha256 not in places}
        _check_space(place, len(missing) * (_row_bytes(shape, KINDS[kind]) + KEY_BYTES))
        advance(len(unique) - len(missing))
        chunks = _chunks_computed(sorted(missing.values())) if missing else []
        failed: list[str] = []
        for done in embed_chunks(
            chunks,
            model,
            processor,
            pooling=Pooling.of(model, kind),
            on_failure=lambda path, why: failed.append(f"{path} {why}"),
            on_note=lambda path, why: None,  # all images have one size, of which `fit` speaks once
        ):
            new = [one for one in done if one.sha256 in missing and one.sha256 not in places]
            for one in new:
                places[one.sha256] = len(places)
            cache.append([(one.sha256, one.vector.astype(KINDS[kind])) for one in new], place)
            advance(len(done))
        if failed:
            raise DataError(failed)
        if changed := [path for sha256, path in missing.items() if sha256 not in places]:
            raise DataError([f"{path} was changed while it was read: run it again" for path in changed])
        rows = np.memmap(cache.rows_file, KINDS[kind], "r", shape=(len(places), *shape)) if places else np.empty(0)
        return Features(rows, places)


def _chunks_computed(paths: list[str]) -> list[list[str]]:
    """The images that the encoder has to see, as `embed` cuts them."""
    return split_into_chunks(paths)


def cache_key(model: Aimv2VisionModel, processor: Aimv2Processor, *, kind: str) -> str:
    """A name that is the same for equal features alone."""
    decides = {
        "format": FORMAT,
        "kind": kind,
        "weights": fingerprint(model)["digest"],
        "dtype": str(model.dtype),
        "preprocessing": asdict(processor.preprocessing),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:24]


class _Cache:
    """The two files of a cache, locked."""

    def __init__(self, folder: Path) -> None:
        self.rows_file = folder / "rows.bin"
        self.keys_file = folder / "keys.bin"

    def places(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[bytes, int]:
        """The row of each image; what an interrupted run left unfinished is cut off."""
        size = _row_bytes(shape, dtype)
        for file in (self.rows_file, self.keys_file):
            file.touch()
        count = min(self.rows_file.stat().st_size // size, self.keys_file.stat().st_size // KEY_BYTES)
        os.truncate(self.rows_file, count * size)
        os.truncate(self.keys_file, count * KEY_BYTES)
        keys = self.keys_file.read_bytes()
        return {keys[start : start + KEY_BYTES]: place for place, start in enumerate(range(0, len(keys), KEY_BYTES))}

    def append(self, rows: Sequence[tuple[bytes, Array]], place: Path) -> None:
        """Writes rows and then their keys."""
        try:
            with self.rows_file.open("ab") as file:
                for _, row in rows:
                    file.write(row.tobytes())
                file.flush()
                os.fsync(file.fileno())
            with self.keys_file.open("ab") as file:
                file.write(b"".join(key for key, _ in rows))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(place) from None
            raise OSError(f"features cannot be written to {place}: {error.strerror}") from None


@contextmanager
def _opened(place: Path) -> Iterator[_Cache]:
    """The cache for this process alone; another one that fills it is waited for."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise OSError(f"features cannot be kept in {place}: {error.strerror}; choose another --cache") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield _Cache(place)
    finally:
        os.close(descriptor)


def _check_space(place: Path, wanted: int) -> None:
    if wanted > shutil.disk_usage(place).free:
        raise _full(place, wanted)


def _full(place: Path, wanted: int | None = None) -> OSError:
    need = f", which need {wanted / 1e9:.2f} GB" if wanted is not None else ""
    return OSError(
        f"no space left in {place} for the features{need}: free some, or choose another --cache; what was done is kept"
    )


def _row_shape(kind: str, model: Aimv2VisionModel, processor: Aimv2Processor) -> tuple[int, ...]:
    if kind == "mean":
        return (model.config.hidden_size,)
    rows, columns = grid_of(processor)
    return rows * columns, model.config.hidden_size


def _row_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape)) * dtype.itemsize
