"""Small indexes on disk."""

from pathlib import Path

import numpy as np
import pytest

from mlx_aimv2.index.reader import Embedding
from mlx_aimv2.index.writer import IndexWriter
from tests.small_index import MADE, WIDTH


@pytest.fixture
def index(tmp_path):
    with IndexWriter.create(tmp_path / "a.db", provenance={"pool": "mean"}, width=WIDTH, dtype="float16") as made:
        yield made


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Five vectors of seven numbers in `photos.db`."""
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(3).normal(size=(5, WIDTH)).astype(np.float32)
    with IndexWriter.create("photos.db", provenance=MADE, width=WIDTH, dtype="float16") as index:
        index.add(Embedding(f"/{number}.jpg", 5, 6, bytes(32), vector) for number, vector in enumerate(vectors))
    return Path("photos.db")
