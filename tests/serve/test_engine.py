"""One thread runs the model: what waits together is one batch, what is too much is sent back."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlx_aimv2.serve import engine as engines
from mlx_aimv2.serve.engine import BusyError


@pytest.fixture
def engine(served):
    return served.engine


@pytest.fixture
def held(engine):
    """Keeps the thread busy until `held` is set."""
    free, begun = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.call, lambda: (begun.set(), free.wait(30)))
        assert begun.wait(30)
        yield free
        free.set()


def waiting(engine, count):
    while engine._asked.qsize() < count:
        pass


def test_requests_that_wait_together_are_one_batch_and_each_gets_its_own_answer(engine, held, monkeypatch):
    seen = []
    images = engine._images
    monkeypatch.setattr(engine, "_images", lambda levels: seen.append(len(levels)) or images(levels))
    levels = [
        np.full((42, 42, 3), 20 * number, np.uint8) * np.eye(3, dtype=np.uint8)[number % 3] for number in range(1, 8)
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(engine.image, one) for one in levels]
        waiting(engine, 7)
        held.set()
        together = [answer.result() for answer in answers]
    assert seen == [7]
    for one, vector in zip(levels, together, strict=True):
        np.testing.assert_allclose(engine.image(one), vector, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=0.1)


def test_images_of_other_sizes_and_texts_are_batches_of_their_own(engine, held, monkeypatch):
    seen = []
    for name in ("_images", "_texts"):
        monkeypatch.setattr(engine, name, lambda given, name=name: seen.append((name, len(given))) or [0] * len(given))
    tall, wide = np.zeros((42, 56, 3), np.uint8), np.zeros((42, 42, 3), np.uint8)
    with ThreadPoolExecutor(4) as pool:
        for count, (ask, given) in enumerate(
            [(engine.image, tall), (engine.image, wide), (engine.image, wide), (engine.text, "red")], 1
        ):
            pool.submit(ask, given)
            waiting(engine, count)
        held.set()
    assert seen == [("_images", 1), ("_images", 2), ("_texts", 1)]


def test_one_that_fails_does_not_end_the_thread(engine):
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    assert engine.call(lambda: 7) == 7


def test_more_than_may_wait_is_sent_back(engine, held, monkeypatch):
    monkeypatch.setattr(engine._asked, "maxsize", 2)
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(engine.call, lambda: 1) for _ in range(2)]
        waiting(engine, 2)
        with pytest.raises(BusyError, match="are already waiting"):
            engine.call(lambda: 2)
        held.set()
        assert [one.result() for one in waits] == [1, 1]


def test_one_that_waits_too_long_is_sent_back_and_never_done(engine, held):
    done = []
    with pytest.raises(BusyError, match="no answer within"):
        engine.call(lambda: done.append(1), patience=0.05)
    held.set()
    assert engine.call(lambda: list(done)) == []


def test_a_stopped_engine_sends_back_what_waits(engine, held, monkeypatch):
    monkeypatch.setattr(engines, "RETRY_AFTER", 0.1)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(engine.call, lambda: 1)
        waiting(engine, 1)
        engine.stop()
        with pytest.raises(BusyError, match="stopping"):
            late.result(30)


def test_vectors_of_the_api_are_the_models_own(served, photographs):
    from mlx_aimv2 import load
    from mlx_aimv2.serve.gallery import levels_of

    model, processor = load(photographs / "pair")
    file = photographs / "one" / "00-red.png"
    own = np.array(model.encode_image(processor(str(file)), normalize=True))[0]
    np.testing.assert_allclose(served.engine.image(levels_of(processor, str(file))), own, atol=1e-5)
    words = np.array(model.encode_text(processor.tokenize(["green"]), normalize=True))[0]
    np.testing.assert_allclose(served.engine.text("green"), words, atol=1e-5)
