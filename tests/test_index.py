"""Does the index give back what was put in, find the nearest exactly, and survive what happens to files?"""

import os
import sqlite3
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2.index.nearest import TILE, Vectors
from mlx_aimv2.index.reader import Embedding, Index, Match
from mlx_aimv2.index.writer import BLOCK, Copy, IndexWriter

WIDTH = 7


def entry(path: str, vector: object, *, content: bytes = b"a") -> Embedding:
    return Embedding(path, 5, 1_700_000_000_123_456_789, content.ljust(32), np.asarray(vector, np.float32))


def some(count: int, *, seed: int = 0) -> list[Embedding]:
    vectors = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return [entry(f"/images/{number:05d}.jpg", vector) for number, vector in enumerate(vectors)]


def unit(embeddings: list[Embedding]) -> np.ndarray:
    vectors = np.stack([one.vector for one in embeddings]).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def index(tmp_path):
    with IndexWriter.create(tmp_path / "a.db", provenance={"pool": "mean"}, width=WIDTH, dtype="float16") as made:
        yield made


def contents(index: Index) -> dict[str, bytes]:
    return {one.path: one.vector.tobytes() for one in index.embeddings()}


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


@pytest.mark.parametrize(
    "name", [b"/a\xff\xfe.jpg", b"/new\nline.jpg", "/Größe – 大.jpg".encode(), b'/it\'s "quoted".jpg']
)
def test_a_name_is_its_bytes(index, name):
    path = os.fsdecode(name)
    index.add([entry(path, np.ones(WIDTH))])
    assert list(index.paths()) == [path]
    assert [os.fsencode(match.path) for match in index.search(np.ones(WIDTH), 1)] == [name]


def test_paths_come_sorted_by_their_bytes(index):
    names = ["/b", "/a", "/é", os.fsdecode(b"/\xff"), "/Z"]
    index.add([entry(name, np.ones(WIDTH)) for name in names])
    assert list(index.paths()) == sorted(names, key=os.fsencode)


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
    index.add([Copy("/moved.jpg", 5, 6, "/images/00002.jpg"), Copy("/images/00003.jpg", 5, 9, "/images/00003.jpg")])
    assert contents(index)["/moved.jpg"] == contents(index)["/images/00002.jpg"]
    assert index.stamp("/moved.jpg").mtime_ns == 6
    assert index.stamp("/images/00003.jpg").mtime_ns == 9
    assert len(index) == 5


def test_an_addition_that_fails_changes_nothing(index):
    index.add(some(3))
    before = contents(index)
    with pytest.raises(KeyError):
        index.add([entry("/new.jpg", np.ones(WIDTH)), Copy("/moved.jpg", 1, 1, "/nowhere.jpg")])
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


def test_numbers_beyond_float16_are_refused_by_name(tmp_path):
    with (
        IndexWriter.create(tmp_path / "t.db", provenance={}, width=2, axes=2, dtype="float16") as index,
        pytest.raises(ValueError, match=r"/big\.jpg: numbers beyond float16"),
    ):
        index.add([entry("/big.jpg", [[1.0, 70000.0]])])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-6)])
def test_search_agrees_with_all_cosines(tmp_path, dtype, tolerance):
    added = some(1013)
    query = np.random.default_rng(5).normal(size=WIDTH)
    cosines = unit(added) @ (query / np.linalg.norm(query))
    with IndexWriter.create(tmp_path / "a.db", provenance={}, width=WIDTH, dtype=dtype) as index:
        index.add(added)
        found = index.search(query, 17)
    np.testing.assert_allclose([match.score for match in found], np.sort(cosines)[::-1][:17], atol=tolerance)
    if dtype == "float32":  # float16 may swap neighbours
        assert [match.path for match in found] == [added[i].path for i in np.argsort(-cosines)[:17]]


def test_a_stored_image_finds_itself_with_a_cosine_of_one(index):
    index.add(some(53))
    best = index.search(index.vector("/images/00031.jpg"), 1)[0]
    assert best.path == "/images/00031.jpg"
    assert best.score == pytest.approx(1, abs=1e-7)


def test_the_length_of_a_query_does_not_matter(index):
    index.add(some(29))
    query = np.arange(1.0, WIDTH + 1)
    small, large = index.search(query * 1e-20, 5), index.search(query * 1e20, 5)
    assert [match.path for match in small] == [match.path for match in large]


def test_equal_vectors_come_in_the_order_of_their_names(index):
    index.add([entry(f"/{name}", np.ones(WIDTH)) for name in "dbaec"])
    assert [match.path for match in index.search(np.ones(WIDTH), 3)] == ["/a", "/b", "/c"]


def test_asking_for_more_than_there_is_gives_all(index):
    index.add(some(3))
    assert len(index.search(np.ones(WIDTH), 100)) == 3


def test_an_empty_index_finds_nothing(index):
    assert index.search(np.ones(WIDTH)) == []


@pytest.mark.parametrize(
    ("vector", "k", "words"),
    [
        (np.ones(WIDTH + 1), 1, "7 numbers"),
        (np.ones((1, WIDTH)), 1, "shape"),
        (np.zeros(WIDTH), 1, "all zero"),
        (np.full(WIDTH, np.nan), 1, "finite"),
        (np.ones(WIDTH), 0, "at least 1"),
    ],
)
def test_a_query_that_cannot_be_compared_is_refused(index, vector, k, words):
    with pytest.raises(ValueError, match=words):
        index.search(vector, k)


def test_a_full_disk_loses_only_what_did_not_fit(index):
    index.add(some(5))
    before = contents(index)
    index._db.execute(f"PRAGMA max_page_count = {index._all('PRAGMA page_count')[0][0] + 1}")
    with pytest.raises(OSError, match=r"a\.db: database or disk is full"):
        index.add(some(20000, seed=2))
    assert contents(index) == before


def test_the_gpus_way_finds_the_same_as_the_cpus(monkeypatch, dtype="float16"):
    monkeypatch.setattr("mlx_aimv2.index.nearest.ON_GPU", TILE)
    random = np.random.default_rng(3)
    count = 3 * TILE + 11
    vectors = random.normal(size=(count, WIDTH))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)
    vectors[77] = vectors[2 * TILE + 5]
    ids = random.permutation(count).astype(np.int64)
    blocks = [(ids[s : s + 1000].tobytes(), vectors[s : s + 1000].tobytes()) for s in range(0, count, 1000)]
    ways = [Vectors.read(iter(blocks), count, width=WIDTH, dtype=dtype, on_gpu=on) for on in (False, True)]
    assert isinstance(ways[0].rows, np.ndarray)
    assert isinstance(ways[1].rows[0], mx.array)
    assert len(ways[1].rows) > 1
    for query in (vectors[77].astype(np.float64), random.normal(size=WIDTH)):
        query = query / np.linalg.norm(query)
        (ids_a, scores_a), (ids_b, scores_b) = (way.nearest(query, 13) for way in ways)
        np.testing.assert_array_equal(ids_a, ids_b)
        np.testing.assert_array_equal(scores_a, scores_b)


@pytest.mark.parametrize("k", [1, 13, 5000])
def test_a_single_search_finds_the_same_without_keeping_anything(index, k):
    index.add(some(4 * BLOCK + 3))
    index.add([replace(one, path=f"/again{one.path}") for one in some(300)])  # equal scores
    for query in (np.arange(1.0, WIDTH + 1), some(1)[0].vector):
        once = index.search(query, k, once=True)
        assert index._vectors is None
        with Index.open(index.path) as other:
            assert once == other.search(query, k)


def test_widening_is_exact_for_every_float16():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)][:63488].reshape(-1, 64)
    ids = np.arange(len(finite), dtype=np.int64)
    read = Vectors.read([(ids.tobytes(), finite.tobytes())], len(finite), width=64, dtype="float16", on_gpu=False)
    np.testing.assert_array_equal(read.rows, finite.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(read.rows), np.signbit(finite))


def test_a_match_is_a_path_and_a_score():
    assert Match("/a", 0.5).path == "/a"


def test_what_is_not_an_index_is_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="mlx-aimv2 embed"):
        Index.open(tmp_path / "none.db")
    with pytest.raises(IsADirectoryError, match="folder"):
        Index.open(tmp_path)
    (tmp_path / "text.db").write_text("not a database at all" * 100)
    with pytest.raises(ValueError, match=r"text\.db is no index"):
        Index.open(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE photos (id)")
    other.commit()
    other.close()
    with pytest.raises(ValueError, match="some other database"):
        Index.open(tmp_path / "other.db")


def test_a_newer_format_is_refused(index):
    index._db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="format 99"):
        Index.open(index.path)


def test_nothing_is_created_over_something(index, tmp_path):
    with pytest.raises(FileExistsError, match=r"a\.db"):
        IndexWriter.create(index.path, provenance={}, width=WIDTH, dtype="float16")
    (tmp_path / "empty.db").touch()
    IndexWriter.create(tmp_path / "empty.db", provenance={}, width=WIDTH, dtype="float16").close()


def test_a_file_that_may_not_be_written_can_be_searched(index):
    index.add(some(3))
    index.close()
    index.path.chmod(0o444)
    with Index.open(index.path) as again:
        assert len(again.search(np.ones(WIDTH), 3)) == 3


def test_an_index_is_one_file(index, tmp_path):
    index.add(some(3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.db"]


def test_a_damaged_file_is_an_error_in_words(index):
    index.add(some(2000))
    index.close()
    with index.path.open("r+b") as file:
        file.seek(40000)
        file.write(b"\xff" * 60000)
    with pytest.raises((OSError, ValueError), match=r"a\.db"), Index.open(index.path) as again:
        list(again.embeddings())


def test_reading_while_another_writes_sees_whole_additions(index):
    index.add(some(3))
    with Index.open(index.path) as reader:
        index.add(some(BLOCK + 7, seed=1))
        assert len(reader) == BLOCK + 7
        assert len(reader.search(np.ones(WIDTH), 5 * BLOCK)) == BLOCK + 7
