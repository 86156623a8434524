"""The nearest vectors are found exactly, on every device and in every order."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2.index.nearest import TILE, Vectors
from mlx_aimv2.index.reader import Embedding
from mlx_aimv2.index.writer import BLOCK, IndexWriter

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
    ("vector", "k", "message"),
    [
        (np.ones(WIDTH + 1), 1, "7 values"),
        (np.ones((2, WIDTH)), 1, "shape"),
        (np.zeros(WIDTH), 1, "all zero"),
        (np.full(WIDTH, np.nan), 1, "finite"),
        (np.ones(WIDTH), 0, "at least 1"),
    ],
)
def test_a_query_that_cannot_be_compared_is_refused(index, vector, k, message):
    with pytest.raises(ValueError, match=message):
        index.search(vector, k)


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
def test_the_best_of_several_blocks_are_found_and_equal_ones_by_name(index, k):
    index.add(some(4 * BLOCK + 3))
    index.add([replace(one, path=f"/again{one.path}") for one in some(300)])
    stored = list(index.embeddings())
    for query in (np.arange(1.0, WIDTH + 1), some(1)[0].vector):
        cosines = np.sort(unit(stored) @ (query / np.linalg.norm(query)))[::-1]
        found = index.search(query, k)
        np.testing.assert_allclose([one.score for one in found], cosines[:k], atol=1e-6)
        assert found == sorted(found, key=lambda one: (-one.score, one.path))
        scores = {one.path: one.score for one in found}
        assert all(scores.get(f"/again{path}", score) == score for path, score in scores.items())


def test_widening_is_exact_for_every_float16():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)][:63488].reshape(-1, 64)
    ids = np.arange(len(finite), dtype=np.int64)
    read = Vectors.read([(ids.tobytes(), finite.tobytes())], len(finite), width=64, dtype="float16", on_gpu=False)
    np.testing.assert_array_equal(read.rows, finite.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(read.rows), np.signbit(finite))


def test_the_rounded_scores_of_a_gpu_lose_none_of_the_nearest():
    random = np.random.default_rng(8)
    centre = random.normal(size=WIDTH)
    vectors = centre / np.linalg.norm(centre) + 0.02 * random.normal(size=(997, WIDTH))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    block = np.arange(997).astype("<i8").tobytes(), vectors.tobytes()
    query = centre / np.linalg.norm(centre)
    on_cpu, on_gpu = (
        set(Vectors.read([block], 997, width=WIDTH, dtype="float16", on_gpu=on).nearest(query, 13)[0].tolist())
        for on in (False, True)
    )
    assert on_gpu == on_cpu


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_combined_query_is_the_sum_of_unit_vectors_and_exact_with_ties(tmp_path, dtype):
    """Against brute force: scores to 1e-6 and the same order, equal ones by path."""
    rng = np.random.default_rng(11)
    added = [entry(f"/images/{number:05d}.jpg", rng.integers(-2, 3, WIDTH) + 0.5) for number in range(3001)]
    parts = [(1.0, rng.normal(size=WIDTH)), (2.5, rng.normal(size=WIDTH) * 1e3), (-1.0, rng.normal(size=WIDTH))]
    query = sum(weight * vector / np.linalg.norm(vector) for weight, vector in parts)
    with IndexWriter.create(tmp_path / "a.db", provenance={}, width=WIDTH, dtype=dtype) as index:
        index.add(added)
        stored = np.stack([index.vector(one.path) for one in added]).astype(np.float64)
        found = index.search(parts, 53)
    cosines = stored @ (query / np.linalg.norm(query)) / np.linalg.norm(stored, axis=1)
    order = sorted(range(len(added)), key=lambda i: (-round(cosines[i], 9), added[i].path))[:53]
    assert [match.path for match in found] == [added[i].path for i in order]
    np.testing.assert_allclose([match.score for match in found], cosines[order], atol=1e-6)


@pytest.mark.parametrize("of", [mx.array, lambda x: mx.array(x).astype(mx.bfloat16), lambda x: mx.array(x)[None], list])
def test_a_query_may_be_what_a_model_gives(index, of):
    index.add(some(29))
    query = np.arange(1.0, WIDTH + 1, dtype=np.float32)
    assert index.search(of(query), 5) == index.search(query, 5)


def test_parts_that_cancel_out_are_refused_also_as_float16_holds_one_of_them(index):
    vector = np.arange(1.0, WIDTH + 1) / 3
    for other in (3 * vector, 1e-300 * vector, vector.astype(np.float16)):
        for weight in (1e-9, 1.0, 1e5):
            with pytest.raises(ValueError, match="cancel out"):
                index.search([(weight, vector), (-weight, other)])


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e308])
def test_a_weight_is_a_number_that_says_something(index, weight):
    with pytest.raises(ValueError, match="a weight must be a number up to 1e\\+06"):
        index.search([(weight, np.ones(WIDTH))])


@pytest.mark.parametrize("score", [math.nan, 1.01, -2])
def test_a_least_score_that_no_cosine_can_have_is_refused(index, score):
    with pytest.raises(ValueError, match=r"min_score \(--min-score\) must be a cosine from -1 to 1"):
        index.search(np.ones(WIDTH), min_score=score)


def test_only_images_under_a_folder_and_above_a_score_are_found(index):
    vectors = np.random.default_rng(2).normal(size=(41, WIDTH))
    names = ["/a/{}.jpg", "/a/b/{}.jpg", "/ab/{}.jpg", "/a.jpg{}"]
    index.add([entry(names[i % 4].format(i), vector) for i, vector in enumerate(vectors)])
    query = np.ones(WIDTH)
    everything = index.search(query, 100)
    below = [match for match in everything if match.path.startswith("/a/")]
    assert index.search(query, 100, under="/a") == index.search(query, 100, under="/a/b/..") == below
    assert index.search(query, 3, under="/a") == below[:3]
    assert index.search(query, 100, under="/nothing") == []
    least = below[4].score
    assert index.search(query, 100, under="/a", min_score=least) == below[:5]
    assert index.search(query, 100, under="/") == everything
