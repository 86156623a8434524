"""How are the two hot operations, attention and SwiGLU, spelled for the device that runs them?

GPUs get MLX's fused kernels. MLX's CPU backend on x86 computes `exp` one number at a time, forty times as slowly as a
sum or product. There both operations are sums and products alone, their exponential a polynomial, in pieces small
enough to reuse the same memory; all of it in float32 whatever the dtype.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2 import cores

CAUSAL = "causal"

LOG2_E = math.log2(math.e)

EXP2 = (0.00132764701, 0.00967554096, 0.0555071309, 0.240221202, 0.693146944, 1.00000012)
"""`2 ** x` for x from -1/2 to 1/2 as a polynomial, highest power first: the least largest relative error, 7.5e-8."""

WHOLE = 1.5 * 2**23 + 127
"""Added to a float32, it leaves the number rounded to a whole one, 127 greater, in the lowest bits."""


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool = False) -> mx.array:
    """Softmax attention, scale `head_dim ** -0.5`: `(B, H, M, D/H), two (B, H, N, D/H) -> (B, H, M, D/H)`.

    The softmax is taken in float32 whatever the dtype. With `causal` (M = N) a token attends to itself and what stands
    before.
    """
    if cores.on_x86_cpu():
        return _attention_in_pieces(queries, keys, values, causal)
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=CAUSAL if causal else None)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """The gated product of the feed-forward, `silu(gate) * up`: two `(B, N, I) -> (B, N, I)`."""
    return _swiglu_in_pieces(gate, up) if cores.on_x86_cpu() else _swiglu_compiled(gate, up)


@partial(mx.compile, shapeless=True)
def _swiglu_compiled(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def _attention_in_pieces(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """The heads of all pictures in one row, a few at a time."""
    q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
    q = q * (LOG2_E * q.shape[-1] ** -0.5)  # so that the softmax can take powers of two
    # Copied here once: a matrix product would copy these views too, and transposed ones five times slower.
    flat = (mx.contiguous(x).flatten(0, 1) for x in (q, k, v))  # (B H, N, D/H)
    scores_per_head = queries.shape[2] * keys.shape[2]
    mixed = cores.in_pieces(partial(_attend, causal=causal), *flat, numbers_per_row=scores_per_head)
    return mixed.reshape(queries.shape).astype(values.dtype)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool) -> mx.array:
    """Some heads, `(heads, M, D/H), two (heads, N, D/H) -> (heads, M, D/H)`, some of their queries at a time."""
    rows = max(1, cores.PIECE // max(1, keys.shape[0] * keys.shape[1]))
    starts = range(0, queries.shape[1], rows)

    def product(asking: mx.array, first: int) -> mx.array:
        return _softmax_product(asking, keys, values, first=first if causal else None)

    mixed = cores.in_turn(product, [(queries[:, first : first + rows], first) for first in starts])
    return mx.concatenate(mixed, axis=1) if len(mixed) > 1 else mixed[0]


def _softmax_product(queries: mx.array, keys: mx.array, values: mx.array, *, first: int | None) -> mx.array:
    """The queries from token `first` on, causal; or with None not causal.

    Keys are rows here and queries columns, because MLX finds the largest of a column three times as fast.
    """
    scores = keys @ queries.swapaxes(-1, -2)  # (heads, N, M)
    if first is not None:
        asking = mx.arange(first, first + scores.shape[-1])
        scores = mx.where(mx.arange(scores.shape[-2])[:, None] <= asking, scores, -math.inf)
    largest = mx.stop_gradient(scores.max(axis=-2, keepdims=True))  # cancels out
    weights = _exp2(mx.maximum(scores - largest, -127))
    sums = weights.sum(axis=-2)[..., None]  # (heads, M, 1)
    return (weights.swapaxes(-1, -2) @ values) / sums


def _swiglu_in_pieces(gate: mx.array, up: mx.array) -> mx.array:
    tokens = (x.astype(mx.float32).flatten(0, -2) for x in (gate, up))  # (B N, I)
    return cores.in_pieces(_swiglu, *tokens, numbers_per_row=gate.shape[-1]).reshape(gate.shape).astype(gate.dtype)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + _exp2(mx.clip(gate * -LOG2_E, -127, 128)))


def _exp2(x: mx.array) -> mx.array:
    """`2 ** x` in float32, to 2.4e-7 of itself: 2 to the nearest whole number, times a polynomial of the rest.

    `x` must lie from -127 to 128; the result is zero below -126.5, infinite above 127.5.
    """
    # The whole number has no derivative: the rest's polynomial has all of it.
    shifted = mx.stop_gradient(x + WHOLE)
    power = mx.left_shift(shifted.view(mx.uint32), 23).view(mx.float32)  # the whole number becomes the exponent
    rest = x - (shifted - WHOLE)
    result = EXP2[0] * rest
    for coefficient in EXP2[1:-1]:
        result = (result + coefficient) * rest
    return (result + EXP2[-1]) * power
