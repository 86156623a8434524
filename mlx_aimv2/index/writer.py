"""Writes embeddings into an index file, and removes them when their images are gone.

Each call is one transaction: all of it is on disk when it returns, or nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_aimv2.files import temporary_folder
from mlx_aimv2.index.reader import AXES, Embedding, Index
from mlx_aimv2.index.schema import FILE, SCRIPT, VERSION, connect, is_free, plain_errors, upgrade

BLOCK = 1024
"""Vectors in one row of `blocks`; tokens and maps get a row each, since they may differ in size."""

INSERT = f"INSERT INTO images ({', '.join(FILE)}, length, rows, columns, block) VALUES ({'?, ' * len(FILE)}?, ?, ?, ?)"

RENAME = f"UPDATE images SET {', '.join(f'{name} = ?' for name in FILE)} WHERE path = ?"

Row = tuple[tuple[Any, ...], bytes]
"""All but the last of `INSERT`'s columns of an image's row, and its vector's bytes."""


@dataclass(frozen=True)
class Copy:
    """A file with the content of `source`, an image in the index: it gets the same vector, bit for bit.

    With `is_move` the source's file is gone, and its entry gets the name of this one.
    """

    file: Embedding
    source: str
    is_move: bool = False


class IndexWriter(Index):
    """An index that can be changed."""

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, provenance: Mapping[str, Any], width: int, axes: int = 1, dtype: str
    ) -> IndexWriter:
        """Creates an empty index in a file that does not exist or is empty, completely or not at all.

        `axes` is 1 for one vector of `width` values per image, 2 for tokens, 3 for maps; `dtype` float16 or float32.
        """
        path = Path(path)
        about = {"provenance": json.dumps(provenance), "dtype": dtype, "axes": str(axes), "width": str(width)}
        with temporary_folder(path) as beside:
            db = connect(beside / "index", "rwc")
            try:
                with plain_errors(path):
                    db.executescript(SCRIPT)
                    db.executemany("INSERT INTO about VALUES (?, ?)", about.items())
                    db.execute("COMMIT")
            finally:
                db.close()
            if not is_free(path):  # before, or made meanwhile
                raise FileExistsError(f"{path} already exists: open it, or choose another name")
            (beside / "index").replace(path)
        return cls.open(path)

    def add(self, images: Iterable[Embedding | Copy]) -> None:
        """Stores images, replacing those of the same path.

        Raises ValueError for a vector whose shape differs from the index's and for values beyond its dtype, KeyError
        for a copy or a move of an image that is not in the index.
        """
        images = list(images)
        rows = [self._row(item) for item in images if isinstance(item, Embedding)]
        copies = [item for item in images if isinstance(item, Copy)]
        with self._transaction():
            for item in copies:
                if item.is_move:
                    self._move(item)
            rows += [self._copied(item) for item in copies if not item.is_move]
            self._remove([columns[0] for columns, _ in rows])
            self._append(rows)

    def remove(self, paths: Iterable[str]) -> int:
        """Removes images; returns how many of them were in the index."""
        with self._transaction():
            return self._remove([os.fsencode(path) for path in paths])

    def remember(self, sources: Mapping[str, Any]) -> None:
        """Adds to the folders and patterns the index was made from (`sources`), and removes those with None."""
        with self._transaction():
            found = dict(self._db.execute("SELECT name, value FROM about"))
            known = {**json.loads(found.get("sources", "{}")), **sources}
            self.sources = {name: flags for name, flags in known.items() if flags is not None}
            self._db.execute("INSERT OR REPLACE INTO about VALUES ('sources', ?)", (json.dumps(self.sources),))

    def _row(self, embedding: Embedding) -> Row:
        vector = np.asarray(embedding.vector, np.float32)
        if vector.ndim != self.axes or vector.shape[-1] != self.width:
            wanted = f"{AXES[self.axes]} of width {self.width}"
            raise ValueError(f"{embedding.path}: this index stores {wanted}, got shape {vector.shape}")
        length, (rows, columns) = None, (*vector.shape[:-1], None, None)[:2]
        if self.axes == 1:
            length = float(np.linalg.norm(vector.astype(np.float64)))
            vector = vector / np.float32(length or 1.0)
        with np.errstate(over="ignore"):
            stored = vector.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"{embedding.path}: values beyond {self.dtype}; store float32")
        return (*_of_file(embedding), length, rows, columns), stored.tobytes()

    def _copied(self, copy: Copy) -> Row:
        *_, identity, length, rows, columns, block = self._columns(copy.source)
        return (*_of_file(copy.file), length, rows, columns), self._stored(identity, block)

    def _move(self, move: Copy) -> None:
        if move.source != move.file.path:
            self._columns(move.source)  # raises KeyError before the target's entry is removed
            self._remove([os.fsencode(move.file.path)])
        self._db.execute(RENAME, (*_of_file(move.file), os.fsencode(move.source)))

    def _append(self, rows: Sequence[Row]) -> None:
        capacity = BLOCK if self.axes == 1 else 1
        last = self._db.execute("SELECT id, images, vectors FROM blocks ORDER BY id DESC LIMIT 1").fetchone()
        block, members, vectors = last or (0, b"", b"")
        self._held(members, vectors)
        done = 0
        while done < len(rows):
            free = capacity - len(members) // 8
            if free <= 0:
                block, members, vectors, free = block + 1, b"", b"", capacity
            part = rows[done : done + free]
            ids = [self._db.execute(INSERT, (*columns, block)).lastrowid for columns, _ in part]
            members += np.array(ids, "<i8").tobytes()
            vectors += b"".join(raw for _, raw in part)
            self._db.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", (block, members, vectors))
            done += len(part)

    def _remove(self, paths: Sequence[bytes]) -> int:
        gone: dict[int, list[int]] = {}
        for path in paths:
            found = self._db.execute("SELECT id, block FROM images WHERE path = ?", (path,)).fetchone()
            if found is not None:
                gone.setdefault(found[1], []).append(found[0])
                self._db.execute("DELETE FROM images WHERE id = ?", found[:1])
        for block, ids in gone.items():
            stored: tuple[bytes, bytes] | None
            stored = self._db.execute("SELECT images, vectors FROM blocks WHERE id = ?", (block,)).fetchone()
            self._held(*(stored or (None, None)))
            raw, vectors = stored or (b"", b"")
            members = np.frombuffer(raw, "<i8")
            kept = ~np.isin(members, ids)
            if kept.any():
                left = np.frombuffer(vectors, np.uint8).reshape(len(members), -1)[kept]
                values = (members[kept].tobytes(), left.tobytes(), block)
                self._db.execute("UPDATE blocks SET images = ?, vectors = ? WHERE id = ?", values)
            else:
                self._db.execute("DELETE FROM blocks WHERE id = ?", (block,))
        return sum(len(ids) for ids in gone.values())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, plain_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                upgrade(self._db)
                yield
                self._db.execute("COMMIT")
                self._format = VERSION
            except BaseException:
                if self._db.in_transaction:  # after a full disk SQLite has rolled back by itself
                    self._db.execute("ROLLBACK")
                raise


def _of_file(image: Embedding) -> tuple[Any, ...]:
    return os.fsencode(image.path), *(getattr(image, name) for name in FILE[1:])
