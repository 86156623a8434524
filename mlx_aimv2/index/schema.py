"""Knows the tables of an index, and refuses a file whose schema holds anything else.

A view or a trigger is code: SQLite runs it when a table is read or written, and it may run for ever or delete what is
there. So only the tables of an index, by their own text, are let in.
"""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

APPLICATION_ID = 0x41494D32
"""In the file's header, "AIM2": an index is recognised by it."""

VERSION = 1

TABLES = {
    "about": "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "images": """CREATE TABLE images (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path BLOB NOT NULL UNIQUE,  -- the name's bytes: names need not be UTF-8
    size INTEGER NOT NULL,      -- of the file, in bytes
    mtime_ns INTEGER NOT NULL,
    sha256 BLOB NOT NULL,       -- of the file's content
    length REAL,                -- of the vector before it was scaled to unit length; NULL for tokens and maps
    rows INTEGER,               -- tokens, or rows of a map; NULL for one vector
    columns INTEGER,            -- of a map; NULL otherwise
    block INTEGER NOT NULL
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


def is_blank(db: sqlite3.Connection) -> bool:
    """Whether a database holds nothing at all, as what is left of one whose making broke off."""
    count: int = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return count == 0 and db.execute("PRAGMA application_id").fetchone()[0] == 0


def check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Raises ValueError for a database that is no index, or an index that holds more or less than its tables."""
    if (found := db.execute("PRAGMA application_id").fetchone()[0]) != APPLICATION_ID:
        raise ValueError(f"{path} is no index of mlx-aimv2, but some other database")
    if (found := db.execute("PRAGMA user_version").fetchone()[0]) != VERSION:
        raise ValueError(f"{path} has format {found}, this mlx-aimv2 reads {VERSION}: update it, or embed anew")
    tables = set()
    for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_master"):
        if kind == "table" and name in TABLES and _plain(sql) == _plain(TABLES[name]):
            tables.add(name)
        elif not _is_of_sqlite(kind, name, sql):
            raise ValueError(
                f"{path} is damaged or was tampered with: it holds the {kind} {name!r:.60}, which mlx-aimv2 does not "
                "make and does not run: restore it from a copy, or delete it and embed anew"
            )
    if missing := set(TABLES) - tables:
        raise damaged(path, f"no such table: {', '.join(sorted(missing))}")


def damaged(path: Path, what: str) -> ValueError:
    """The error for an index that cannot be read as it should."""
    return ValueError(f"{path} is damaged ({what}): restore it from a copy, or delete it and embed anew")


def _is_of_sqlite(kind: object, name: object, sql: object) -> bool:
    if kind == "index":
        return str(name).startswith("sqlite_autoindex_") and sql is None
    return kind == "table" and name in OF_SQLITE and str(sql).startswith("CREATE TABLE")


def _plain(sql: object) -> str:
    """A statement without comments and white space, which earlier releases wrote otherwise."""
    return re.sub(r"\s+", "", re.sub(r"--[^\n]*", "", str(sql))).lower()
