"""Models work from any thread and in spawned processes, and say one line where MLX cannot."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel, bundled, load
from mlx_aimv2.backend import x86
from mlx_aimv2.index import Embedding, Index
from mlx_aimv2.index.writer import IndexWriter
from tests.exact import NEAR, roundings
from tests.programs import HANGS

pytestmark = pytest.mark.rounding

CHECKPOINT = bundled.emoji_checkpoint()
TASKS = Path("/proc/self/task")
CONFIG = Aimv2VisionConfig(22, 13, 3, 2, image_size=15, patch_size=5)


def system_threads() -> int:
    return len(list(TASKS.iterdir()))


def in_thread(work):
    """What `work` returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.fixture
def model():
    model = Aimv2VisionModel(CONFIG)
    mx.eval(model.parameters())
    return model


@pytest.fixture
def pixels():
    pixels = mx.random.normal((2, 15, 15, 3), key=mx.random.key(0))
    mx.eval(pixels)
    return pixels


def test_what_a_thread_computed_is_read_in_another(model, pixels):
    wanted = np.array(model.encode_image(pixels))
    assert roundings(in_thread(lambda: model.encode_image(pixels)), wanted) <= NEAR
    states = in_thread(lambda: model(pixels, output_hidden_states=True)).hidden_states
    assert np.isfinite(np.array(states[-1])).all()


def test_the_texts_of_a_thread_are_read_in_another(golden_lit):
    model, ids = golden_lit
    wanted = np.array(model.encode_text(ids))
    assert roundings(in_thread(lambda: model.encode_text(ids)), wanted) <= NEAR


def test_gradients_and_compiled_models_work_in_threads(model, pixels):
    def slope():
        loss, gradients = nn.value_and_grad(model, lambda: model(pixels).last_hidden_state.abs().mean())()
        mx.eval(loss, gradients)
        return loss, gradients["norm"]["weight"]

    for found, wanted in zip(in_thread(slope), slope(), strict=True):
        assert roundings(found, wanted) <= NEAR
    compiled = mx.compile(lambda x: model(x).last_hidden_state)
    assert roundings(in_thread(lambda: np.array(compiled(pixels))), compiled(pixels)) <= NEAR


def test_a_model_loaded_lazily_in_another_thread_is_refused_in_one_line():
    model, processor = load(CHECKPOINT, lazy=True)
    pixels = processor(bundled.photographs()[0])
    with pytest.raises(RuntimeError, match=r"lazy=True in another thread.*load it with lazy=False"):
        in_thread(lambda: model.encode_image(pixels))
    assert np.isfinite(np.array(model.encode_image(pixels))).all()


def test_twenty_threads_are_refused_alike():
    model, processor = load(CHECKPOINT, lazy=True)
    pixels = processor(bundled.photographs()[0])

    def attempt(_):
        try:
            return model.encode_image(pixels)
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(20) as pool:
        assert all("lazy=True" in answer for answer in pool.map(attempt, range(20)))


def test_a_model_loaded_in_a_thread_is_used_in_the_main_one():
    model, processor = in_thread(lambda: load(CHECKPOINT))
    assert np.isfinite(np.array(model.encode_image(processor(bundled.photographs()[0])))).all()


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts the threads of a Linux process")
@pytest.mark.skipif(not x86.on_x86_cpu(), reason="only there a model has streams of its own")
def test_short_threads_leave_no_more_system_threads_than_mlx_itself_does(model, monkeypatch):
    monkeypatch.setattr(x86, "MIN_SHARD_TOKENS", 1)
    pixels = mx.zeros((4, 15, 15, 3))
    mx.eval(pixels)
    before = system_threads()
    for _ in range(60):
        in_thread(lambda: model.encode_image(pixels))
    more = system_threads() - before
    assert more <= 60 + x86.MAX_THREADS * x86.MAX_STREAMS
    before = system_threads()
    for _ in range(40):
        in_thread(lambda: model.encode_image(pixels))
    # One for each thread is MLX's own; a thread of another part of the program may have begun meanwhile.
    assert system_threads() - before <= 40 + 2


FORK = """
import os, signal, mlx.core as mx
from mlx_aimv2 import bundled, load
from mlx_aimv2.cli import main
def embed():
    signal.alarm(200)
    model, processor = load(bundled.emoji_checkpoint())
    pixels = processor(bundled.photographs()[0])
    mx.eval(model.encode_image(pixels))
    return model, processor, pixels
{before}
child = os.fork()
if child == 0:
    try:
        {within}
        print("embedded", flush=True)
    except ChildProcessError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
WITHIN = (
    "embed()",
    "processor(bundled.photographs()[0])",
    "model.encode_image(pixels)",
    'main(["info", str(bundled.emoji_checkpoint())])',
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("before", "within"), [("", "embed()"), *(("model, processor, pixels = embed()", within) for within in WITHIN)]
)
def test_a_forked_process_works_or_says_spawn(before, within):
    command = [sys.executable, "-W", "ignore", "-c", FORK.format(before=before, within=within)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    assert ('multiprocessing.get_context("spawn")' if before else "embedded") in done.stdout + done.stderr
    assert "a fault" not in done.stderr


SPAWN = """
import multiprocessing
import mlx.core as mx
from mlx_aimv2 import bundled, load
def total(path):
    model, processor = load(bundled.emoji_checkpoint())
    return model.encode_image(processor(path)).sum().item()
if __name__ == "__main__":
    files = [str(file) for file in bundled.photographs()]
    here = [total(file) for file in files]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert max(abs(a - b) for a, b in zip(pool.map(total, files), here)) < 1e-3
"""


@pytest.mark.slow
def test_spawned_processes_give_the_same_features(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    subprocess.run([sys.executable, str(tmp_path / "spawn.py")], capture_output=True, timeout=HANGS, check=True)


def test_threads_that_run_together_do_not_disturb_each_other(model):
    batches = [mx.random.normal((1 + i % 3, 15, 15, 3), key=mx.random.key(i)) for i in range(24)]
    mx.eval(batches)
    wanted = [np.array(model.encode_image(batch)) for batch in batches]
    barrier = threading.Barrier(8)

    def work(number):
        barrier.wait()
        return [np.array(model.encode_image(batch)) for batch in batches[number::8]]

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(work, range(8))):
            for a, b in zip(found, wanted[number::8], strict=True):
                assert roundings(a, b) <= NEAR


@pytest.fixture
def index(tmp_path):
    """An index of 300 images with a vector of 13 numbers each, and these vectors."""
    vectors = np.random.default_rng(0).normal(size=(300, 13)).astype(np.float32)
    with IndexWriter.create(tmp_path / "photos.db", provenance={}, width=13, dtype="float32") as writer:
        writer.add(Embedding(f"/{i:03d}.jpg", 1, 2, bytes(32), vector) for i, vector in enumerate(vectors))
    with Index.open(tmp_path / "photos.db") as index:
        yield index, vectors


def test_an_index_opened_at_start_up_is_searched_in_handlers(index):
    index, vectors = index
    assert in_thread(lambda: index.search(vectors[7], 1))[0].path == "/007.jpg"


def test_eight_threads_use_one_index_at_once(index):
    index, vectors = index

    def work(number):
        found = []
        for i in range(number, len(vectors), 8):
            found.append(index.search(vectors[i], 1)[0].path == f"/{i:03d}.jpg")
            found.append(np.allclose(index.vector(f"/{i:03d}.jpg"), vectors[i], atol=1e-5))
        found.append(len(list(index.embeddings())) == len(index) == 300)
        return found

    with ThreadPoolExecutor(8) as pool:
        assert all(all(found) for found in pool.map(work, range(8)))
