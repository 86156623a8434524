"""What is added, replaced and removed is on disk whole, or nothing of it."""

import numpy as np
import pytest

from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.index.schema import connect
from mlx_aimv2.index.writer import BLOCK, Copy, IndexWriter
from tests.small_index import WIDTH, entry, some


def contents(index: Index) -> dict[str, bytes]:
    return {one.path: one.vector.tobytes() for one in index.embeddings()}


def copied(path: str, source: str, size: int, mtime_ns: int, **more: bool) -> Copy:
    return Copy(Embedding(path, size, mtime_ns, bytes(32), np.empty(0)), source, **more)


def test_adding_a_path_again_replaces_it(index):
    index.add(some(3))
    index.add([entry("/images/00001.jpg", np.arange(WIDTH), content=b"b")])
    assert len(index) == 3
    assert index.stamp("/images/00001.jpg").sha256 == b"b".ljust(32)
    np.testing.assert_allclose(index.vector("/images/00001.jpg"), np.arange(WIDTH), rtol=1e-3)


def test_removing_leaves_the_others_as_they_were(index):
    index.add(some(BLOCK + 5))
    before = contents(index)
    gone = [f"/images/{number:05d}.jpg" for number in (0, 3, BLOCK - 1, BLOCK, BLOCK + 4)]
    assert index.remove([*gone, "/never/there.jpg"]) == 5
    assert contents(index) == {path: vector for path, vector in before.items() if path not in gone}
    assert {match.path for match in index.search(np.ones(WIDTH), 2 * BLOCK)} == set(before) - set(gone)


def test_a_block_whose_images_are_all_gone_is_gone_too(index):
    index.add(some(BLOCK + 1))
    index.remove([f"/images/{number:05d}.jpg" for number in range(BLOCK)])
    assert index._all("SELECT count(*) FROM blocks") == [(1,)]
    assert len(index.search(np.ones(WIDTH), 9)) == 1


def test_small_additions_share_a_block(index):
    for one in some(11):
        index.add([one])
    assert index._all("SELECT count(*) FROM blocks") == [(1,)]


def test_a_copy_has_the_same_bits(index):
    index.add(some(4))
    index.add([copied("/moved.jpg", "/images/00002.jpg", 5, 6), copied("/images/00003.jpg", "/images/00003.jpg", 5, 9)])
    assert contents(index)["/moved.jpg"] == contents(index)["/images/00002.jpg"]
    assert index.stamp("/moved.jpg").mtime_ns == 6
    assert index.stamp("/images/00003.jpg").mtime_ns == 9
    assert len(index) == 5


def test_what_is_moved_keeps_its_vector_and_replaces_what_had_its_name(index):
    index.add(some(4))
    before = contents(index)
    index.add([copied("/images/00001.jpg", "/images/00003.jpg", 7, 8, is_move=True)])
    moved = before.pop("/images/00003.jpg")
    assert contents(index) == before | {"/images/00001.jpg": moved}
    assert (index.stamp("/images/00001.jpg").size, index.stamp("/images/00001.jpg").mtime_ns) == (7, 8)


def test_a_copy_may_be_of_what_is_moved_with_it(index):
    index.add(some(3))
    before = contents(index)
    index.add([copied("/copy.jpg", "/moved.jpg", 5, 6), copied("/moved.jpg", "/images/00002.jpg", 5, 6, is_move=True)])
    moved = before.pop("/images/00002.jpg")
    assert contents(index) == before | {"/copy.jpg": moved, "/moved.jpg": moved}


def test_an_addition_that_fails_changes_nothing(index):
    index.add(some(3))
    before = contents(index)
    with pytest.raises(KeyError):
        index.add([entry("/new.jpg", np.ones(WIDTH)), copied("/moved.jpg", "/nowhere.jpg", 1, 1)])
    with pytest.raises(KeyError):
        index.add([copied("/images/00001.jpg", "/nowhere.jpg", 1, 1, is_move=True)])
    with pytest.raises(ValueError, match="shape"):
        index.add([entry("/new.jpg", np.ones(WIDTH)), entry("/wide.jpg", np.ones(WIDTH + 1))])
    assert contents(index) == before


def test_after_a_failure_halfway_the_next_addition_works(index):
    index.add(some(3))
    before = contents(index)
    with pytest.raises(OSError, match="UNIQUE"):
        index.add([entry("/new.jpg", np.ones(WIDTH)), entry("/new.jpg", np.ones(WIDTH))])
    assert contents(index) == before
    index.add([entry("/new.jpg", np.ones(WIDTH))])
    assert len(index) == 4


def test_numbers_beyond_float16_are_refused_by_name(tmp_path):
    with (
        IndexWriter.create(tmp_path / "t.db", provenance={}, width=2, axes=2, dtype="float16") as index,
        pytest.raises(ValueError, match=r"/big\.jpg: values beyond float16"),
    ):
        index.add([entry("/big.jpg", [[1.0, 70000.0]])])


def test_a_full_disk_loses_only_what_did_not_fit(index):
    index.add(some(5))
    before = contents(index)
    index._db.execute(f"PRAGMA max_page_count = {index._all('PRAGMA page_count')[0][0] + 1}")
    with pytest.raises(OSError, match=r"a\.db: database or disk is full"):
        index.add(some(20000, seed=2))
    assert contents(index) == before


def test_what_appears_while_an_index_is_made_is_not_replaced(tmp_path, monkeypatch):
    def meanwhile(path, mode):
        (tmp_path / "b.db").write_bytes(b"somebody's")
        return connect(path, mode)

    monkeypatch.setattr("mlx_aimv2.index.writer.connect", meanwhile)
    with pytest.raises(FileExistsError, match=r"b\.db already exists"):
        IndexWriter.create(tmp_path / "b.db", provenance={}, width=WIDTH, dtype="float16")
    assert (tmp_path / "b.db").read_bytes() == b"somebody's"


def test_nothing_is_created_over_something(index, tmp_path):
    with pytest.raises(FileExistsError, match=r"a\.db"):
        IndexWriter.create(index.path, provenance={}, width=WIDTH, dtype="float16")
    (tmp_path / "empty.db").touch()
    IndexWriter.create(tmp_path / "empty.db", provenance={}, width=WIDTH, dtype="float16").close()
