"""An index gives back what was put in, and refuses files that are something else."""

import contextlib
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from mlx_aimv2.index.reader import Index, Match
from mlx_aimv2.index.writer import BLOCK, IndexWriter
from tests.small_index import WIDTH, entry, some


def test_what_was_added_is_there_after_opening_again(index):
    added = some(5)
    index.add(added)
    with Index.open(index.path) as again:
        assert len(again) == 5
        assert again.provenance == {"pool": "mean"}
        for one, back in zip(added, again.embeddings(), strict=True):
            assert replace(one, vector=None) == replace(back, vector=None)
            np.testing.assert_allclose(back.vector, one.vector, rtol=2**-10, atol=1e-6)


def test_float32_is_kept_to_the_last_digits(tmp_path):
    with IndexWriter.create(tmp_path / "a.db", provenance={}, width=WIDTH, dtype="float32") as index:
        index.add(some(3))
        for one in some(3):
            np.testing.assert_allclose(index.vector(one.path), one.vector, rtol=1e-6)


def test_a_vector_of_zeros_is_kept_and_like_none(index):
    index.add([entry("/black.jpg", np.zeros(WIDTH)), *some(2)])
    assert not index.vector("/black.jpg").any()
    assert {match.path: match.score for match in index.search(np.ones(WIDTH), 3)}["/black.jpg"] == 0


@pytest.mark.parametrize(
    "name", [b"/a\xff\xfe.jpg", b"/new\nline.jpg", "/Größe – 大.jpg".encode(), b'/it\'s "quoted".jpg']
)
def test_a_name_is_its_bytes(index, name):
    path = os.fsdecode(name)
    index.add([entry(path, np.ones(WIDTH))])
    assert list(index.paths()) == [path]
    assert [os.fsencode(match.path) for match in index.search(np.ones(WIDTH), 1)] == [name]


@pytest.mark.parametrize("name", ["what?.db", "no#1.db", "100%41.db", "a b.db"])
def test_an_index_may_have_any_name(tmp_path, name):
    with IndexWriter.create(tmp_path / name, provenance={}, width=WIDTH, dtype="float16") as index:
        index.add(some(3))
    assert [file.name for file in tmp_path.iterdir()] == [name]
    with Index.open(tmp_path / name) as again:
        assert len(again) == 3


def test_paths_come_sorted_by_their_bytes(index):
    names = ["/b", "/a", "/é", os.fsdecode(b"/\xff"), "/Z"]
    index.add([entry(name, np.ones(WIDTH)) for name in names])
    assert list(index.paths()) == sorted(names, key=os.fsencode)
    assert [one.path for one in index.embeddings()] == list(index.paths())


def test_an_image_that_goes_while_all_are_read_ends_the_reading(index):
    index.add(some(3))
    with pytest.raises(OSError, match=r"a\.db was changed while it was read: run it again"):
        for one in index.embeddings():
            index.remove(["/images/00002.jpg", one.path])


def test_tokens_and_maps_come_back_in_their_shapes(tmp_path):
    for axes, shapes in ((2, [(3, WIDTH), (5, WIDTH)]), (3, [(2, 3, WIDTH), (1, 5, WIDTH)])):
        with IndexWriter.create(
            tmp_path / f"{axes}.db", provenance={}, width=WIDTH, axes=axes, dtype="float32"
        ) as index:
            arrays = [np.random.default_rng(n).normal(size=shape).astype(np.float32) for n, shape in enumerate(shapes)]
            index.add([entry(f"/{n}", array) for n, array in enumerate(arrays)])
            index.remove(["/0"])
            np.testing.assert_array_equal(index.vector("/1"), arrays[1])
            with pytest.raises(ValueError, match="needs one vector"):
                index.search(np.ones(WIDTH))


def test_a_match_is_a_path_and_a_score():
    assert Match("/a", 0.5).path == "/a"


def test_what_is_not_an_index_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="mlx-aimv2 embed"):
        Index.open(tmp_path / "none.db")
    with pytest.raises(IsADirectoryError, match="folder"):
        Index.open(tmp_path)
    (tmp_path / "text.db").write_text("not a database at all" * 100)
    with pytest.raises(ValueError, match=r"text\.db is not an index"):
        Index.open(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE photos (id)")
    other.commit()
    other.close()
    with pytest.raises(ValueError, match="another database"):
        Index.open(tmp_path / "other.db")


def test_a_newer_format_is_refused(index):
    index._db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="format 99"):
        Index.open(index.path)


def test_a_file_that_may_not_be_written_can_be_searched(index):
    index.add(some(3))
    index.close()
    index.path.chmod(0o444)
    with Index.open(index.path) as again:
        assert len(again.search(np.ones(WIDTH), 3)) == 3


def test_an_index_is_one_file(index, tmp_path):
    index.add(some(3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.db"]


def test_a_damaged_file_is_an_error_in_one_line(index):
    index.add(some(2000))
    index.close()
    with index.path.open("r+b") as file:
        file.seek(40000)
        file.write(b"\xff" * 60000)
    with pytest.raises((OSError, ValueError), match=r"a\.db"), Index.open(index.path) as again:
        list(again.embeddings())


def test_who_reads_waits_until_a_writer_is_done(index):
    def count():
        with Index.open(index.path) as reader:
            return len(reader)

    index.add(some(3))
    with contextlib.closing(sqlite3.connect(index.path, isolation_level=None)) as writer, ThreadPoolExecutor(1) as pool:
        writer.execute("BEGIN EXCLUSIVE")
        found = pool.submit(count)
        time.sleep(0.2)
        assert not found.done()
        writer.execute("ROLLBACK")
        assert found.result() == 3


def test_reading_while_another_writes_sees_whole_additions(index):
    index.add(some(3))
    with Index.open(index.path) as reader:
        index.add(some(BLOCK + 7, seed=1))
        assert len(reader) == BLOCK + 7
        assert len(reader.search(np.ones(WIDTH), 5 * BLOCK)) == BLOCK + 7
