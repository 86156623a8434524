"""How are the two hot operations, attention and SwiGLU, spelled for the device that runs them?

GPUs get MLX's fused kernels. MLX's CPU backend on x86 computes `exp` one number at a time but `power` in vectors, so
there both operations are written with `e ** x`, which is several times faster at equal accuracy.
"""

from __future__ import annotations

import math
import platform
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

CAUSAL = "causal"


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool = False) -> mx.array:
    """Softmax attention with scale `head_dim ** -0.5`: three `(B, H, N, D/H) -> (B, H, N, D/H)`.

    The softmax is taken in float32 whatever the dtype. With `causal` a token attends to itself and what stands before.
    """
    scale = queries.shape[-1] ** -0.5
    if not _on_x86_cpu():
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=CAUSAL if causal else None)
    scores = ((queries * scale) @ keys.swapaxes(-1, -2)).astype(mx.float32)  # (B, H, Nq, Nk)
    if causal:
        tokens = mx.arange(scores.shape[-1])
        scores = mx.where(tokens[:, None] >= tokens, scores, -math.inf)
    weights = mx.power(math.e, scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights.astype(values.dtype) @ values


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """The gated product of the feed-forward, `silu(gate) * up`: two `(B, N, I) -> (B, N, I)`."""
    return _swiglu_with_power(gate, up) if _on_x86_cpu() else _swiglu_compiled(gate, up)


def _swiglu_with_power(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + mx.power(math.e, -gate))


@partial(mx.compile, shapeless=True)
def _swiglu_compiled(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def _on_x86_cpu() -> bool:
    return _is_x86() and mx.default_device().type == mx.DeviceType.cpu


@cache
def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
