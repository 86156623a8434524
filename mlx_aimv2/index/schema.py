"""The file of an index: SQLite's, its tables by their own text, its formats, and what is refused.

A view or a trigger is code: SQLite runs it when a table is read or written, and it may run forever or delete data. So
only the tables of an index, compared by their SQL text, are accepted.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

APPLICATION_ID = 0x41494D32
"""In the file's header, "AIM2": an index is recognised by it."""

VERSION = 3

ADDED = {"ctime_ns": (2, "INTEGER"), "inode": (2, "INTEGER"), "taken": (3, "TEXT")}
"""Column that format 1 lacks -> the format that has it first, and its type.

The next writer adds it; it is NULL where an earlier release embedded the image, until an update reads that once more.
"""

FILE = ("path", "size", "mtime_ns", "sha256", *ADDED)
"""Columns with what an `Embedding` says of its file, by the names of its fields."""

STAMPED = {
    version: ", ".join(name if ADDED.get(name, (1,))[0] <= version else "NULL" for name in FILE)
    for version in range(1, VERSION + 1)
}
"""Format -> these columns, NULL for those that it lacks."""

TABLES = {
    "about": "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "images": f"""CREATE TABLE images (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path BLOB NOT NULL UNIQUE,  -- the name's bytes: names need not be UTF-8
    size INTEGER NOT NULL,      -- of the file, in bytes
    mtime_ns INTEGER NOT NULL,
    sha256 BLOB NOT NULL,       -- of the file's content
    length REAL,                -- of the vector before it was scaled to unit length; NULL for tokens and maps
    rows INTEGER,               -- tokens, or rows of a map; NULL for one vector
    columns INTEGER,            -- of a map; NULL otherwise
    block INTEGER NOT NULL,
    {", ".join(f"{name} {kind}" for name, (_, kind) in ADDED.items())}
)""",
    "blocks": "CREATE TABLE blocks (id INTEGER PRIMARY KEY, images BLOB NOT NULL, vectors BLOB NOT NULL)",
}

SCRIPT = f"""
PRAGMA page_size = 32768;  -- a float16 vector of 1024 values fills half of SQLite's usual page
BEGIN IMMEDIATE;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
{"".join(f"{table};" for table in TABLES.values())}
"""
"""Makes an empty index; the transaction stays open."""

OF_SQLITE = ("sqlite_sequence", "sqlite_stat1", "sqlite_stat4")
"""Tables that SQLite makes by itself, or for ANALYZE."""

BUSY_SECONDS = 60.0


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """SQLite's connection to a file: mode `ro`, `rw` or, to make it, `rwc`; transactions are begun by hand."""
    name = quote(os.fsencode(path.absolute()))
    with plain_errors(path):
        db = sqlite3.connect(
            f"file:{name}?mode={mode}",
            uri=True,
            isolation_level=None,
            timeout=BUSY_SECONDS,
            check_same_thread=False,  # `Index` has a lock
        )
        db.execute("PRAGMA trusted_schema = OFF")  # functions with side effects, from an untrusted file
        return db


def upgrade(db: sqlite3.Connection) -> None:
    """Adds the columns that an earlier format lacks, within a transaction."""
    if (found := db.execute("PRAGMA user_version").fetchone()[0]) < VERSION:
        for name, (since, kind) in ADDED.items():
            if since > found:
                db.execute(f"ALTER TABLE images ADD COLUMN {name} {kind}")
        db.execute(f"PRAGMA user_version = {VERSION}")


def is_free(path: Path) -> bool:
    """Whether an index can be made there: nothing has the name, or an empty file."""
    return not path.exists() or (path.is_file() and not path.stat().st_size)


@contextlib.contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turns SQLite's exceptions into those of files, with the file's name."""
    try:
        yield
    except UnicodeDecodeError as error:  # in the text of its own tables
        raise damaged(path, str(error)) from None
    except sqlite3.DatabaseError as error:
        text = " ".join(str(error).split())[:200]
        if "not a database" in text:
            raise ValueError(f"{path} is not an index of mlx-aimv2, nor any other database") from None
        if any(phrase in text for phrase in ("malformed", "no such table", "no such column", "Could not decode")):
            raise damaged(path, text) from None
        raise OSError(f"{path}: {text}") from None


def check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Raises ValueError for a database that is no index, or an index that holds more or less than its tables."""
    if (found := db.execute("PRAGMA application_id").fetchone()[0]) != APPLICATION_ID:
        raise ValueError(f"{path} is not an index of mlx-aimv2, but another database")
    if (found := db.execute("PRAGMA user_version").fetchone()[0]) not in STAMPED:
        raise ValueError(f"{path} has format {found}, this mlx-aimv2 reads {VERSION}: update it, or embed again")
    added = "".join(f",{name}{kind}".lower() for name, (since, kind) in ADDED.items() if since > found)
    wanted = {name: _plain(sql).replace(added, "") for name, sql in TABLES.items()}
    tables = set()
    for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_master"):
        if kind == "table" and name in wanted and _plain(sql) == wanted[name]:
            tables.add(name)
        elif not (
            (kind == "index" and str(name).startswith("sqlite_autoindex_") and sql is None)
            or (kind == "table" and name in OF_SQLITE and str(sql).startswith("CREATE TABLE"))
        ):
            raise ValueError(
                f"{path} is damaged or was tampered with: it has the {kind} {name!r:.60}, which mlx-aimv2 does not "
                "create or run: restore it from a copy, or delete it and embed again"
            )
    if missing := set(TABLES) - tables:
        raise damaged(path, f"no such table: {', '.join(sorted(missing))}")


def damaged(path: Path, what: str) -> ValueError:
    """The error for an index that cannot be read as it should."""
    return ValueError(f"{path} is damaged ({what}): restore it from a copy, or delete it and embed again")


def _plain(sql: object) -> str:
    """A statement without comments and white space, which earlier releases wrote otherwise."""
    return re.sub(r"\s+", "", re.sub(r"--[^\n]*", "", str(sql))).lower()
