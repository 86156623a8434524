"""The layers of the network: patch embedding, positions, attention, feed-forward, block, pooling head.

At the end MLX's own layers, with zero weights inside `empty()`, for models whose weights are about to be loaded. MLX's
constructors draw random weights. In a thread that ends as the process exits, that aborts the process: MLX's random
state belongs to the thread and is freed too late. Nor should loading advance the user's random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.long_attention import LONG, long_attention

POSITION_BASE = 10000.0


class PatchEmbed(nn.Module):
    """Cuts images into patches: `(B, H, W, 3) -> (B, N, D)`, a convolution whose stride is its kernel, then RMSNorm.

    Rows and columns that do not fill a patch are dropped at the bottom and at the right.
    """

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int, eps: float) -> None:
        super().__init__()
        self.proj = PatchConv(num_channels, hidden_size, patch_size)
        self.norm = nn.RMSNorm(hidden_size, eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        weight = self.proj.weight  # (D, p, p, C)
        # One matrix product, not self.proj(pixels): the convolution rounds half precision before it adds the bias,
        # which doubled the error of float16 features on the CPU.
        x = patches_of(pixels, weight.shape[1])
        return self.norm(mx.addmm(self.proj.bias, x, weight.reshape(weight.shape[0], -1).T))


def patches_of(pixels: mx.array, p: int) -> mx.array:
    """Images cut into patches of p pixels a side, row by row: `(B, H, W, C) -> (B, N, p * p * C)`."""
    batch, rows, columns, channels = pixels.shape[0], pixels.shape[1] // p, pixels.shape[2] // p, pixels.shape[3]
    x = pixels[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, channels)
    # A patch's pixels must be neighbours in memory, in the order of the kernel: row, column, channel.
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, p * p * channels)


def pixels_of(patches: mx.array, grid: tuple[int, int], p: int) -> mx.array:
    """The images that patches were cut from, `(B, N, p * p * C) -> (B, H, W, C)`; `grid` is rows and columns."""
    rows, columns = grid
    x = patches.reshape(-1, rows, columns, p, p, patches.shape[-1] // p**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], rows * p, columns * p, -1)


@lru_cache(maxsize=64)
def sincos_positions(rows: int, columns: int, hidden_size: int) -> np.ndarray[Any, Any]:
    """Positions of a native model's grid: `rows, columns, D -> (rows * columns, D)` float32.

    The first half of each vector codes the column, the second half the row, each as all sines and then all cosines
    with the frequencies `10000 ** (-i / (D/4))`. Computed in double precision: in half precision the large angles of
    far patches would be off by up to 0.3.
    """
    omega = POSITION_BASE ** -(np.arange(hidden_size // 4) / (hidden_size // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = (column[:, None] * omega, row[:, None] * omega)
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return table.astype(np.float32)


class Attention(nn.Module):
    """Multi-head self-attention, added to `residual`: `(B, N, D) -> (B, N, D)`; query, key and value are one matrix."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.proj = Linear(hidden_size, hidden_size, bias=False)

    def __call__(
        self, x: mx.array, *, residual: mx.array, causal: bool = False, mask: mx.array | None = None
    ) -> mx.array:
        attend = long_attention if self.training and x.shape[1] >= LONG else attention
        x = attend(*self.heads(x), causal=causal, mask=mask)  # (B, H, N, D/H)
        return project_and_add(self.proj, merge_heads(x), residual)

    def heads(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values: `(B, N, D) -> three (B, H, N, D/H)`."""
        # Splitting gives views; indexing a (B, N, 3, ...) array would copy three times.
        q, k, v = (split_heads(part, self.num_heads) for part in mx.split(self.qkv(x), 3, axis=-1))
        return q, k, v


class FeedForward(nn.Module):
    """SwiGLU, added to `residual`: `(B, N, D) -> (B, N, D)` through I features."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, intermediate_size, bias=False)
        self.up = Linear(hidden_size, intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array, *, residual: mx.array) -> mx.array:
        return project_and_add(self.down, swiglu(self.gate(x), self.up(x)), residual)


class Block(nn.Module):
    """A transformer block with the norms first: `(B, N, D) -> (B, N, D)`."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden_size, eps)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.RMSNorm(hidden_size, eps)
        self.mlp = FeedForward(hidden_size, intermediate_size)

    def __call__(self, x: mx.array, *, causal: bool = False, mask: mx.array | None = None) -> mx.array:
        x = self.attn(self.norm1(x), residual=x, causal=causal, mask=mask)
        return self.mlp(self.norm2(x), residual=x)


class AttentionPoolingHead(nn.Module):
    """All tokens to one vector, `(B, N, D) -> (B, D)`: attention with one learned query, then a linear map."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cls_token = mx.zeros((1, 1, hidden_size))
        self.k = Linear(hidden_size, hidden_size, bias=False)
        self.v = Linear(hidden_size, hidden_size, bias=False)
        self.linear = Linear(hidden_size, hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        query = mx.broadcast_to(self.cls_token, (x.shape[0], 1, x.shape[2]))
        q, k, v = (split_heads(part, self.num_heads) for part in (query, self.k(x), self.v(x)))
        pooled = merge_heads(attention(q, k, v))  # (B, 1, D)
        return self.linear(pooled[:, 0])


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool = False, mask: mx.array | None = None
) -> mx.array:
    """Softmax attention, scale `head_dim ** -0.5`: `(B, H, M, D/H), two (B, H, N, D/H) -> (B, H, M, D/H)`.

    With `causal` (M = N) a token attends to itself and to earlier ones; with a boolean `mask` (B, M, N) where it is
    true. At most one of the two.
    """
    scale = queries.shape[-1] ** -0.5
    allowed = mask[:, None] if mask is not None else "causal" if causal else None
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=allowed)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """The gated product of the feed-forward, `silu(gate) * up`: two `(B, N, I) -> (B, N, I)`."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return _fused_swiglu(gate, up)
    return gate * mx.sigmoid(gate) * up  # MLX compiles for a CPU by starting a C++ compiler, which may not be there


@partial(mx.compile, shapeless=True)
def _fused_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def project_and_add(layer: nn.Module, x: mx.array, residual: mx.array) -> mx.array:
    """`residual + layer(x)`, `(B, N, I) and (B, N, D) -> (B, N, D)`: on a GPU one kernel if the layer is plain."""
    if not isinstance(layer, nn.Linear) or "bias" in layer:  # adapted or packed
        added: mx.array = layer(x)
        return residual + added
    # As two axes: with three, the gradient of the weight would be one matrix for each image before it is summed.
    return mx.addmm(residual.flatten(0, -2), x.flatten(0, -2), layer.weight.T).reshape(residual.shape)


def split_heads(x: mx.array, num_heads: int) -> mx.array:
    """`(B, N, D) -> (B, H, N, D/H)`: heads before tokens, so that one matrix product serves each head."""
    batch, tokens, dims = x.shape
    return x.reshape(batch, tokens, num_heads, dims // num_heads).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """`(B, H, N, D/H) -> (B, N, D)`."""
    batch, heads, tokens, dims = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * dims)


_is_empty = ContextVar("_is_empty", default=False)


@contextmanager
def empty() -> Iterator[None]:
    """Inside the block, and only in this thread, the three layers below start with zeros."""
    token = _is_empty.set(True)
    try:
        yield
    finally:
        _is_empty.reset(token)


class Linear(nn.Linear):
    """`nn.Linear`: `(…, D) -> (…, E)`."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True) -> None:
        if not _is_empty.get():
            super().__init__(input_dims, output_dims, bias=bias)
            return
        nn.Module.__init__(self)
        self.weight = mx.zeros((output_dims, input_dims))
        if bias:
            self.bias = mx.zeros((output_dims,))


class PatchConv(nn.Conv2d):
    """`nn.Conv2d` whose stride is its kernel: `(B, H, W, channels) -> (B, H / kernel, W / kernel, D)`."""

    def __init__(self, channels: int, dims: int, kernel: int) -> None:
        if not _is_empty.get():
            super().__init__(channels, dims, kernel_size=kernel, stride=kernel)
            return
        nn.Module.__init__(self)
        self.weight, self.bias = mx.zeros((dims, kernel, kernel, channels)), mx.zeros((dims,))
        self.stride, self.padding, self.dilation, self.groups = (kernel, kernel), (0, 0), 1, 1


class Embedding(nn.Embedding):
    """`nn.Embedding`: `(B, L) -> (B, L, D)`."""

    def __init__(self, num_embeddings: int, dims: int) -> None:
        if not _is_empty.get():
            super().__init__(num_embeddings, dims)
            return
        nn.Module.__init__(self)
        self.weight = mx.zeros((num_embeddings, dims))
