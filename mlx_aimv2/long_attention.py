"""Attention for training on many tokens, with a custom gradient that keeps no scores (Dao et al. 2022).

MLX keeps all scores for the gradient, on Metal too, whose fused kernel has no gradient. Here the gradient recomputes
them, a head and some queries at a time, chunk after chunk: side by side they would need all their memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import mlx.core as mx

LONG = 1024
"""It is used from this many tokens up."""

CHUNK = 1 << 20
"""Scores of one chunk: of 256 queries and 4,096 keys, 4 MB in float32."""

FUSED = (64, 72, 80, 96, 128, 192, 256)
"""Head sizes for which Metal has a fused kernel (MLX's scaled_dot_product_attention.cpp)."""


def _attend(q: mx.array, k: mx.array, v: mx.array, *, causal: bool, mask: mx.array | None) -> mx.array:
    """By MLX: fused where Metal has the kernel, which MLX does not use while differentiating unless forced."""
    scale, (batch, heads, tokens, size) = q.shape[-1] ** -0.5, q.shape
    if mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu and size in FUSED:
        allowed = mask[:, None] if mask is not None else "causal" if causal else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=allowed, force_fused=True)
    rows, done = max(1, CHUNK // k.shape[2]), list[mx.array]()
    for b, h, first in product(range(batch), range(heads), range(0, tokens, rows)):
        last = min(first + rows, tokens)
        allowed = mask[b, first:last] if mask is not None else "causal" if causal else None
        part, seen = q[b, h, first:last], last if causal else k.shape[2]
        part = mx.depends(part, done[-1]) if done else part
        own = (x[None, None] for x in (part, k[b, h, :seen], v[b, h, :seen]))
        done.append(mx.fast.scaled_dot_product_attention(*own, scale=scale, mask=allowed))
    return mx.concatenate(done, axis=2).reshape(q.shape)


def long_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    causal: bool = False,
    mask: mx.array | None = None,
    attend: Callable[..., mx.array] = _attend,
    power: Callable[[mx.array], mx.array] = mx.exp,
) -> mx.array:
    """`layers.attention` up to rounding: `(B, H, M, D/H), two (B, H, N, D/H) -> (B, H, M, D/H)`.

    `attend` computes it, `power` is `exp` for numbers up to 0. It supports no `vmap`, `jvp` or second gradient.
    """

    def gradients(inputs: Any, grad: mx.array, out: mx.array) -> list[mx.array]:
        along = (out.astype(mx.float32) * grad.astype(mx.float32)).sum(axis=-1, keepdims=True)
        own, found = [x.flatten(0, 1) for x in (*inputs, grad, along)], list[tuple[mx.array, ...]]()  # (B H, …)
        for head in range(own[0].shape[0]):
            one = [x[head] for x in own]
            one = mx.depends(one, list(found[-1])) if found else one
            allowed = mask[head // queries.shape[1]] if mask is not None else None
            found.append(_gradients(*one, power=power, causal=causal, mask=allowed))
        each = zip(inputs, zip(*found, strict=True), strict=True)
        return [mx.stack(list(parts)).reshape(x.shape).astype(x.dtype) for x, parts in each]

    return with_gradient(partial(attend, causal=causal, mask=mask), gradients)(queries, keys, values)


def with_gradient(function: Callable[..., mx.array], gradient: Callable[..., Any]) -> Callable[..., mx.array]:
    """`function` with the gradient `gradient(inputs, grad, out)`, computed on the current default stream."""
    stream = mx.default_stream(mx.default_device())

    def on_stream(inputs: Any, grad: mx.array, out: mx.array) -> Any:
        with mx.stream(stream):  # MLX calls this on the default stream of that time: a shard would leave its core
            return gradient(inputs, grad, out)

    made: Any = mx.custom_function(function)
    made.vjp(on_stream)
    differentiable: Callable[..., mx.array] = made
    return differentiable


def _gradients(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    grad: mx.array,
    along: mx.array,
    *,
    power: Callable[[mx.array], mx.array],
    causal: bool,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """For one head, `(M, D/H), two (N, D/H), (M, D/H), (M, 1) -> (M, D/H), two (N, D/H)`; the last two in float32.

    `along` is each query's `grad · out`. Keys are rows of the scores here, queries columns.
    """
    rows, scale, done = max(1, CHUNK // keys.shape[0]), queries.shape[-1] ** -0.5, list[mx.array]()
    keys, values = mx.contiguous(keys), mx.contiguous(values)  # once, not for each product
    of_keys, of_values = mx.zeros(keys.shape), mx.zeros(values.shape)
    for first in range(0, queries.shape[0], rows):
        last = min(first + rows, queries.shape[0])
        own, slope, share = (x[first:last] for x in (queries, grad, along))
        if done:
            own = mx.depends(own, [done[-1], of_keys, of_values])
        scores = (keys @ (own * scale).T).astype(mx.float32)  # (N, m)
        if causal:
            scores = mx.where(mx.arange(keys.shape[0])[:, None] <= mx.arange(first, last), scores, -math.inf)
        if mask is not None:
            scores = mx.where(mask[first:last].T, scores, -math.inf)
        weights = power(scores - scores.max(axis=0, keepdims=True))
        sums = weights.sum(axis=0)[:, None]  # (m, 1)
        slope = (slope / sums).astype(values.dtype)
        of_values = of_values + weights.astype(values.dtype) @ slope
        of_scores = (weights * (values @ slope.T - (share / sums).T)).astype(keys.dtype)
        done.append(scale * (of_scores.T @ keys))
        of_keys = of_keys + scale * (of_scores @ own)
    return mx.concatenate(done), of_keys, of_values
