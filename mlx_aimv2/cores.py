"""How do the cores of a CPU share a forward pass, when MLX's CPU backend runs each operation on one of them?

Only its matrix products may use several, if the BLAS behind them does. So there are two ways, by what that BLAS does:

- It has one thread, as OpenBLAS with OPENBLAS_NUM_THREADS=1 and the reference BLAS: each core takes a lane of its own
  through all blocks, some of the pictures or some of the tokens. Lanes wait for each other in attention alone, and
  there only if they share a picture. On few cores this is the faster way.
- It has several threads: products use all cores already, and `in_pieces` shares what lies between them.

So it is on x86, where this was measured. A GPU has one lane and no pieces, and so has an ARM CPU.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import mlx.core as mx

PIECE = 1 << 19
"""Numbers in one piece of work: 2 MB of float32. With half or twice as many, four pictures of 224 pixels and one of 448
took 1 to 4 % longer; with an eighth, where each operation's own cost shows, 13 to 15 %."""

WORTH_SHARING = 1 << 16
"""Below so many numbers, waking another core costs more than it saves."""

LEAST_TOKENS = 64
"""Of a lane: with so few, a product still has some 85 % of its speed; the rest goes into arranging the weights."""

MOST_LANES = 8
"""MLX puts some twenty operations side by side and the others behind them; a lane has two or three at a time."""

EVEN_ENOUGH = 1.1
"""How much longer the longest lane of whole pictures may be than the mean before pictures are cut instead."""

CACHE, MLX_CACHE = 1 << 28, 1 << 25
"""Bytes of freed memory that MLX keeps for what comes next: ours, and its own limit, with which a pass over four
pictures of 224 pixels takes 40,000 pages anew from the system, and 5 to 10 % longer."""

PICTURES, TOKENS = 0, -2
"""The axes of `(B, N, D)` and `(B, H, N, D/H)` along which lanes are cut."""

T = TypeVar("T")


class TwoPartBlock(Protocol):
    """What `through` asks of a block: the part that each token does alone, and the rest."""

    def heads(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values: `(B, N, D) -> three (B, H, N, D/H)`."""

    def finish(
        self, x: mx.array, queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool = False
    ) -> mx.array:
        """What the block gives for M tokens: `(B, M, D), (B, H, M, D/H), two (B, H, N, D/H) -> (B, M, D)`."""


@dataclass(frozen=True)
class Lanes:
    """Ways for parts of one computation to run side by side: a stream each, None for the one that runs anyway."""

    streams: Sequence[mx.Stream | None]
    axis: int = TOKENS

    @classmethod
    def of(cls, shape: tuple[int, ...], *, whole: bool = False) -> Lanes:
        """The lanes for tokens of shape `(B, N, …)`; with `whole` no picture is cut, nor a text."""
        batch, tokens = shape[0], shape[1]
        own = streams() if _one_core_multiplies() else []
        count = min(len(own), batch * tokens // LEAST_TOKENS)
        if whole:
            count = min(count, batch)
        if count <= 1:
            return cls([None])
        even = math.ceil(batch / count) * count <= EVEN_ENOUGH * batch
        return cls(own[:count], PICTURES if whole or even else TOKENS)

    def cut(self, x: mx.array) -> list[mx.array]:
        """One part of `x` for each lane."""
        if len(self.streams) == 1:
            return [x]
        length, count = x.shape[self.axis], len(self.streams)
        return list(mx.split(x, [i * length // count for i in range(1, count)], axis=self.axis))

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """The parts of all lanes as one array."""
        return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=self.axis)

    def run(self, work: Callable[..., T], *parts: Sequence[Any]) -> list[T]:
        """`work` on each lane's own: `parts` has one entry for each lane, for each argument."""
        results = []
        for stream, *own in zip(self.streams, *parts, strict=True):
            with nullcontext() if stream is None else mx.stream(stream):
                results.append(work(*own))
        return results


def through(blocks: Iterable[TwoPartBlock], x: mx.array, *, causal: bool = False) -> Iterator[mx.array]:
    """Takes tokens through blocks and yields what each of them gives: `(B, N, D) -> (B, N, D), …`.

    On x86 the first call raises MLX's limit for freed memory to `CACHE`, unless somebody has set one of their own.
    """
    if on_x86_cpu():
        _keep_memory()
    lanes = Lanes.of(x.shape, whole=causal)
    parts = lanes.cut(x)
    for block in blocks:
        queries, keys, values = zip(*lanes.run(block.heads, parts), strict=True)
        if lanes.axis == TOKENS:  # a token attends to those of all lanes
            keys, values = ((lanes.join(own),) * len(parts) for own in (keys, values))
        parts = lanes.run(partial(block.finish, causal=causal), parts, queries, keys, values)
        yield lanes.join(parts)


def in_pieces(work: Callable[..., mx.array], *arrays: mx.array, numbers_per_row: int) -> mx.array:
    """`work(*arrays)`, whose rows are independent, some rows at a time; on all cores where lanes do not use them."""
    rows = arrays[0].shape[0]
    shared = not _one_core_multiplies() and rows * numbers_per_row >= WORTH_SHARING
    lanes = Lanes(streams()[:rows] if shared else [None], axis=0)
    step = max(1, PIECE // numbers_per_row)

    def lane(*own: mx.array) -> list[mx.array]:
        return in_turn(work, [tuple(x[i : i + step] for x in own) for i in range(0, max(1, own[0].shape[0]), step)])

    done = lanes.run(lane, *(lanes.cut(x) for x in arrays))
    results = [result for results in done for result in results]
    return mx.concatenate(results) if len(results) > 1 else results[0]


def in_turn(work: Callable[..., mx.array], pieces: Iterable[tuple[Any, ...]]) -> list[mx.array]:
    """`work` on each piece, one after another: side by side they would need all their memory at once.

    MLX has no `vmap` and no `jvp` of what makes them wait; `grad`, `vjp` and `compile` work.
    """
    results: list[mx.array] = []
    for first, *others in pieces:
        if results:
            first = mx.depends(first, results[-1])
        results.append(work(first, *others))
    return results


def count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_of_thread = threading.local()


def streams() -> list[mx.Stream]:
    """A stream of the CPU for each core, up to MOST_LANES: the one that runs anyway, and others.

    A stream belongs to the thread that made it and lives as long as the process, so each thread has its own.
    """
    if not hasattr(_of_thread, "streams"):
        _of_thread.streams = [mx.new_stream(mx.cpu) for _ in range(min(count(), MOST_LANES) - 1)]
    return [mx.default_stream(mx.cpu), *_of_thread.streams]


def on_x86_cpu() -> bool:
    """Whether MLX computes on its CPU backend for x86 by default."""
    return _is_x86() and mx.default_device().type == mx.DeviceType.cpu


def blas_threads() -> int:
    """Threads with which the BLAS behind MLX's products multiplies; only OpenBLAS is known to have several."""
    library = openblas()
    return 1 if library is None else int(library.openblas_get_num_threads())


def prefer_one_blas_thread() -> bool:
    """Whether this machine's cores do better with lanes of their own than with a BLAS of several threads."""
    return _is_x86() and count() <= MOST_LANES


@cache
def openblas() -> ctypes.CDLL | None:
    """OpenBLAS, if MLX's products reach it: preloaded, or linked. NumPy's own is neither."""
    if platform.system() != "Linux":
        return None
    linked = str(Path(mx.__file__).parent / "lib" / "libmlx.so")
    for path in (None, linked):  # None: what every library of this process can see
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(path)
            library.openblas_get_num_threads.restype = ctypes.c_int
            return library
    return None


@cache
def _keep_memory() -> None:
    """Raises MLX's limit once; another than MLX's own has been set by somebody."""
    before = mx.set_cache_limit(CACHE)
    if before != MLX_CACHE:
        mx.set_cache_limit(before)


def _one_core_multiplies() -> bool:
    return on_x86_cpu() and blas_threads() == 1


@cache
def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
