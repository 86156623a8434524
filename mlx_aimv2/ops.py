"""How are the two hot operations, attention and SwiGLU, spelled for the device that runs them?

GPUs get MLX's fused kernels. MLX's CPU backend on x86 runs everything but matrix products on one core, and computes
`exp` one number at a time, forty times as slowly as a sum or product. There both operations are cut into independent
pieces, one stream per core, each small enough for the processor's cache, and their exponential is a polynomial; all of
it in float32 whatever the dtype.
"""

from __future__ import annotations

import math
import os
import platform
import threading
from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

CAUSAL = "causal"

PIECE = 1 << 19
"""Numbers in one piece of work for one core: 2 MB of float32 stay in its cache."""

WORTH_SHARING = 1 << 16
"""Below so many numbers, waking another core costs more than it saves."""

LOG2_E = math.log2(math.e)

EXP2 = (1.5337576e-4, 1.33998599e-3, 9.61851981e-3, 5.55032901e-2, 0.240226462, 0.693147182, 1.0)
"""`2 ** x` for x from -1/2 to 1/2 as a polynomial, highest power first: least squares of the relative error."""

WHOLE = 1.5 * 2**23 + 127
"""Added to a float32, it leaves the number rounded to a whole one, 127 greater, in the lowest bits."""


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool = False) -> mx.array:
    """Softmax attention with scale `head_dim ** -0.5`: three `(B, H, N, D/H) -> (B, H, N, D/H)`.

    The softmax is taken in float32 whatever the dtype. With `causal` a token attends to itself and what stands before.
    """
    if _on_x86_cpu():
        return _attention_in_pieces(queries, keys, values, causal)
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=CAUSAL if causal else None)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """The gated product of the feed-forward, `silu(gate) * up`: two `(B, N, I) -> (B, N, I)`."""
    return _swiglu_in_pieces(gate, up) if _on_x86_cpu() else _swiglu_compiled(gate, up)


@partial(mx.compile, shapeless=True)
def _swiglu_compiled(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def _attention_in_pieces(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """The heads of all pictures in one row, a few at a time."""
    q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
    q = q * (LOG2_E * q.shape[-1] ** -0.5)  # so that the softmax can take powers of two
    # Copied here once: a matrix product would copy these views too, and the transposed keys five times slower.
    flat = (mx.contiguous(x).flatten(0, 1) for x in (q, k, v))  # (B H, N, D/H)
    scores_per_head = queries.shape[2] * keys.shape[2]
    mixed = _in_pieces(partial(_attend, causal=causal), *flat, numbers_per_row=scores_per_head)
    return mixed.reshape(queries.shape).astype(values.dtype)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool) -> mx.array:
    """Some heads `(heads, N, D/H)`, some of their queries at a time."""
    rows = max(1, PIECE // (keys.shape[0] * keys.shape[1]))
    mixed = [
        _softmax_product(queries[:, first : first + rows], keys, values, first=first if causal else None)
        for first in range(0, queries.shape[1], rows)
    ]
    return mx.concatenate(mixed, axis=1) if len(mixed) > 1 else mixed[0]


def _softmax_product(queries: mx.array, keys: mx.array, values: mx.array, *, first: int | None) -> mx.array:
    """The queries from token `first` on, causal; or with None not causal."""
    scores = queries @ keys.swapaxes(-1, -2)  # (heads, Nq, Nk)
    if first is not None:
        asking = mx.arange(first, first + scores.shape[-2])
        scores = mx.where(asking[:, None] >= mx.arange(scores.shape[-1]), scores, -math.inf)
    weights = _exp2(scores - scores.max(axis=-1, keepdims=True))
    sums = weights @ mx.ones((weights.shape[-1], 1))  # a matrix product adds twice as fast as a sum here
    return (weights @ values) / sums


def _swiglu_in_pieces(gate: mx.array, up: mx.array) -> mx.array:
    tokens = (x.astype(mx.float32).flatten(0, -2) for x in (gate, up))  # (B N, I)
    return _in_pieces(_swiglu, *tokens, numbers_per_row=gate.shape[-1]).reshape(gate.shape).astype(gate.dtype)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + _exp2(gate * -LOG2_E))


def _exp2(x: mx.array) -> mx.array:
    """`2 ** x` in float32, to 1e-7 of itself: 2 to the nearest whole number, times a polynomial of the rest.

    Zero below -126.5, infinite above 127.5.
    """
    x = mx.clip(x, -127, 128)
    shifted = x + WHOLE
    power = mx.left_shift(shifted.view(mx.uint32), 23).view(mx.float32)  # that whole number becomes the exponent
    rest = x - (shifted - WHOLE)
    result = EXP2[0] * rest
    for coefficient in EXP2[1:-1]:
        result = (result + coefficient) * rest
    return (result + EXP2[-1]) * power


def _in_pieces(work: Callable[..., mx.array], *arrays: mx.array, numbers_per_row: int) -> mx.array:
    """`work(*arrays)`, whose rows are independent, some rows at a time in turn on each core."""
    rows = arrays[0].shape[0]
    if rows * numbers_per_row < WORTH_SHARING:
        return work(*arrays)
    streams = _streams()
    rounds = math.ceil(rows * numbers_per_row / PIECE / len(streams))
    step = math.ceil(rows / (rounds * len(streams)))  # so that every core has the same to do
    results = []
    for i, start in enumerate(range(0, rows, step)):
        with mx.stream(streams[i % len(streams)]):
            results.append(work(*(x[start : start + step] for x in arrays)))
    return mx.concatenate(results) if len(results) > 1 else results[0]


_of_thread = threading.local()


def _streams() -> list[mx.Stream]:
    """One stream per core; a stream belongs to the thread that made it, so each thread has its own."""
    if not hasattr(_of_thread, "streams"):
        others = [mx.new_stream(mx.cpu) for _ in range(_cores() - 1)]
        _of_thread.streams = [mx.default_stream(mx.cpu), *others]
    streams: list[mx.Stream] = _of_thread.streams
    return streams


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_x86_cpu() -> bool:
    return _is_x86() and mx.default_device().type == mx.DeviceType.cpu


@cache
def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
