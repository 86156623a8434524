"""Heads that give every pixel a class, one linear map or a small decoder that doubles the patch map; their loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.learn.dense import Double, Refine, bilinear
from mlx_aimv2.plot import IGNORED

WIDTH, CONTEXT = 256, 3
"""Channels of the decoder, or half the encoder's width where that is less; and convolutions on the patch map, where
they cost least: they tell each pixel what lies around it."""


class LinearSegmentHead(nn.Module):
    """A class for each patch, interpolated between their centres: `(B, N, D), grid -> logits (B, H, W, K)`.

    The linear probe of DINOv2 (arXiv 2304.07193, section 7.4).
    """

    def __init__(self, width: int, classes: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(width, classes)

    def __call__(self, tokens: mx.array, grid: tuple[int, int]) -> dict[str, mx.array]:
        return _outputs(self.linear(mx.unflatten(tokens, 1, grid)), grid, self.patch_size)


class DecoderSegmentHead(nn.Module):
    """Convolutions, two doublings with one more after each, a linear map: `(B, N, D), grid -> logits (B, H, W, K)`.

    Classes are decided at a quarter of a patch, and interpolated to pixels from there.
    """

    def __init__(self, width: int, classes: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        channels = min(WIDTH, max(1, width // 2))
        half = max(1, channels // 2)
        self.inner = nn.Linear(width, channels)
        self.context = [Refine(channels) for _ in range(CONTEXT)]
        self.double1 = Double(channels, channels)
        self.refine1 = Refine(channels)
        self.double2 = Double(channels, half)
        self.refine2 = Refine(half)
        self.norm = nn.LayerNorm(half)
        self.linear = nn.Linear(half, classes)

    def __call__(self, tokens: mx.array, grid: tuple[int, int]) -> dict[str, mx.array]:
        x = self.inner(mx.unflatten(tokens, 1, grid))  # (B, h, w, C)
        for refine in self.context:
            x = refine(x)
        x = self.refine1(self.double1(x))  # (B, 2h, 2w, C)
        x = self.refine2(self.double2(x))  # (B, 4h, 4w, C/2)
        return _outputs(self.linear(nn.relu(self.norm(x))), grid, self.patch_size)


def _outputs(logits: mx.array, grid: tuple[int, int], patch_size: int) -> dict[str, mx.array]:
    rows, columns = grid
    return {"logits": bilinear(logits, (rows * patch_size, columns * patch_size))}


def make_head(kind: str, config: Aimv2VisionConfig, classes: int, options: Mapping[str, Any]) -> nn.Module:
    """The linear head, or for all other types the decoder."""
    head = LinearSegmentHead if kind == "linear" else DecoderSegmentHead
    return head(config.hidden_size, classes, config.patch_size)


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Cross-entropy and Dice loss of each image, over its labelled pixels: `(B, H, W, K), (B, H, W) -> (B,)`.

    Cross-entropy alone takes long to leave the answer that all is background; Dice counts small classes as much as
    large ones (arXiv 1606.04797; the sum is nnU-Net's, arXiv 1809.10486). Its mean is over the classes in the image.
    """
    mask = targets["mask"].astype(mx.int32)
    logits = outputs["logits"].astype(mx.float32)
    batch, _, _, classes = logits.shape
    # Classes before pixels: sums over pixels then run along memory, which takes two thirds of the time on a CPU.
    logits = mx.contiguous(logits.reshape(batch, -1, classes).swapaxes(1, 2))  # (B, K, P)
    mask = mask.reshape(batch, 1, -1)
    known = (mask != IGNORED).astype(mx.float32)
    wanted = (mask == mx.arange(classes)[:, None]).astype(mx.float32)  # all zero where IGNORED
    largest = mx.stop_gradient(logits.max(axis=1, keepdims=True))  # cancels out
    weights = mx.exp(logits - largest)
    sums = weights.sum(axis=1, keepdims=True)
    picked = (logits * wanted).sum(axis=1, keepdims=True)
    cross = ((mx.log(sums) + largest) * known - picked).sum(axis=(1, 2)) / mx.maximum(known.sum(axis=(1, 2)), 1)
    likely = weights / sums * known
    shared, there = (likely * wanted).sum(axis=2), wanted.sum(axis=2)  # (B, K)
    dice = 2 * shared / mx.maximum(likely.sum(axis=2) + there, 1)
    present = (there > 0).astype(mx.float32)
    return cross + ((1 - dice) * present).sum(axis=1) / mx.maximum(present.sum(axis=1), 1)
