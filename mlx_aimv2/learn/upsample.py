"""Makes feature maps larger and smaller by matrix products, which MLX runs fast on every device.

Doubling is a linear map and a rearrangement: a transposed convolution of stride 2 says the same, but takes some 40
times as long on MLX's CPU backend (64 channels, 32 x 32, forward; gradients 30 times). Plain 3 x 3 convolutions are
faster there than the same by matrix products, so they stay convolutions.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def as_map(tokens: mx.array, grid: tuple[int, int]) -> mx.array:
    """Tokens in their grid: `(B, N, D) -> (B, h, w, D)`."""
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


class Double(nn.Module):
    """Twice as many rows and columns: `(B, h, w, C) -> (B, 2h, 2w, E)`; each position becomes four by a linear map."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 4 * out)

    def __call__(self, x: mx.array) -> mx.array:
        batch, rows, columns, _ = x.shape
        x = self.proj(x).reshape(batch, rows, columns, 2, 2, -1)
        # Row of the four beside the row, column beside the column.
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows, 2 * columns, -1)


class Refine(nn.Module):
    """Norm, ReLU and a 3 x 3 convolution, added to the input: `(B, h, w, C) -> (B, h, w, C)`.

    ReLU, because GELU's tanh takes a quarter of the time of the whole layer on MLX's CPU backend.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.conv(nn.relu(self.norm(x)))


def halve(x: mx.array) -> mx.array:
    """The largest of each 2 x 2 positions: `(B, h, w, C) -> (B, ceil(h/2), ceil(w/2), C)`; an odd edge is repeated."""
    if x.shape[1] % 2:
        x = mx.concatenate([x, x[:, -1:]], axis=1)
    if x.shape[2] % 2:
        x = mx.concatenate([x, x[:, :, -1:]], axis=2)
    batch, rows, columns, channels = x.shape
    return x.reshape(batch, rows // 2, 2, columns // 2, 2, channels).max(axis=(2, 4))


def bilinear(x: mx.array, size: tuple[int, int]) -> mx.array:
    """A map at `size` (rows, columns) by linear interpolation: `(B, h, w, C) -> (B, rows, columns, C)`."""
    batch, rows, columns, channels = x.shape
    down, across = (mx.array(linear_weights(*sizes)).astype(x.dtype) for sizes in ((rows, size[0]), (columns, size[1])))
    x = (down @ x.reshape(batch, rows, columns * channels)).reshape(batch, size[0], columns, channels)
    return across @ x  # the rows of a batch of matrices (columns, C)


@lru_cache(maxsize=32)
def linear_weights(source: int, target: int) -> np.ndarray:
    """Weights of linear interpolation along one axis, `-> (target, source)` float32; pixel centres, edges repeated."""
    places = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    first = np.minimum(np.floor(places).astype(int), max(source - 2, 0))
    weights = np.zeros((target, source), np.float32)
    rows = np.arange(target)
    weights[rows, first] += 1 - (places - first)
    weights[rows, np.minimum(first + 1, source - 1)] += places - first
    return weights
