"""The folder on this machine that keeps what is costly to compute again: which files are good images, and features."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import NamedTuple

from mlx_aimv2.files import cache_folder

SETTLED_NS = 2_000_000_000
"""A file that was changed this recently may change again within the clock's step: it is not remembered."""


class Known(NamedTuple):
    """What is known of a good image: its SHA-256, its (height, width) upright, and whether it was decoded.

    Of one that was not, the header alone was read.
    """

    sha256: bytes
    size: tuple[int, int]
    decoded: bool


class KnownFiles:
    """Remembers what is known of images, by the file's name, size and time of change."""

    def __init__(self) -> None:
        self.path = cache_folder() / "files.db"

    def look_up(self, paths: Sequence[str], *, decoded: bool = True) -> dict[str, Known]:
        """What is known of those files that are as they were, with `decoded` of those alone that were decoded."""
        if not self.path.is_file():
            return {}
        known = {}
        try:
            with closing(self._connect()) as database:
                for path in paths:
                    about = _about(path)
                    row = (
                        about
                        and database.execute(
                            "SELECT sha256, height, width, decoded FROM images"
                            " WHERE path = ? AND size = ? AND mtime_ns = ? AND decoded >= ?",
                            (_key(path), *about, decoded),
                        ).fetchone()
                    )
                    if row:
                        known[path] = Known(bytes(row[0]), (row[1], row[2]), bool(row[3]))
        except sqlite3.Error:
            return {}  # a cache that cannot be read is no cache
        return known

    def remember(self, files: Iterable[tuple[str, Known]]) -> None:
        """Keeps what is known of files, pairs of path and Known, as far as the disk lets it."""
        settled = time.time_ns() - SETTLED_NS
        rows = [
            (_key(path), *about, known.sha256, *known.size, known.decoded)
            for path, known in files
            if (about := _about(path)) and about[1] < settled
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS images (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER,"
                    " sha256 BLOB, height INTEGER, width INTEGER, decoded INTEGER) WITHOUT ROWID"
                )
                database.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except (sqlite3.Error, OSError):
            return

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=5)
        database.execute("PRAGMA trusted_schema = OFF")
        return database


def _key(path: str) -> bytes:
    return os.fsencode(os.path.abspath(path))  # noqa: PTH100 - a Path would cost more than the look-up itself


def _about(path: str) -> tuple[int, int] | None:
    try:
        about = os.stat(path)  # noqa: PTH116 - as above
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns
