"""The same blocks for MLX's CPU backend on x86, reworked where that backend is slow.

It computes `exp` one number at a time and runs each operation on one core; only its matrix products may use several,
if the BLAS behind them does. So attention and SwiGLU are written here as sums and products in float32, with a
polynomial for the exponential, in chunks small enough to stay in the cache. How the cores share the work depends on
the BLAS:

- With one thread (OpenBLAS with OPENBLAS_NUM_THREADS=1, the reference BLAS) each core takes a shard of the images or
  of the tokens through all blocks. Shards meet in attention, and only if they share an image. Best on few cores.
- With several threads the products use all cores already, and the chunks between them are shared.

GPUs and ARM CPUs do not use this file, except for `prepared`, which sets MLX up for training on any machine.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.backend.device import MAX_STREAMS, blas_threads, check_process, cpu_count, is_x86
from mlx_aimv2.backend.exp2 import LOG2_E, exp2
from mlx_aimv2.layers import Block, merge_heads
from mlx_aimv2.long_attention import LONG, long_attention, with_gradient

CHUNK = 1 << 19
"""Numbers in one chunk of work: 2 MB of float32. With half or twice as many, four images of 224 pixels and one of 448
took 1 to 4 % longer; with an eighth, where each operation's own cost shows, 13 to 15 %."""

MIN_SHARED = 1 << 16
"""Below this many numbers, waking another core costs more than it saves."""

MIN_SHARD_TOKENS = 64
"""Tokens in a shard: with so few, a product still runs at about 85 % speed; the rest goes into arranging weights."""

MAX_IMBALANCE = 1.1
"""How much longer the longest shard of whole images may be than the mean before images are split instead."""

CACHE_LIMIT, MLX_CACHE_LIMIT = 1 << 28, 1 << 25
"""Bytes of freed memory that MLX keeps for reuse: here, and by default, where a pass over four images of 224 pixels
requests 40,000 pages from the system again and takes 5 to 10 % longer."""

IMAGES, TOKENS = 0, -2
"""The axes of `(B, N, D)` and `(B, H, N, D/H)` along which shards are cut."""

T = TypeVar("T")


def _blas_has_one_thread() -> bool:
    return on_x86_cpu() and blas_threads() == 1


def on_x86_cpu() -> bool:
    """Whether MLX computes on its CPU backend for x86 by default."""
    return is_x86() and mx.default_device().type == mx.DeviceType.cpu


def run_blocks(
    blocks: Iterable[Block], x: mx.array, *, causal: bool = False, mask: mx.array | None = None
) -> Iterator[mx.array]:
    """Runs tokens through blocks and yields the output of each: `(B, N, D) -> (B, N, D), …`.

    The first call raises MLX's limit for freed memory to `CACHE_LIMIT`, unless the user has set one.
    """
    _raise_cache_limit()
    shards = Shards.of(x.shape, whole=causal or mask is not None)
    parts = shards.split(x)
    masks = [None] * len(parts) if mask is None else shards.split(mask)
    for block in blocks:
        queries, keys, values = zip(*shards.run(partial(_heads, block), parts), strict=True)
        if shards.axis == TOKENS:  # a token attends to those of all shards
            keys, values = ((shards.join(own),) * len(parts) for own in (keys, values))
        parts = shards.run(partial(_attend_and_feed, block, causal=causal), parts, queries, keys, values, masks)
        yield shards.join(parts)


def _heads(block: Block, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    return block.attn.heads(block.norm1(x))


def _attend_and_feed(
    block: Block,
    x: mx.array,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | None,
    *,
    causal: bool,
) -> mx.array:
    """The rest of a block for M of its N tokens: `(B, M, D), (B, H, M, D/H), two (B, H, N, D/H) -> (B, M, D)`."""
    attend = trained_attention if block.training and x.shape[1] >= LONG else attention
    x = x + block.attn.proj(merge_heads(attend(queries, keys, values, causal=causal, mask=mask)))
    h = block.norm2(x)
    return x + block.mlp.down(swiglu(block.mlp.gate(h), block.mlp.up(h), training=block.training))


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool = False, mask: mx.array | None = None
) -> mx.array:
    """`layers.attention` by sums and products, the heads of all images in one row, a few at a time."""
    q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
    q = q * (LOG2_E * q.shape[-1] ** -0.5)  # lets the softmax use powers of two
    # Copied once here: a matrix product would copy these views too, transposed ones five times as slowly.
    flat = [mx.contiguous(x).flatten(0, 1) for x in (q, k, v)]  # (B H, N, D/H)
    if mask is not None:
        flat.append(mx.repeat(mask.swapaxes(-1, -2), queries.shape[1], axis=0))  # (B H, N, M): keys are rows
    scores_per_head = queries.shape[2] * keys.shape[2]
    out = in_chunks(partial(_attend, causal=causal), *flat, numbers_per_row=scores_per_head)
    return out.reshape(queries.shape).astype(values.dtype)


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None, *, causal: bool
) -> mx.array:
    """Some heads, `(heads, M, D/H), two (heads, N, D/H) -> (heads, M, D/H)`, some of their queries at a time."""
    rows = max(1, CHUNK // max(1, keys.shape[0] * keys.shape[1]))
    starts = range(0, queries.shape[1], rows)

    def product(chunk: mx.array, first: int) -> mx.array:
        allowed = mask[..., first : first + rows] if mask is not None else None
        return _softmax_product(chunk, keys, values, first=first if causal else None, mask=allowed)

    out = one_by_one(product, [(queries[:, first : first + rows], first) for first in starts])
    return mx.concatenate(out, axis=1) if len(out) > 1 else out[0]


def _softmax_product(
    queries: mx.array, keys: mx.array, values: mx.array, *, first: int | None, mask: mx.array | None = None
) -> mx.array:
    """Attention of the queries from token `first` on, causal; with None not causal; `mask` is (heads, N, M).

    Keys are rows here and queries columns, because MLX finds the maximum of a column three times as fast.
    """
    scores = keys @ queries.swapaxes(-1, -2)  # (heads, N, M)
    if first is not None:
        positions = mx.arange(first, first + scores.shape[-1])
        scores = mx.where(mx.arange(scores.shape[-2])[:, None] <= positions, scores, -math.inf)
    if mask is not None:
        scores = mx.where(mask, scores, -math.inf)
    largest = mx.stop_gradient(scores.max(axis=-2, keepdims=True))  # cancels out
    weights = exp2(mx.maximum(scores - largest, -127))
    sums = weights.sum(axis=-2)[..., None]  # (heads, M, 1)
    return (weights.swapaxes(-1, -2) @ values) / sums


def trained_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool = False, mask: mx.array | None = None
) -> mx.array:
    """`attention` that keeps no scores for its gradient; where products use several cores, each takes its own heads."""
    shards = Shards([None] if _blas_has_one_thread() else streams()[: queries.shape[1]], axis=1)
    work = partial(long_attention, causal=causal, mask=mask, attend=attention, power=_exp)
    return shards.join(shards.run(work, *(shards.split(x) for x in (queries, keys, values))))


def _exp(x: mx.array) -> mx.array:
    """`exp` of numbers up to 0."""
    return exp2(mx.maximum(x * LOG2_E, -127))


def swiglu(gate: mx.array, up: mx.array, *, training: bool = False) -> mx.array:
    """`layers.swiglu` by sums and products, some tokens at a time; `training` where gradients will be asked for."""
    tokens = (x.astype(mx.float32).flatten(0, -2) for x in (gate, up))  # (B N, I)
    # Only for training: MLX keeps the inputs of such a function, so nothing is computed in place.
    product = _trained_swiglu if training else _swiglu
    return in_chunks(product, *tokens, numbers_per_row=gate.shape[-1]).reshape(gate.shape).astype(gate.dtype)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + exp2(mx.clip(gate * -LOG2_E, -127, 128)))


def _trained_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return with_gradient(_swiglu, _swiglu_vjp)(gate, up)


def _swiglu_vjp(inputs: tuple[mx.array, mx.array], grad: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    """By hand: through the polynomial it takes nearly twice as long, a tenth of a training step."""
    gate, up = inputs
    sigmoid = 1 / (1 + exp2(mx.clip(gate * -LOG2_E, -127, 128)))
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


@dataclass(frozen=True)
class Shards:
    """Parts of one computation that run side by side, each on a stream; None is the stream that runs anyway."""

    streams: Sequence[mx.Stream | None]
    axis: int = TOKENS

    @classmethod
    def of(cls, shape: tuple[int, ...], *, whole: bool = False) -> Shards:
        """The shards for tokens of shape `(B, N, …)`; with `whole` no image or text is split, a shard never is."""
        batch, tokens = shape[0], shape[1]
        own = streams() if _blas_has_one_thread() else []
        if mx.default_stream(mx.cpu) in own:  # a shard of something larger
            return cls([None])
        count = min(len(own), batch * tokens // MIN_SHARD_TOKENS)
        if whole:
            count = min(count, batch)
        if count <= 1:
            return cls([None])
        even = math.ceil(batch / count) * count <= MAX_IMBALANCE * batch
        return cls(own[:count], IMAGES if whole or even else TOKENS)

    def split(self, x: mx.array) -> list[mx.array]:
        """One part of `x` for each shard."""
        if len(self.streams) == 1:
            return [x]
        length, count = x.shape[self.axis], len(self.streams)
        return list(mx.split(x, [i * length // count for i in range(1, count)], axis=self.axis))

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """The parts of all shards as one array."""
        return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=self.axis)

    def run(self, work: Callable[..., T], *parts: Sequence[Any]) -> list[T]:
        """`work` on each shard: every argument has one entry for each shard."""
        results = []
        for stream, *own in zip(self.streams, *parts, strict=True):
            with nullcontext() if stream is None else mx.stream(stream):
                results.append(work(*own))
        return results


def in_chunks(work: Callable[..., mx.array], *arrays: mx.array, numbers_per_row: int) -> mx.array:
    """`work(*arrays)` with independent rows, some rows at a time; on all cores unless shards use them."""
    rows = arrays[0].shape[0]
    shared = not _blas_has_one_thread() and rows * numbers_per_row >= MIN_SHARED
    shards = Shards(streams()[:rows] if shared else [None], axis=0)
    step = max(1, CHUNK // numbers_per_row)

    def shard(*own: mx.array) -> list[mx.array]:
        return one_by_one(work, [tuple(x[i : i + step] for x in own) for i in range(0, max(1, own[0].shape[0]), step)])

    done = shards.run(shard, *(shards.split(x) for x in arrays))
    results = [result for results in done for result in results]
    return mx.concatenate(results) if len(results) > 1 else results[0]


def one_by_one(work: Callable[..., mx.array], chunks: Iterable[tuple[Any, ...]]) -> list[mx.array]:
    """`work` on each chunk, one after another: side by side they would need all their memory at once.

    What makes them wait has no `vmap` or `jvp` in MLX; `grad`, `vjp` and `compile` work.
    """
    results: list[mx.array] = []
    for first, *others in chunks:
        if results:
            first = mx.depends(first, results[-1])
        results.append(work(first, *others))
    return results


MAX_THREADS = 16
"""Threads that get their own streams. MLX never ends a stream's system thread, so a thousand short-lived threads in a
program would leave a thousand more behind; later threads compute on one core each."""

_of_thread = threading.local()
_thread_numbers = itertools.count()


def streams() -> list[mx.Stream]:
    """A CPU stream for each core, up to MAX_STREAMS.

    The default stream is not among them: in training it adds up the shards' results and would keep its own shard
    waiting. A stream belongs to the thread that made it and lives as long as the process, so each thread has its own;
    threads after the main one and MAX_THREADS others have only the default one.
    """
    if not hasattr(_of_thread, "streams"):
        is_early = threading.current_thread() is threading.main_thread() or next(_thread_numbers) < MAX_THREADS
        count = min(cpu_count(), MAX_STREAMS) if is_early else 0
        _of_thread.streams = [mx.new_stream(mx.cpu) for _ in range(count)]
    return _of_thread.streams or [mx.default_stream(mx.cpu)]


@cache
def _raise_cache_limit() -> None:
    """Raises MLX's limit once; a limit other than MLX's default was set by the user, or for training, and stays."""
    before = mx.set_cache_limit(CACHE_LIMIT)
    if before != MLX_CACHE_LIMIT:
        mx.set_cache_limit(before)


# Training

SIGHT, WIDE_SIGHT = 100, 1000
"""Operations that MLX looks ahead when it orders a training step, with checkpointing and without; MLX's default is 20.

At large-224's size with batch 4 a LoRA step with checkpointing took 15.3 s and 2.8 GB with 100, 15.7 s and 4.2 GB
with 1,000; the gradients of a pre-training step took 37 s with 300 and 22 s with 1,000."""

MOST_FREED = 8 << 30
"""Bytes of freed memory that MLX keeps in training at most, and never more than half of the machine's."""


@contextmanager
def prepared(sight: int = SIGHT) -> Iterator[None]:
    """Sets MLX up for training steps, as a context or a decorator; the user's own settings stay.

    MLX orders what is evaluated together breadth first within its look-ahead, then depth first: with the hundreds of
    gradients in a step, shards would run one after another. A process reads this setting once, when it first
    evaluates something. Freed memory that MLX does not keep is requested from the system again by the next step, page
    by page, filled with zeros; it is returned when training ends. On a Mac, weights and what a step keeps stay wired
    in memory up to the recommended limit, as in mlx-lm.
    """
    check_process()  # the rest calls MLX
    if mx.metal.is_available():
        wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        try:
            yield
        finally:
            mx.set_wired_limit(wired)
        return
    if not on_x86_cpu():
        yield
        return
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", str(sight))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = mx.set_cache_limit(min(MOST_FREED, memory // 2))
    if limit in (MLX_CACHE_LIMIT, CACHE_LIMIT):
        limit = CACHE_LIMIT
    else:
        mx.set_cache_limit(limit)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)
        mx.clear_cache()


def columns_first(model: nn.Module, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Arrays by path, those of a linear layer's weight with the numbers of a column next to each other in memory.

    The layer multiplies by the transposed weight, so the weight's gradient is transposed too; MLX adds two arrays with
    different layouts three times as slowly as two with the same. A path may extend the weight's: `….weight.m`.
    """
    if not on_x86_cpu():
        return dict(arrays)
    weights = {f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    own = {path for path in arrays if weights & {path, path.rpartition(".")[0]}}
    return {path: mx.contiguous(x.T).T if path in own else x for path, x in arrays.items()}


def by_images(work: Callable[..., tuple[mx.array, ...]], *arrays: mx.array) -> tuple[mx.array, ...]:
    """`work(*arrays)` with one row per image: arrays of B rows in, arrays of B rows out.

    Where MLX uses one core, each core takes its share of the images through all of it, if they divide evenly.
    """
    batch = arrays[0].shape[0]
    shards = Shards.of((batch, arrays[0].size // batch))
    if shards.axis != IMAGES:
        return work(*arrays)
    done = shards.run(work, *(shards.split(x) for x in arrays))
    return tuple(shards.join(parts) for parts in zip(*done, strict=True))


class Balance:
    """Distributes `arrays` among the cores, the largest first, each to the core with the least so far."""

    def __init__(self, arrays: Iterable[mx.array]) -> None:
        self.cores: dict[int, list[int]] = {}
        if not on_x86_cpu():
            return
        given = [0] * len(streams())
        for size in sorted((x.size for x in arrays), reverse=True):
            core = min(range(len(given)), key=given.__getitem__)
            given[core] += size
            self.cores.setdefault(size, []).append(core)

    def stream_for(self, x: mx.array) -> AbstractContextManager[Any]:
        """A context in which to work on `x`, once for each array; on a GPU or an ARM CPU it does nothing."""
        return mx.stream(streams()[self.cores[x.size].pop(0)]) if self.cores else nullcontext()


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """`-log softmax(logits)[target]` in float32: `(…, V), (…) -> (…)`."""
    rows = logits.astype(mx.float32).reshape(-1, logits.shape[-1])

    def product(rows: mx.array, targets: mx.array) -> mx.array:
        return with_gradient(_cross_entropy, _cross_entropy_vjp)(rows, targets)

    return in_chunks(product, rows, targets.reshape(-1, 1), numbers_per_row=rows.shape[1]).reshape(targets.shape)


def _cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """`(n, V), (n, 1) -> (n, 1)`."""
    weights, largest = _weights(logits)
    return largest + mx.log(weights.sum(axis=-1, keepdims=True)) - mx.take_along_axis(logits, targets, axis=-1)


def _cross_entropy_vjp(inputs: tuple[mx.array, mx.array], grad: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    logits, targets = inputs
    weights, _ = _weights(logits)
    shares = weights * (grad / weights.sum(axis=-1, keepdims=True))
    own = mx.take_along_axis(shares, targets, axis=-1) - grad
    return mx.put_along_axis(shares, targets, own, axis=-1), mx.zeros_like(targets)


def _weights(logits: mx.array) -> tuple[mx.array, mx.array]:
    """`exp(logits - largest)` and each row's largest."""
    largest = logits.max(axis=-1, keepdims=True)
    return _exp(logits - largest), largest
