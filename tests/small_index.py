"""Entries and provenance of small indexes, and commands that damage them."""

import sqlite3
from pathlib import Path

import numpy as np

from mlx_aimv2.index.reader import Embedding

WIDTH = 7

MADE = {
    "checkpoint": "somewhere",
    "commit": None,
    "dtype": "float32",
    "pool": "mean",
    "layer": None,
    "norm": False,
    "max_patches": None,
    "weights": {"digest": "00", "sample": [1.0]},
}


def entry(path: str, vector: object, *, content: bytes = b"a") -> Embedding:
    return Embedding(path, 5, 1_700_000_000_123_456_789, content.ljust(32), np.asarray(vector, np.float32))


def some(count: int, *, seed: int = 0) -> list[Embedding]:
    vectors = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return [entry(f"/images/{number:05d}.jpg", vector) for number, vector in enumerate(vectors)]


def change(path: Path, command: str, *values: object) -> None:
    with sqlite3.connect(path) as db:
        db.execute(command, values)
    db.close()
