"""Shares one list of images among several Macs and gathers the embeddings on the first of them.

MLX's own engine starts the processes (`mlx.launch`) and carries the bytes. Rank 0 plans and writes; in each round every
rank embeds one chunk and hands it over. A rank that dies breaks the connection, which ends the others.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Set by mlx.launch (ring, jaccl, nccl) or by mpirun: without one of them this is a single process."""


class RankLostError(ConnectionError):
    """Another process of the group is gone."""


class Ranks:
    """The processes that share the work; a single one needs no engine."""

    def __init__(self) -> None:
        """Joins the group that `mlx.launch` made, if there is one."""
        group = mx.distributed.init() if any(name in os.environ for name in LAUNCHED) else None
        self.group = group if group is not None and group.size() > 1 else None
        """MLX's group, None for a single process."""
        if self.group is not None:
            signal.signal(signal.SIGTERM, _lost)  # how mlx.launch ends the others when one has died

    @property
    def rank(self) -> int:
        """Which of the processes this is; 0 plans and writes."""
        return self.group.rank() if self.group is not None else 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.group.size() if self.group is not None else 1

    def first(self, work: Callable[[], Any]) -> Any:
        """Rank 0 does the work and every rank gets the result, which must be valid as JSON.

        If the work raises, rank 0 raises and the others end silently.
        """
        if self.group is None:
            return work()
        if self.rank > 0:
            answer = json.loads(self.gather(b"")[0])
            if answer is None:
                raise SystemExit(0)
            return answer[0]
        try:
            result = work()
        except BaseException:
            self.gather(b"null")
            raise
        self.gather(json.dumps([result]).encode())
        return result

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Each number's mean over the ranks, on every rank."""
        if self.group is None:
            return values
        total: Any = mx.distributed.all_sum(mx.array(list(values.values()), mx.float32), group=self.group).tolist()
        return {name: value / self.size for name, value in zip(values, total, strict=True)}

    def rows(self, x: mx.array) -> mx.array:
        """Rows of every rank, in the order of the ranks: `(B, …) -> (ranks * B, …)`."""
        return x if self.group is None else mx.distributed.all_gather(x, group=self.group)

    def each(self, number: int) -> list[int]:
        """A number from every rank, in the order of the ranks, on every rank."""
        numbers: Any = self.rows(mx.array([number])).tolist()
        return numbers

    def gather(self, data: bytes) -> list[bytes]:
        """Bytes from each rank, in the order of the ranks, on every rank, if there are several."""
        try:
            sizes = mx.distributed.all_gather(mx.array([len(data)], mx.int32), group=self.group)
            lengths: Any = sizes.tolist()
            padded = np.zeros(max(1, *lengths), np.uint8)
            padded[: len(data)] = np.frombuffer(data, np.uint8)
            rows = np.array(mx.distributed.all_gather(mx.array(padded), group=self.group)).reshape(self.size, -1)
        except RuntimeError as error:
            _ignore_the_launcher()
            raise RankLostError(f"another rank is gone ({error})") from None
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def my_chunks(chunks: Sequence[list[str]], ranks: Ranks) -> list[list[str]]:
    """The chunks of this rank, an empty one if the last round has none left for it."""
    mine = list(chunks[ranks.rank :: ranks.size])
    rounds = -(-len(chunks) // ranks.size)
    return mine + [[]] * (rounds - len(mine))


def _lost(number: int, frame: FrameType | None) -> None:
    _ignore_the_launcher()
    raise RankLostError("another rank is gone (stopped by mlx.launch)")


def _ignore_the_launcher() -> None:
    """After a first SIGTERM this process writes what it has; a second one must not interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
