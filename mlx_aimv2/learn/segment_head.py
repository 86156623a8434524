"""Heads that give every pixel a class: one linear map, or a small decoder that doubles the patch map twice."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.learn.upsample import Double, Refine, bilinear

WIDTH = 256
"""Channels of the decoder, or half the encoder's width where that is less."""


CONTEXT = 3
"""Convolutions on the patch map, where they cost least: they tell each pixel what lies around it."""


class LinearSegmentHead(nn.Module):
    """A class for each patch, interpolated between their centres: `(B, N, D), grid -> logits (B, H, W, K)`.

    The linear probe of DINOv2 (arXiv 2304.07193, section 7.4).
    """

    def __init__(self, width: int, classes: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(width, classes)

    def __call__(self, tokens: mx.array, grid: tuple[int, int]) -> dict[str, mx.array]:
        return _outputs(self.linear(as_map(tokens, grid)), grid, self.patch_size)


class DecoderSegmentHead(nn.Module):
    """Convolutions, two doublings with one more after each, a linear map: `(B, N, D), grid -> logits (B, H, W, K)`.

    Classes are decided at a quarter of a patch, and interpolated to pixels from there.
    """

    def __init__(self, width: int, classes: int, patch_size: int, *, channels: int | None = None) -> None:
        super().__init__()
        self.patch_size = patch_size
        channels = channels or min(WIDTH, max(1, width // 2))
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
        x = self.inner(as_map(tokens, grid))  # (B, h, w, C)
        for refine in self.context:
            x = refine(x)
        x = self.refine1(self.double1(x))  # (B, 2h, 2w, C)
        x = self.refine2(self.double2(x))  # (B, 4h, 4w, C/2)
        return _outputs(self.linear(nn.relu(self.norm(x))), grid, self.patch_size)


def as_map(tokens: mx.array, grid: tuple[int, int]) -> mx.array:
    """Tokens in their grid: `(B, N, D) -> (B, h, w, D)`."""
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


def _outputs(logits: mx.array, grid: tuple[int, int], patch_size: int) -> dict[str, mx.array]:
    rows, columns = grid
    return {"logits": bilinear(logits, (rows * patch_size, columns * patch_size))}
