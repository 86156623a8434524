"""One thread that owns MLX: requests queue up for it, and those of one kind that wait together are one batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.embed.encode import Pooling
from mlx_aimv2.images.open import Levels
from mlx_aimv2.loading import Loaded
from mlx_aimv2.model import Aimv2Model, unit_length
from mlx_aimv2.zero_shot_classifier import encode_ids

Array = NDArray[Any]

Answers = Callable[[Sequence[Any]], Any]
"""What is given together -> as many answers."""

WAITING = 64
"""Requests that may wait; one more is told to come back."""

BATCH = 16
"""Requests that one call of the model answers."""

PATIENCE = 60.0
"""Seconds that a request waits for its answer."""

RETRY_AFTER = 1
"""Seconds after which a request that was sent back may come again."""


class BusyError(RuntimeError):
    """More requests wait than the engine takes, or one has waited for too long."""


@dataclass(frozen=True)
class _Asked:
    """A request: what it is given to, together with others of one `kind`, and where its answer goes."""

    kind: tuple[Any, ...]
    function: Answers
    given: Any
    answer: Future[Any] = field(default_factory=Future)


class Engine:
    """A model, and the thread that runs it. Its methods may be called from any thread."""

    def __init__(self, loaded: Loaded, pooling: Pooling) -> None:
        """Starts the thread."""
        self.model, self.processor, self.pooling = loaded.model, loaded.processor, pooling
        self._asked: queue.Queue[_Asked | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="mlx", daemon=True)
        self._thread.start()

    @cached_property
    def has_text(self) -> bool:
        """Whether texts have vectors that can be compared with those of images."""
        return isinstance(self.model, Aimv2Model) and self.pooling.pool == "head"

    @property
    def width(self) -> int:
        """D, the length of a vector."""
        return self.pooling.width(self.model)

    def image(self, levels: Levels) -> Array:
        """The vector of an image, `(H, W, 3) uint8 -> (D,)` of unit length."""
        vector: Array = self._ask(("image", levels.shape), self._images, levels)
        return vector

    def text(self, text: str) -> Array:
        """The vector of a text, (E,) of unit length. Raises ValueError where the model has no text encoder."""
        if not self.has_text:
            raise ValueError("this model was loaded without a text encoder: give an image, or serve a LiT model")
        vector: Array = self._ask(("text",), self._texts, text)
        return vector

    def call(self, work: Callable[[], Any], *, patience: float = PATIENCE) -> Any:
        """What `work` returns, done in the thread that owns MLX."""
        return self._ask(("call", id(work)), lambda works: [work() for work in works], work, patience)

    def stop(self) -> None:
        """Ends the thread after what it is doing now; what still waits is sent back."""
        while True:
            try:
                if (asked := self._asked.get_nowait()) is not None:
                    _settle(asked, BusyError("the server is stopping"))
            except queue.Empty:
                break
        self._asked.put(None)
        self._thread.join(RETRY_AFTER)

    def _ask(self, kind: tuple[Any, ...], function: Answers, given: Any, patience: float = PATIENCE) -> Any:
        asked = _Asked(kind, function, given)
        try:
            self._asked.put_nowait(asked)
        except queue.Full:
            raise BusyError(f"{WAITING} requests are already waiting: try again in a moment") from None
        try:
            return asked.answer.result(patience)
        except TooLate:
            asked.answer.cancel()
            raise BusyError(f"no answer within {patience:g} seconds: try again in a moment") from None

    def _run(self) -> None:
        held: _Asked | None = None
        while (first := held or self._asked.get()) is not None:
            together, held = [first], None
            while len(together) < BATCH and held is None:
                try:
                    following = self._asked.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._asked.put(None)
                    break
                if following.kind == first.kind:
                    together.append(following)
                else:
                    held = following
            together = [asked for asked in together if not asked.answer.cancelled()]
            try:
                answers = first.function([asked.given for asked in together])
            except Exception as error:  # whatever it is, it is the request's, and the thread goes on
                answers = [error] * len(together)
            for asked, answer in zip(together, answers, strict=True):
                _settle(asked, answer)

    def _images(self, levels: Sequence[Levels]) -> Array:
        """(H, W, 3) uint8 each -> (B, D)."""
        pixels = self.processor.normalised(mx.array(np.stack(levels)))
        return self._finite(np.array(unit_length(self.pooling(self.model, pixels))))

    def _texts(self, texts: Sequence[str]) -> Array:
        """Texts -> (T, E)."""
        return self._finite(encode_ids(self.model, np.array(self.processor.tokenize(list(texts)))))

    def _finite(self, vectors: Array) -> Array:
        if not np.isfinite(vectors).all():
            raise ValueError("the model's outputs are not finite: serve it with --dtype float32")
        return vectors


def _settle(asked: _Asked, answer: Any) -> None:
    try:
        if isinstance(answer, Exception):
            asked.answer.set_exception(answer)
        else:
            asked.answer.set_result(answer)
    except InvalidStateError:  # whoever asked has gone
        pass
