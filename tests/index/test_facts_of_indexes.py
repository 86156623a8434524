"""What an index is promised to find and to keep, to the last digit."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_aimv2.index import Index
from mlx_aimv2.index.writer import IndexWriter
from tests.image_files import image
from tests.small_index import MADE, WIDTH, entry


@pytest.mark.parametrize("once", [False, True], ids=["held in memory", "read from disk"])
@pytest.mark.parametrize("count", [1500, 5000])
def test_the_nearest_are_the_nearest_however_close_they_lie(tmp_path, count, once):
    """Stored in half precision, whose rounding changes a vector's length more than its neighbours differ."""
    rng = np.random.default_rng(count)
    middle = rng.normal(size=WIDTH)
    vectors = middle + 1e-2 * rng.normal(size=(count, WIDTH))
    index = IndexWriter.create(tmp_path / "i.db", provenance=MADE, dtype="float16", axes=1, width=WIDTH)
    index.add(entry(f"/{number}.jpg", vector) for number, vector in enumerate(vectors))
    index.close()
    with Index.open(tmp_path / "i.db") as index:
        stored = {path: index.vector(path).astype(np.float64) for path in index.paths()}
        for seed in range(20):
            query = middle + 1e-2 * np.random.default_rng(seed).normal(size=WIDTH)
            cosines = {path: row @ query / np.linalg.norm(row) for path, row in stored.items()}
            wanted = sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]
            assert [match.path for match in index.search(query, k=3, once=once)] == wanted


def test_a_copy_keeps_the_digest_of_its_content(embed_command, tmp_path):
    """A file that goes on under two new names is moved to one and copied to the other."""
    for number in range(3):
        image(tmp_path / "in" / f"{number}.png", (50, 71), number)
    assert embed_command("in")[0] == 0
    (tmp_path / "in" / "1.png").rename(tmp_path / "in" / "8.png")
    shutil.copy(tmp_path / "in" / "8.png", tmp_path / "in" / "9.png")
    assert embed_command("in")[0] == 0
    with Index.open(tmp_path / "photos.db") as index:
        found = {Path(one.path).name: (one.sha256, one.vector.tolist()) for one in index.embeddings()}
    assert found.keys() == {"0.png", "2.png", "8.png", "9.png"}
    for name, (sha256, _) in found.items():
        assert sha256 == hashlib.sha256((tmp_path / "in" / name).read_bytes()).digest()
    assert found["8.png"] == found["9.png"]
