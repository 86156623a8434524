"""The folder on this machine that keeps what is costly to compute again: which files are good images, and features."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from mlx_aimv2.files import cache_folder

SETTLED_NS = 2_000_000_000
"""A file that was changed this recently may change again within the clock's step: it is not remembered."""


class KnownFiles:
    """Remembers the SHA-256 of files that were decoded without fault, by name, size and time of change."""

    def __init__(self) -> None:
        self.path = cache_folder() / "files.db"

    def look_up(self, paths: Sequence[str]) -> dict[str, bytes]:
        """The SHA-256 of those files that are as they were."""
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
                            "SELECT sha256 FROM files WHERE path = ? AND size = ? AND mtime_ns = ?",
                            (os.fsencode(Path(path).absolute()), *about),
                        ).fetchone()
                    )
                    if row:
                        known[path] = bytes(row[0])
        except sqlite3.Error:
            return {}  # a cache that cannot be read is no cache
        return known

    def remember(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Keeps pairs of path and SHA-256, as far as the disk lets it."""
        settled = time.time_ns() - SETTLED_NS
        rows = [
            (os.fsencode(Path(path).absolute()), *about, sha256)
            for path, sha256 in files
            if (about := _about(path)) and about[1] < settled
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS files"
                    " (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB) WITHOUT ROWID"
                )
                database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        except (sqlite3.Error, OSError):
            return

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=5)
        database.execute("PRAGMA trusted_schema = OFF")
        return database


def _about(path: str) -> tuple[int, int] | None:
    try:
        about = Path(path).stat()
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns
