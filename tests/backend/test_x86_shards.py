"""On x86 the cores share a forward pass without changing its result."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel, load
from mlx_aimv2.backend import device, run_blocks, x86
from mlx_aimv2.backend.x86 import IMAGES, TOKENS, Shards
from mlx_aimv2.cli import bench
from tests.exact import ALLOWED, NEAR, error, pair, roundings
from tests.programs import HANGS, running

pytestmark = pytest.mark.rounding

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
OPENBLAS = Path(f"/usr/lib/{platform.machine()}-linux-gnu/libopenblas.so.0")

FIXED = Aimv2VisionConfig(22, 13, 3, 2, image_size=15, patch_size=5)
NATIVE = Aimv2VisionConfig(28, 13, 3, 7, patch_size=5, is_native=True)


def close(found: mx.array, wanted: mx.array) -> bool:
    return found.shape == wanted.shape and roundings(found, wanted) <= NEAR


@pytest.mark.parametrize(
    ("shape", "whole", "count", "axis"),
    [
        ((1, 256), False, 3, TOKENS),
        ((1, 150), False, 2, TOKENS),
        ((1, 127), False, 1, TOKENS),
        ((3, 256), False, 3, IMAGES),
        ((4, 256), False, 3, TOKENS),  # two images for one shard would be half as much again
        ((30, 256), False, 3, IMAGES),
        ((31, 256), False, 3, IMAGES),
        ((2, 1024), False, 3, TOKENS),
        ((5, 77), True, 3, IMAGES),
        ((2, 77), True, 2, IMAGES),
        ((1, 512), True, 1, TOKENS),
    ],
)
def test_shards_are_cut_evenly_and_long_enough(three_cores, shape, whole, count, axis):
    three_cores(blas_threads=1)
    shards = Shards.of((*shape, 7), whole=whole)
    assert (len(shards.streams), shards.axis) == (count, axis)
    parts = shards.split(mx.arange(shape[0] * shape[1]).reshape(*shape, 1))
    assert len(parts) == count
    assert mx.array_equal(shards.join(parts).flatten(), mx.arange(shape[0] * shape[1]))


def test_a_blas_of_several_threads_and_a_gpu_leave_one_shard(three_cores, monkeypatch):
    three_cores(blas_threads=2)
    assert Shards.of((8, 256, 7)).streams == [None]
    three_cores(blas_threads=1)
    monkeypatch.setattr(x86, "on_x86_cpu", lambda: False)
    assert Shards.of((8, 256, 7)).streams == [None]


def test_no_more_shards_than_mlx_runs_side_by_side():
    """In a program of its own, which has not seen its cores before: a process gives few of its threads several."""
    program = """
import mlx.core as mx
from mlx_aimv2.backend import x86
x86.on_x86_cpu, x86.cpu_count, x86.blas_threads = lambda: True, lambda: 64, lambda: 1
own = x86.Shards.of((64, 256, 7)).streams
print(len(own), mx.default_stream(mx.cpu) in own)
"""
    with running(sys.executable, "-c", program) as process:
        count, has_default = process.communicate(timeout=HANGS)[0].split()
    assert int(count) == x86.MAX_STREAMS
    assert has_default == "False", "a shard would wait for what the default stream adds up"


def test_each_shard_is_a_core_of_its_own(three_cores):
    three_cores(blas_threads=1)
    shards = Shards.of((3, 256, 7))
    assert shards.run(lambda: mx.default_stream(mx.cpu)) == shards.streams
    assert len({str(stream) for stream in shards.streams}) == 3


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("config", [FIXED, NATIVE], ids=["fixed", "native"])
def test_shards_change_no_feature(three_cores, config, batch):
    model = Aimv2VisionModel(config)
    pixels = bench.random_pixels(config, batch=batch, side=25)
    alone = model(pixels, output_hidden_states=True)
    mx.eval(alone.last_hidden_state, alone.hidden_states)
    three_cores(blas_threads=1, MIN_SHARD_TOKENS=1)
    shared = model(pixels, output_hidden_states=True)
    assert close(shared.last_hidden_state, alone.last_hidden_state)
    assert all(map(close, shared.hidden_states, alone.hidden_states))


@pytest.mark.parametrize("blas_threads", [1, 4])
def test_shards_and_chunks_change_no_match_of_images_and_texts(three_cores, blas_threads):
    model, _ = load(REFERENCE / "lit")
    with np.load(REFERENCE / "lit" / "expected.npz") as expected:
        pixels = mx.array(expected["pixel_values"].transpose(0, 2, 3, 1))
        ids, logits = mx.array(expected["input_ids"]), expected["logits_per_image"]
        exact = pair(REFERENCE / "lit", expected["pixel_values"], expected["input_ids"])["logits_per_image"]
    three_cores(blas_threads=blas_threads, MIN_SHARD_TOKENS=1, MIN_SHARED=1, CHUNK=50)
    assert error(model(pixels, ids).logits_per_image, exact) <= ALLOWED * error(logits, exact)


def test_a_single_block_is_shared_too(three_cores):
    block, x = Aimv2VisionModel(FIXED).blocks[1], mx.random.normal((1, 7, 22))
    alone = block(x)
    mx.eval(alone)
    three_cores(blas_threads=1, MIN_SHARD_TOKENS=1)
    assert close(next(run_blocks([block], x)), alone)


def test_gradients_pass_through_shards(three_cores):
    model, pixels = Aimv2VisionModel(FIXED), bench.random_pixels(FIXED, batch=1)
    # Not of the squares' sum, which the norm keeps as it is: its gradient is rounding.
    slope = mx.grad(lambda pixels: model(pixels).last_hidden_state.abs().sum())
    alone = slope(pixels)
    mx.eval(alone)
    three_cores(blas_threads=1, MIN_SHARD_TOKENS=1)
    assert close(slope(pixels), alone)


def test_every_thread_has_its_own_shards(three_cores):
    model = Aimv2VisionModel(FIXED)
    mx.eval(model.parameters())
    images = [bench.random_pixels(FIXED, batch=1 + i) for i in range(4)]
    alone = [np.array(model(pixels).last_hidden_state) for pixels in images]
    three_cores(blas_threads=1, MIN_SHARD_TOKENS=1)
    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(lambda x: np.array(model(x).last_hidden_state), images), alone, strict=True):
            assert close(found, wanted)


@pytest.mark.parametrize("blas_threads", [1, 4])
def test_chunks_are_all_rows_in_their_order(three_cores, blas_threads):
    three_cores(blas_threads=blas_threads, CHUNK=26, MIN_SHARED=1)
    x, y = mx.arange(17 * 13).reshape(17, 13), mx.arange(17).reshape(17, 1)
    assert mx.array_equal(x86.in_chunks(lambda x, y: x * y, x, y, numbers_per_row=13), x * y)


@pytest.mark.parametrize(("blas_threads", "streams"), [(1, 1), (4, 3)])
def test_chunks_leave_the_other_cores_to_their_shards(three_cores, blas_threads, streams):
    three_cores(blas_threads=blas_threads, MIN_SHARED=1)
    seen = set()

    def work(x):
        seen.add(str(mx.default_stream(mx.cpu)))
        return x

    x86.in_chunks(work, mx.zeros((17, 1)), numbers_per_row=1)
    assert len(seen) == streams


def test_chunks_wait_for_each_other(tmp_path):
    results = x86.one_by_one(lambda x: x + 1, [(mx.arange(3),), (mx.arange(3, 6),), (mx.arange(6, 9),)])
    graph = tmp_path / "graph.dot"
    mx.export_to_dot(str(graph), results[-1])
    assert graph.read_text().count("Depends") == 2
    assert mx.concatenate(results).tolist() == list(range(1, 10))


@pytest.mark.parametrize(
    ("before", "is_x86", "after"),
    [
        (x86.MLX_CACHE_LIMIT, True, x86.CACHE_LIMIT),
        (x86.MLX_CACHE_LIMIT, False, x86.MLX_CACHE_LIMIT),
        (123, True, 123),
        (1 << 30, True, 1 << 30),
    ],
)
def test_more_freed_memory_is_kept_unless_somebody_has_said_how_much(monkeypatch, before, is_x86, after):
    monkeypatch.setattr(x86, "on_x86_cpu", lambda: is_x86)
    x86._raise_cache_limit.cache_clear()
    limit = mx.set_cache_limit(before)
    try:
        for _ in range(2):
            list(run_blocks([], mx.zeros((1, 1, 1))))
        assert mx.set_cache_limit(limit) == after
    finally:
        mx.set_cache_limit(limit)


@pytest.mark.skipif(not x86.on_x86_cpu(), reason="other backends have other limits, and keep them")
def test_what_mlx_keeps_by_itself_is_known():
    asked = "import mlx.core as mx; print(mx.set_cache_limit(0))"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert int(found) == x86.MLX_CACHE_LIMIT


def blas_of(**environment: str) -> str:
    code = (
        "import mlx.core, numpy; from mlx_aimv2.backend.device import *; print(openblas() is not None, blas_threads())"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "OPENBLAS_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not OPENBLAS.exists() or device.cpu_count() < 2, reason="needs OpenBLAS installed, and two cores")
def test_openblas_and_its_threads_are_found():
    assert blas_of(LD_PRELOAD=str(OPENBLAS), OPENBLAS_NUM_THREADS="1") == "True 1"
    assert blas_of(LD_PRELOAD=str(OPENBLAS), OPENBLAS_NUM_THREADS="2") == "True 2"


@pytest.mark.skipif(platform.system() != "Linux", reason="asks what is mapped into a Linux process")
def test_numpys_openblas_is_not_taken_for_mlxs():
    assert blas_of() == "False 1"
