"""Reads an index, one file with the embeddings of many images, and finds the images nearest to a vector.

The file is SQLite's. `images` has a row for each image; `blocks` holds their vectors, up to 1024 in a row, because
reading a million rows one by one takes longer than the search, and their ids (int64) in the same order. A vector is
stored at unit length, its own length beside it in `images`; tokens and maps are stored as they are.

It keeps a rollback journal and no write-ahead log, so it is one file: it can be copied when nothing writes to it and
may be on a network disk. A killed writer leaves a `-journal` next to it, which the next one to open it plays back.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sqlite3
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.files import expand_user, is_unchanged
from mlx_aimv2.index.schema import STAMPED, check_schema, connect, damaged, is_free, plain_errors

if TYPE_CHECKING:
    from mlx_aimv2.index.nearest import Vectors

AnyIndex = TypeVar("AnyIndex", bound="Index")

STORED = ("float16", "float32")
"""Names of the dtypes that vectors may have in the file."""

WIDEST = 1 << 20
"""More values than any embedding has: a width beyond it is damage, and would ask for all memory."""

BLOCKS_HELD = 16

STAMP: tuple[Any, ...] = (int, int, bytes, (int, NoneType), (int, NoneType), (str, NoneType))
"""Types of the columns with what an `Embedding` says of its file, the path aside."""

NOTHING = np.empty(0, np.float32)

DAY = "coalesce(nullif({}, ''), date(mtime_ns / 1000000000, 'unixepoch', 'localtime'))"
"""When an image was taken, as text: by its EXIF, which knows no time zone, else its file's time here."""

Date: TypeAlias = int | str | datetime.date
"""2024, 2024-05 or 2024-05-17, which stands for its beginning."""

AXES = {1: "one vector", 2: "tokens", 3: "a map"}
"""What an index holds for each image, by the number of axes: (D,), (N, D) or (h, w, D)."""


@dataclass(frozen=True)
class Embedding:
    """An image: its absolute path, its file when it was read, its vector (D,), tokens (N, D) or map (h, w, D).

    The vector is empty if only the file matters. `taken` is the day from its EXIF, such as 2024-05-17, "" if it has
    none, and None if it was not read.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: bytes
    vector: NDArray[Any]
    ctime_ns: int | None = None
    inode: int | None = None
    taken: str | None = None

    def fits(self, about: os.stat_result) -> bool:
        """Whether the file is still as it was (`files.is_unchanged`)."""
        return is_unchanged(about, self.size, self.mtime_ns, self.ctime_ns, self.inode)


@dataclass(frozen=True)
class Match:
    """An image found and the cosine of its vector with the query, from -1 to 1."""

    path: str
    score: float


class Index:
    """The embeddings of many images: `with Index.open("photos.db") as index: index.search(vector, 12)`.

    Any thread may use it, and several at once: they take turns at the file and search side by side in memory.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use `open`."""
        self.path = path
        self._db = connection
        self._lock = threading.RLock()
        self._vectors: Vectors | None = None
        self._blocks: dict[int, tuple[NDArray[Any], bytes]] = {}
        self._format: int = self._all("PRAGMA user_version")[0][0]
        about = {"sources": "{}", **dict(self._all("SELECT name, value FROM about"))}
        try:
            self.provenance: dict[str, Any] = json.loads(about["provenance"])
            """How the vectors were made, as described by the file's creator."""
            self.sources: dict[str, Any] = json.loads(about["sources"])
            """Folders and patterns it was made from -> the flags they were read with."""
            self.dtype: str = about["dtype"]
            """The dtype of the stored vectors: float16 or float32."""
            self.axes = int(about["axes"])
            """1 for one vector an image (D,), 2 for tokens (N, D), 3 for maps (h, w, D)."""
            self.width = int(about["width"])
            """D, the length of one vector."""
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise damaged(path, f"what it records about itself: {type(error).__name__} {error}") from None
        if not isinstance(self.provenance, dict) or not isinstance(self.sources, dict):
            raise damaged(path, "it does not record how it was made")
        if self.dtype not in STORED or self.axes not in AXES or not 1 <= self.width <= WIDEST:
            raise damaged(path, f"it claims {self.dtype}, {self.axes} axes, width {self.width}")

    @classmethod
    def open(cls: type[AnyIndex], path: str | os.PathLike[str]) -> AnyIndex:
        """Opens an index. Raises FileNotFoundError if it does not exist, ValueError if it is something else."""
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, not an index of images")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: create it with mlx-aimv2 embed IMAGES -m MODEL -o {path}")
        if is_free(path):
            raise ValueError(f"{path} is empty: fill it with mlx-aimv2 embed IMAGES -m MODEL -o {path}")
        # Writable where it can be, so that a killed writer's journal is played back by whoever comes first.
        db = connect(path, "rw" if os.access(path, os.W_OK) else "ro")
        try:
            with plain_errors(path):
                check_schema(db, path)
                return cls(path, db)
        except BaseException:
            db.close()
            raise

    def __enter__(self: AnyIndex) -> AnyIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; additions are already on disk."""
        with self._lock:
            self._vectors = None
            self._db.close()

    def __len__(self) -> int:
        return int(self._all("SELECT count(*) FROM images")[0][0])

    def paths(
        self, under: str | os.PathLike[str] | None = None, *, after: Date | None = None, before: Date | None = None
    ) -> Iterator[str]:
        """All paths, or those in and below a folder or taken in a period (as in `search`), sorted by bytes."""
        for path, _ in self._rows(under, after, before):
            yield self._name(path)

    def stamp(self, path: str) -> Embedding | None:
        """The state of an image's file when it was read; None for an image that is not in the index."""
        try:
            return self._stamp(*self._columns(path)[:-5])
        except KeyError:
            return None

    def stamps(self) -> dict[str, Embedding]:
        """The state of every image's file when it was read, by path."""
        rows = self._all(f"SELECT {STAMPED[self._format]} FROM images")
        return {(stamp := self._stamp(*row)).path: stamp for row in rows}

    def vector(self, path: str) -> NDArray[Any]:
        """An image's embedding as the model gave it, in float32. Raises KeyError for an image not in the index."""
        return self._restored(*self._columns(path)[-5:])

    def embeddings(self) -> Iterator[Embedding]:
        """All images with their embeddings, sorted by the paths' bytes. Raises OSError if one is removed meanwhile."""
        for path in self.paths():
            try:
                row = self._columns(path)
            except KeyError:
                raise OSError(f"{self.path} was changed while it was read: run it again") from None
            yield self._stamp(*row[:-5], vector=self._restored(*row[-5:]))

    def search(
        self,
        vector: Any,
        k: int = 12,
        *,
        min_score: float | None = None,
        under: str | os.PathLike[str] | None = None,
        after: Date | None = None,
        before: Date | None = None,
    ) -> list[Match]:
        """The k images whose vectors have the largest cosine with `vector` (D,), best first, ties by path.

        `vector` is a NumPy or MLX array, also (1, D) as from a model, or a list of pairs of a weight and such an array:
        their weighted sum at unit length. `min_score` leaves out smaller cosines, `under` images outside that folder,
        `after` those taken before that date, `before` those taken on that date or later.

        Exact: every vector is compared, and the scores of the best are computed in float64. The first search reads all
        vectors into memory (as does `read_vectors`); later additions to the file are seen by a new Index.
        """
        from mlx_aimv2.index.nearest import combined

        if k < 1:
            raise ValueError(f"k must be the number of images to find, at least 1; got {k}")
        if min_score is not None and not -1 <= min_score <= 1:
            raise ValueError(f"min_score (--min-score) must be a cosine from -1 to 1, got {min_score:g}")
        pairs = isinstance(vector, list) and vector and isinstance(vector[0], tuple)
        query = combined(vector if pairs else [(1.0, vector)], self.width)
        among = None
        if (under, after, before) != (None, None, None):
            among = np.array([identity for _, identity in self._rows(under, after, before)], np.int64)
        identities, scores = self.read_vectors().nearest(query, k, among=among)
        found = []
        for identity, score in zip(identities.tolist(), scores.tolist(), strict=True):
            for (path,) in self._all("SELECT path FROM images WHERE id = ?", identity):
                found.append((-score, os.fsencode(self._name(path))))
        best = [Match(os.fsdecode(path), -score) for score, path in sorted(found)[:k]]
        return best if min_score is None else [match for match in best if match.score >= min_score]

    def identities(self, paths: Iterable[str]) -> NDArray[Any]:
        """The ids by which `read_vectors` knows images, (P,) int64."""
        known = {self._name(path): identity for path, identity in self._rows()}
        return np.array([known[path] for path in paths], np.int64)

    def _rows(
        self, under: str | os.PathLike[str] | None = None, after: Date | None = None, before: Date | None = None
    ) -> list[tuple[bytes, int]]:
        """Names and ids, sorted by name, of images as `search` chooses them."""
        conditions: dict[str, bytes | str] = {}
        if under is not None:
            start = os.fsencode(os.path.normpath(expand_user(under).absolute())).rstrip(b"/")
            conditions |= {"path >= ?": start + b"/", "path < ?": start + b"0"}
        taken = STAMPED[self._format].rpartition(", ")[2]
        for name, date, sign in (("after", after, ">="), ("before", before, "<")):
            if date is not None:
                conditions[f"{DAY.format(taken)} {sign} ?"] = _checked(date, name)
        undated = f"SELECT count(*) FROM images WHERE {taken} IS NULL"
        if (after, before) != (None, None) and (count := self._all(undated)[0][0]):
            warnings.warn(
                f"{self.path} has no dates yet for {count:,} images, so file times count: the next mlx-aimv2 embed "
                "reads them",
                stacklevel=3,
            )
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        return self._all(f"SELECT path, id FROM images {where} ORDER BY path", *conditions.values())

    def check_search(self) -> None:
        """Raises ValueError if this index holds tokens or maps, which search cannot compare."""
        if self.axes != 1:
            held = f"{AXES[self.axes]} for each image"
            raise ValueError(f"{self.path} has {held}; search needs one vector: embed with --pool mean")

    def read_vectors(self) -> Vectors:
        """Brings all vectors into memory, if they are not there yet, ready for searches."""
        from mlx_aimv2.index.nearest import Vectors  # whoever does not search needs no MLX

        self.check_search()
        with self._lock, plain_errors(self.path):
            if self._vectors is None:
                self._db.execute("BEGIN")  # so that the count and the blocks are of the same moment
                try:
                    count = self._db.execute("SELECT count(*) FROM images").fetchone()[0]
                    blocks = self._whole(self._db.execute("SELECT images, vectors FROM blocks ORDER BY id"), count)
                    self._vectors = Vectors.read(blocks, count, width=self.width, dtype=self.dtype)
                except FloatingPointError as error:
                    raise damaged(self.path, str(error)) from None
                finally:
                    if self._db.in_transaction:  # a file that is no longer readable may have ended it
                        self._db.execute("COMMIT")
            return self._vectors

    def _whole(self, blocks: Iterable[tuple[bytes, bytes]], count: int) -> Iterator[tuple[bytes, bytes]]:
        """The same blocks, provided that there are ids and vectors for `count` images."""
        found = 0
        for members, vectors in blocks:
            found += self._held(members, vectors)
            if found > count:
                raise damaged(self.path, "a block of vectors that does not fit its images")
            yield members, vectors
        if found != count:
            raise damaged(self.path, f"vectors for {found:,} images instead of {count:,}")

    def _held(self, members: object, vectors: object) -> int:
        """How many images a block is of. Raises ValueError where its ids and its vectors do not belong together."""
        if isinstance(members, bytes) and isinstance(vectors, bytes) and len(members) % 8 == 0:
            count, size = len(members) // 8, self.width * np.dtype(self.dtype).itemsize
            if len(vectors) == count * size or (self.axes > 1 and count == 1 and len(vectors) % size == 0):
                return count
        raise damaged(self.path, "a block of vectors that does not fit its images")

    def _stamp(self, path: object, *values: Any, vector: NDArray[Any] = NOTHING) -> Embedding:
        name = self._name(path)
        if not all(isinstance(value, kind) for value, kind in zip(values, STAMP, strict=True)):
            raise damaged(self.path, f"what it records about {name!r:.80}")
        size, mtime_ns, sha256, *others = values
        return Embedding(name, size, mtime_ns, sha256, vector, *others)

    def _name(self, path: object) -> str:
        if not isinstance(path, bytes):
            raise damaged(self.path, f"{path!r:.80} as the name of an image")
        return os.fsdecode(path)

    def _columns(self, path: str) -> Any:
        """Those of `STAMPED`, id, length, rows, columns and block of an image. Raises KeyError where it is none."""
        columns = f"{STAMPED[self._format]}, id, length, rows, columns, block"
        if not (found := self._all(f"SELECT {columns} FROM images WHERE path = ?", os.fsencode(path))):
            raise KeyError(path)
        return found[0]

    def _restored(
        self, identity: int, length: float | None, rows: int | None, columns: int | None, block: int
    ) -> NDArray[Any]:
        raw = self._stored(identity, block)
        try:
            vector = np.frombuffer(raw, self.dtype).astype(np.float32)
            vector = vector.reshape(*(axis for axis in (rows, columns) if axis is not None), self.width)
            if not np.isfinite(vector).all():
                raise FloatingPointError
            return vector if length is None else vector * np.float32(length)
        except (ArithmeticError, TypeError, ValueError):
            raise self._broken() from None

    def _stored(self, identity: int, block: int) -> bytes:
        """A vector's bytes. Neighbours are often asked for one after another, so some blocks stay in memory."""
        with self._lock:
            members, vectors = self._blocks.get(block, (np.empty(0, np.int64), b""))
            if identity not in members:  # ids are never used again, so one that is there has the same vector still
                found = self._all("SELECT images, vectors FROM blocks WHERE id = ?", block)
                if not found or not self._held(*found[0]):
                    raise self._broken()
                members, vectors = np.frombuffer(found[0][0], "<i8"), found[0][1]
                while len(self._blocks) >= BLOCKS_HELD:
                    self._blocks.pop(next(iter(self._blocks)))
                self._blocks[block] = members, vectors
        size = len(vectors) // len(members)
        for index in np.flatnonzero(members == identity):
            return vectors[index * size : (index + 1) * size]
        raise self._broken()

    def _broken(self) -> ValueError:
        return damaged(self.path, "an image whose vector is missing or broken")

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._lock, plain_errors(self.path):
            return self._db.execute(query, values).fetchall()


def _checked(date: Date, name: str) -> str:
    """A date as its text. Raises ValueError for what is none."""
    text = str(date)
    with suppress(ValueError):
        if re.fullmatch(r"\d{4}(-\d\d){0,2}", text, re.ASCII) and datetime.date.fromisoformat(f"{text}-01-01"[:10]):
            return text
    raise ValueError(f"{name} (--{name}) must be a date such as 2024, 2024-05 or 2024-05-17, got {text!r}")
