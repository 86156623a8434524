"""Training on MLX's CPU backend for x86, which by itself leaves cores idle and asks the system for memory all the time.

- `prepared` lets MLX advance all shards side by side and keep the memory that a step frees for the next step; on a
  Mac it keeps memory wired.
- `columns_first` lays weights out as their gradients come.
- `by_images` takes each core's share of a batch through the whole model, `Balance` spreads the parameters over cores.
- `cross_entropy` is the loss of words with the polynomial for the exponential of `x86`.

On a GPU and an ARM CPU nothing but `prepared` changes anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.backend import x86
from mlx_aimv2.backend.device import check_process

SIGHT, WIDE_SIGHT = 100, 1000
"""Operations that MLX has in sight as it orders a training step, with checkpointing and without; by itself 20.

At large-224's size with batch 4 a step of LoRA with checkpointing took 15.3 s and 2.8 GB with 100, 15.7 s and 4.2 GB
with 1000; the gradients of a step of pre-training took 37 s with 300 and 22 s with 1000."""

MOST_FREED = 8 << 30
"""Bytes of freed memory that MLX keeps in training at most, and never more than half of the machine's."""


@contextmanager
def prepared(sight: int = SIGHT) -> Iterator[None]:
    """Sets MLX up for the steps of a training, as a context or a decorator; what the user has set himself stays.

    MLX orders what is evaluated together breadth first as long as few operations are in sight, then depth first. The
    hundreds of gradients of a step are too many at once, and one shard would come after the other. MLX reads this
    setting when a process first evaluates something: later it has no effect.

    Of what a step frees MLX keeps 32 MB by itself. The next step would take the rest from the system again, page by
    page, each filled with zeros first. When the training ends, the memory goes back.

    On a Mac, weights and what a step keeps stay wired in memory, as far as the system recommends, as in mlx-lm.
    """
    check_process()  # what follows asks MLX
    if mx.metal.is_available():
        wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        try:
            yield
        finally:
            mx.set_wired_limit(wired)
        return
    if not x86.on_x86_cpu():
        yield
        return
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", str(sight))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = mx.set_cache_limit(min(MOST_FREED, memory // 2))
    if limit in (x86.MLX_CACHE_LIMIT, x86.CACHE_LIMIT):
        limit = x86.CACHE_LIMIT
    else:
        mx.set_cache_limit(limit)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)
        mx.clear_cache()


def columns_first(model: nn.Module, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Arrays by path, those of a linear layer's weight with each column's numbers side by side in memory.

    The layer multiplies by the transposed weight, so the gradient of the weight comes transposed; MLX adds two arrays
    of unlike layouts three times as slowly as two of one layout. A path may go on after the weight's: `….weight.m`.
    """
    if not x86.on_x86_cpu():
        return dict(arrays)
    weights = tuple(f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, nn.Linear))

    def is_weight(path: str) -> bool:
        return path in weights or path.rpartition(".")[0] in weights

    return {path: mx.contiguous(x.T).T if is_weight(path) else x for path, x in arrays.items()}


def by_images(work: Callable[..., tuple[mx.array, ...]], *arrays: mx.array) -> tuple[mx.array, ...]:
    """`work(*arrays)`, whose rows are those of B images: arrays of B rows in, arrays of B rows out.

    Where MLX uses one core, each core takes its share of the images through all of it, if they share out evenly.
    """
    batch = arrays[0].shape[0]
    shards = x86.Shards.of((batch, arrays[0].size // batch))
    if shards.axis != x86.IMAGES:
        return work(*arrays)
    done = shards.run(work, *(shards.split(x) for x in arrays))
    return tuple(shards.join(parts) for parts in zip(*done, strict=True))


class Balance:
    """Shares arrays out among the cores, the largest first, each to the core that was given least so far."""

    def __init__(self, arrays: Iterable[mx.array]) -> None:
        """Takes all arrays that will be asked for."""
        self.cores: dict[int, list[int]] = {}
        if not x86.on_x86_cpu():
            return
        given = [0] * len(x86.streams())
        for size in sorted((x.size for x in arrays), reverse=True):
            core = min(range(len(given)), key=given.__getitem__)
            given[core] += size
            self.cores.setdefault(size, []).append(core)

    def stream_for(self, x: mx.array) -> AbstractContextManager[Any]:
        """A context in which to work on `x`, once for each array; on a GPU or an ARM CPU one that changes nothing."""
        if not self.cores:
            return nullcontext()
        context: AbstractContextManager[Any] = mx.stream(x86.streams()[self.cores[x.size].pop(0)])
        return context


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """`-log softmax(logits)[target]` in float32: `(…, V), (…) -> (…)`."""
    rows = logits.astype(mx.float32).reshape(-1, logits.shape[-1])
    product: Any = _cross_entropy
    return x86.in_chunks(product, rows, targets.reshape(-1, 1), numbers_per_row=rows.shape[1]).reshape(targets.shape)


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """`(n, V), (n, 1) -> (n, 1)`."""
    weights, largest = _weights(logits)
    return largest + mx.log(weights.sum(axis=-1, keepdims=True)) - mx.take_along_axis(logits, targets, axis=-1)


@_cross_entropy.vjp
def _cross_entropy_vjp(inputs: tuple[mx.array, mx.array], grad: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    logits, targets = inputs
    weights, _ = _weights(logits)
    shares = weights * (grad / weights.sum(axis=-1, keepdims=True))
    own = mx.take_along_axis(shares, targets, axis=-1) - grad
    return mx.put_along_axis(shares, targets, own, axis=-1), mx.zeros_like(targets)


def _weights(logits: mx.array) -> tuple[mx.array, mx.array]:
    """`exp(logits - largest)` and each row's largest."""
    largest = logits.max(axis=-1, keepdims=True)
    return x86.exp2(mx.maximum((logits - largest) * x86.LOG2_E, -127)), largest
