"""The two losses: the next patch's squared error, the next token's cross-entropy."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2 import x86, x86_training

ALPHA = 0.4
"""Weight of the image loss beside the text loss (arXiv 2411.14402, section 3.1)."""

EPS = 1e-6
"""Added to a patch's variance (He et al. 2021, arXiv 2111.06377, their code)."""


def patches_of(pixels: mx.array, patch_size: int) -> mx.array:
    """Images cut into patches, row by row: `(B, H, W, C) -> (B, I, patch_size * patch_size * C)`."""
    batch, height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels[:, : rows * patch_size, : columns * patch_size]
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, patch_size * patch_size * channels)


def normalised(patches: mx.array) -> mx.array:
    """Each patch with mean 0 and variance 1 over its values, in float32: `(B, I, P) -> (B, I, P)`."""
    x = patches.astype(mx.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = mx.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) * mx.rsqrt(variance + EPS)


def image_loss(predicted: mx.array, patches: mx.array, lengths: mx.array) -> mx.array:
    """Mean squared error over the patches after each prefix: `(B, I - 1, P), (B, I, P), (B,) -> (B,)`."""
    target = normalised(patches[:, 1:])
    error = mx.square(predicted.astype(mx.float32) - target).mean(axis=-1)  # (B, I - 1)
    counts = mx.arange(1, patches.shape[1])[None] >= lengths[:, None]
    return (error * counts).sum(axis=1) / counts.sum(axis=1)


def text_loss(logits: mx.array, targets: mx.array, counts: mx.array) -> mx.array:
    """Cross-entropy per caption, the mean over its tokens: `(B, T, V), (B, T), (B, T) boolean -> (B,)`.

    `counts` leaves out the filling after the end of text.
    """
    each = cross_entropy(logits.astype(mx.float32), targets)
    return (each * counts).sum(axis=1) / mx.maximum(counts.sum(axis=1), 1)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """`-log softmax(logits)[target]`: `(B, T, V), (B, T) -> (B, T)`."""
    return x86_training.cross_entropy(logits, targets) if x86.on_x86_cpu() else nn.losses.cross_entropy(logits, targets)


def is_counted(targets: mx.array, eos: int) -> mx.array:
    """Tokens up to and with the first end of text: `(B, T) -> (B, T)` boolean."""
    ends = (targets == eos).astype(mx.int32)
    return mx.cumsum(ends, axis=1) - ends == 0
