"""Records how features were made and whether they can be compared, and caches what is costly to recompute.

How features were made is described by a JSON dictionary. Weights are identified by samples: a few values of every
tensor that no recipe quantizes (norms, patch embedding, positions), which any dtype changes by less than 2^-8, and a
digest of values from all tensors, which is equal only for the same weights in the same dtype and bits.

Features are in a folder named after everything that affects their values. In it `rows.bin` has one row of numbers for
each image or view of one, and `keys.bin` the 32 bytes that identify its content, in the same order. A row is written
before its key, so a run interrupted at any point leaves complete rows, and the next one continues.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_aimv2.files import cache_folder, is_unchanged, marks_of, stat_of
from mlx_aimv2.untrusted_json import are_numbers

if TYPE_CHECKING:
    from mlx_aimv2.images.processor import Aimv2Processor
    from mlx_aimv2.loading import AnyModel
    from mlx_aimv2.model import Aimv2VisionModel

Array: TypeAlias = NDArray[Any]

Description = dict[str, Any]

MUST_AGREE = ("pool", "layer", "norm", "width", "preprocessing", "max_patches")
"""Fields that must be equal, besides the weights, for two embeddings to be comparable."""

SHOULD_AGREE = ("dtype", "quantization")
"""Fields that change the values only slightly."""

KEPT_DENSE = ("norm", "patch_embed", "pos_embed")
"""Parts of a parameter's path: these are never quantized."""

SAMPLES = 4
"""Numbers taken from each tensor for the fingerprint, spread evenly."""

TOLERANCE = 2.0**-8
"""Twice the largest change from rounding to bfloat16."""

KEY_BYTES = 32

FORMAT = 1

KINDS: dict[str, np.dtype[Any]] = {"mean": np.dtype("<f4"), "tokens": np.dtype("<f2")}
"""What is kept for an image -> its dtype: the mean token (D,), or all tokens (N, D) in half the bytes."""

SETTLED_NS = 2_000_000_000
"""A file changed this recently may change again within one clock tick: it is not cached."""


def fingerprint(model: AnyModel) -> dict[str, Any]:
    """Samples of the weights: `sample` from the vision encoder's dense tensors, `digest` from all tensors."""
    parameters: Any = sorted(tree_flatten(model.parameters()))
    dense: Any = sorted(tree_flatten(model.vision.parameters()))
    sample = _samples([array for path, array in dense if any(part in path for part in KEPT_DENSE)])
    everything = _samples([array for _, array in parameters])
    names = "\n".join(path for path, _ in parameters)
    digest = hashlib.sha256(names.encode() + everything.tobytes()).hexdigest()
    return {"digest": digest, "sample": [float(f"{value:.7g}") for value in sample]}


def _samples(arrays: Sequence[mx.array]) -> Array:
    """A few values from each array, one after another, in float32."""
    taken = []
    for array in arrays:
        indices = mx.array(np.linspace(0, array.size - 1, SAMPLES).astype(np.int32))
        taken.append(array.reshape(-1)[indices].astype(mx.float32))
    return np.array(mx.concatenate(taken))


def differences(stored: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What makes `other` incomparable with `stored`, and what only deserves a note: two lists of sentences."""
    refused = [_differ(name, stored, other) for name in MUST_AGREE if stored.get(name) != other.get(name)]
    notes = [_differ(name, stored, other) for name in SHOULD_AGREE if stored.get(name) != other.get(name)]
    weights, others = stored.get("weights", {}), other.get("weights", {})
    one, another = weights.get("sample", []), others.get("sample", [])
    names = f"{_name(stored)} there, {_name(other)} here"
    if not are_numbers(one) or len(one) != len(another) or not np.allclose(one, another, rtol=TOLERANCE, atol=1e-6):
        refused.insert(0, f"the weights: {names}")
    elif weights.get("digest") != others.get("digest") and not notes:
        refused.insert(0, f"the weights, though not in the norms: {names}")
    return refused, notes


def _name(description: Mapping[str, Any]) -> str:
    commit = description.get("commit")
    return f"{description.get('checkpoint')}{f' at {commit[:12]}' if commit else ''}"


def _differ(name: str, stored: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    there, here = stored.get(name), other.get(name)
    if isinstance(there, Mapping) and isinstance(here, Mapping):  # only the parts that differ
        parts = [part for part in {**there, **here} if there.get(part) != here.get(part)]
        there, here = ({part: side.get(part) for part in parts} for side in (there, here))
    return f"{name.replace('_', ' ')}: {_value(there)} there, {_value(here)} here"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_value(part)}" for key, part in value.items())
    return "none" if value is None else str(value)


# Files


class Known(NamedTuple):
    """What is known about a good image: its SHA-256, its (height, width) upright, and whether it was decoded.

    Otherwise only the header was read.
    """

    sha256: bytes
    size: tuple[int, int]
    decoded: bool


class KnownFiles:
    """Remembers what is known about images, by file name and state (`files.is_unchanged`)."""

    def __init__(self) -> None:
        self.path = cache_folder() / "files.db"

    def look_up(self, paths: Sequence[str], *, decoded: bool = True) -> dict[str, Known]:
        """What is known about the unchanged files; with `decoded` only about those that were decoded."""
        query = "SELECT sha256, height, width, decoded, size, mtime_ns, ctime_ns, inode FROM files WHERE path = ?"
        known = {}
        with suppress(sqlite3.Error), closing(self._connect()) as database:  # an unreadable one is ignored
            for path in paths:
                row = (about := stat_of(path)) and database.execute(query, (_key(path),)).fetchone()
                if row and about and row[3] >= decoded and is_unchanged(about, *row[4:]):
                    known[path] = Known(bytes(row[0]), (row[1], row[2]), bool(row[3]))
        return known

    def remember(self, files: Iterable[tuple[str, Known]]) -> None:
        """Keeps what is known about files, pairs of path and Known, if the disk allows."""
        settled = time.time_ns() - SETTLED_NS
        rows = [
            (_key(path), *marks_of(about), known.sha256, *known.size, known.decoded)
            for path, known in files
            if (about := stat_of(path)) and about.st_mtime_ns < settled
        ]
        with suppress(sqlite3.Error, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER,"
                    " ctime_ns INTEGER, inode INTEGER, sha256 BLOB, height INTEGER, width INTEGER, decoded INTEGER)"
                    " WITHOUT ROWID"
                )
                database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=5)
        database.execute("PRAGMA trusted_schema = OFF")
        return database


def _key(path: str) -> bytes:
    return os.fsencode(os.path.abspath(path))  # noqa: PTH100 - a Path would cost more than the look-up itself


# Features


class WithContent(Protocol):
    """The key of features: the SHA-256 of an image."""

    @property
    def sha256(self) -> bytes: ...


@dataclass(frozen=True)
class Features:
    """Features of images by their content, read on request: `features[sample.sha256]` is (D,) or (N, D)."""

    rows: Array
    index: dict[bytes, int]

    def __getitem__(self, key: bytes) -> Array:
        return self.rows[self.index[key]]

    def of(self, samples: Sequence[WithContent]) -> Array:
        """The features of several samples as one array, `(n, …)` float32."""
        return np.asarray(self.rows[[self.index[sample.sha256] for sample in samples]], np.float32)


class FeatureCache:
    """The rows of one folder, to which only this process may add: `open_features` makes one.

    `index` is the row of each key, `advice` what to do about a full disk.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any], advice: str) -> None:
        self.shape, self.dtype, self.advice = shape, dtype, advice
        self.rows_file, self.keys_file = folder / "rows.bin", folder / "keys.bin"
        self.row_bytes = int(np.prod(shape)) * dtype.itemsize
        for file in (self.rows_file, self.keys_file):
            file.touch()
        count = min(self.rows_file.stat().st_size // self.row_bytes, self.keys_file.stat().st_size // KEY_BYTES)
        os.truncate(self.rows_file, count * self.row_bytes)  # what an interrupted run left unfinished
        os.truncate(self.keys_file, count * KEY_BYTES)
        keys = self.keys_file.read_bytes()
        self.index = {keys[KEY_BYTES * row : KEY_BYTES * (row + 1)]: row for row in range(count)}

    def reserve(self, count: int) -> None:
        """Raises OSError if the disk has no room for that many more rows."""
        wanted = count * (self.row_bytes + KEY_BYTES)
        if wanted > (free := shutil.disk_usage(self.rows_file.parent).free):
            raise self._full(f", which need {wanted:,} bytes where {free:,} are free")

    def append(self, rows: Iterable[tuple[bytes, Array]]) -> None:
        """Writes rows and then their keys; existing keys are skipped.

        Raises OSError with one line if that fails.
        """
        new = {key: row for key, row in rows if key not in self.index}
        try:
            with self.rows_file.open("ab") as file:
                for row in new.values():
                    file.write(row.astype(self.dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
            with self.keys_file.open("ab") as file:
                file.write(b"".join(new))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full() from None
            raise OSError(f"{self.rows_file} cannot be written: {error.strerror}") from None
        self.index |= {key: row for row, key in enumerate(new, start=len(self.index))}

    def features(self) -> Features:
        """What is stored so far."""
        shape = (len(self.index), *self.shape)
        rows = np.memmap(self.rows_file, self.dtype, "r", shape=shape) if self.index else np.empty(shape, self.dtype)
        return Features(rows, dict(self.index))

    def _full(self, need: str = "") -> OSError:
        return OSError(f"no space left for the features in {self.rows_file}{need}: free some, or {self.advice}")


def cache_key(model: Aimv2VisionModel, processor: Aimv2Processor, *, kind: str, **more: Any) -> str:
    """A name that is the same only for equal features; `more` is what else affects them."""
    decides = {
        "format": FORMAT,
        "kind": kind,
        "weights": fingerprint(model)["digest"],
        "dtype": str(model.dtype),
        "preprocessing": asdict(processor.preprocessing),
        **more,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:24]


@contextmanager
def open_features(
    folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, advice: str = "choose another --cache"
) -> Iterator[FeatureCache]:
    """The features of rows of this shape in a folder; waits for another process that is adding to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OSError(f"features cannot be kept in {folder}: {error.strerror}; {advice}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield FeatureCache(folder, shape, dtype, advice)
    finally:
        os.close(descriptor)
