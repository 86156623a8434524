"""What is trained: an encoder with a head on its tokens; and the size of the images that it is trained on."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.backend import run_blocks
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.model import Aimv2VisionModel


class Learner(nn.Module):
    """An encoder and a head: `(B, H, W, 3) -> {name: (B, …)}`."""

    def __init__(self, encoder: Aimv2VisionModel, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def __call__(
        self,
        pixels: mx.array,
        *,
        patch_mask: mx.array | None = None,
        checkpoint: bool = False,
        drop_path: float = 0.0,
        key: mx.array | None = None,
    ) -> dict[str, mx.array]:
        """The head's outputs. `checkpoint` computes each block again for its gradient instead of keeping its inside.

        `drop_path` is the share of images for which the last block is skipped, rising linearly from zero at the first
        (Huang et al. 2016), drawn by `key`.
        """
        encoder = self.encoder
        x = encoder.embed(pixels, patch_mask=patch_mask)
        if checkpoint or drop_path > 0:
            x = run_training_blocks(encoder.blocks, x, checkpoint=checkpoint, drop_path=drop_path, key=key)
        else:
            *_, x = run_blocks(encoder.blocks, x)
        outputs: dict[str, mx.array] = self.head(encoder.norm(x), encoder.grid(pixels))
        return outputs


def run_training_blocks(
    blocks: list[nn.Module], x: mx.array, *, checkpoint: bool, drop_path: float, key: mx.array | None
) -> mx.array:
    """Runs tokens through blocks as training does: `(B, N, D) -> (B, N, D)`."""
    keys = mx.random.split(key if key is not None else mx.random.key(0), len(blocks))
    for number, block in enumerate(blocks):
        run = partial(_run_one, block)
        if checkpoint:
            run = nn.utils.checkpoint(block, run)
        rate = drop_path * number / max(1, len(blocks) - 1)
        x = run(x) if rate == 0 else _for_some(run, x, rate, keys[number])
    return x


def _run_one(block: nn.Module, x: mx.array) -> mx.array:
    return next(run_blocks([block], x))


def _for_some(run: partial[mx.array], x: mx.array, rate: float, key: mx.array) -> mx.array:
    """Runs a block for a random part of the images alone and enlarges what it adds, as in DINOv2."""
    batch = x.shape[0]
    draw, order = mx.random.split(key, 2)
    count = int(np.floor(batch * (1 - rate) + mx.random.uniform(key=draw).item()))
    if count == 0:
        return x
    chosen = mx.sort(mx.random.permutation(batch, key=order)[:count])
    kept = x[chosen]
    return x.at[chosen].add((run(kept) - kept) / (1 - rate))


def canvas_size(processor: Aimv2Processor) -> tuple[int, int]:
    """(height, width) of every image from a processor with one final size."""
    size = processor.preprocessing.final_size
    if size is None:
        raise ValueError("images of one batch need one size: make the processor with loading.at_size")
    return size


def grid_of(processor: Aimv2Processor) -> tuple[int, int]:
    """Rows and columns of patches of every image from a processor with one final size."""
    height, width = canvas_size(processor)
    return height // processor.patch_size, width // processor.patch_size
