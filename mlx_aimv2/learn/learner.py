"""What is trained: an encoder with a head on its tokens; its image size, and its outputs on many images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.backend import run_blocks
from mlx_aimv2.embed.cache import Features
from mlx_aimv2.embed.encode import OnFailure, raise_failure
from mlx_aimv2.embed.loader import Decoded, Decoder, Outputs, images_at_once, run_ahead, split_into_chunks
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.learn.task_options import Task
from mlx_aimv2.model import Aimv2VisionModel


class Learner(nn.Module):
    """An encoder and a head: `(B, H, W, 3) -> {name: (B, …)}`.

    With `fills` a learned vector (D,) replaces each hidden patch, for heads that need a token at every position.
    """

    def __init__(self, encoder: Aimv2VisionModel, head: nn.Module, *, fills: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        if fills:
            self.hidden = mx.zeros((encoder.config.hidden_size,))

    def __call__(
        self,
        pixels: mx.array,
        *,
        visible: mx.array | None = None,
        checkpoint: bool = False,
        drop_path: float = 0.0,
        key: mx.array | None = None,
    ) -> dict[str, mx.array]:
        """The head's outputs. `visible` (B, M) are the patches that are not hidden, in order; by default all.

        `checkpoint` recomputes each block for its gradient instead of keeping its activations.

        `drop_path` is the share of images for which the last block is skipped, rising linearly from zero at the first
        (Huang et al. 2016), drawn by `key`.
        """
        encoder = self.encoder
        x = encoder.embed(pixels)
        if visible is not None:
            x = mx.take_along_axis(x, visible[..., None], axis=1)
        if checkpoint or drop_path > 0:
            x = run_training_blocks(encoder.blocks, x, checkpoint=checkpoint, drop_path=drop_path, key=key)
        else:
            *_, x = run_blocks(encoder.blocks, x)
        x, grid = encoder.norm(x), encoder.grid(pixels)
        if visible is not None and "hidden" in self:
            every = mx.broadcast_to(self.hidden.astype(x.dtype), (len(x), math.prod(grid), x.shape[-1]))
            x = mx.put_along_axis(every, mx.broadcast_to(visible[..., None], x.shape), x, axis=1)
        outputs: dict[str, mx.array] = self.head(x, grid)
        return outputs


def run_training_blocks(
    blocks: list[nn.Module], x: mx.array, *, checkpoint: bool, drop_path: float, key: mx.array | None
) -> mx.array:
    """Runs tokens through blocks as training does: `(B, N, D) -> (B, N, D)`."""
    keys = mx.random.split(key if key is not None else mx.random.key(0), len(blocks))
    for number, block in enumerate(blocks):
        run = partial(_run, block)
        if checkpoint:
            run = nn.utils.checkpoint(block, run)
        rate = drop_path * number / max(1, len(blocks) - 1)
        x = run(x) if rate == 0 else _for_some(run, x, rate, keys[number])
    return x


def _run(block: nn.Module, x: mx.array) -> mx.array:
    return next(run_blocks([block], x))


def _for_some(run: partial[mx.array], x: mx.array, rate: float, key: mx.array) -> mx.array:
    """Runs a block for only a random part of the images and scales up its output, as in DINOv2."""
    batch = x.shape[0]
    draw, order = mx.random.split(key, 2)
    # A compiled step has one shape: sometimes there is one extra image, with weight zero.
    chosen = mx.random.permutation(batch, key=order)[: min(batch, math.floor(batch * (1 - rate)) + 1)]
    is_drawn = mx.arange(chosen.size) < mx.floor(batch * (1 - rate) + mx.random.uniform(key=draw))
    share = is_drawn.astype(x.dtype)[:, None, None] / (1 - rate)
    return x.at[chosen].add((run(x[chosen]) - x[chosen]) * share)


def visible_patches(
    grid: tuple[int, int], hidden: int, shape: str, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The patches that remain when this many are hidden, `-> (M,)` in order.

    `random` hides them one by one; `block` in rectangles with sides of up to 10 : 3, each at least a quarter of all
    hidden patches (after BEiT, arXiv 2106.08254, algorithm 1).
    """
    left = np.ones(grid, bool)
    if shape == "random":
        left.flat[rng.permutation(left.size)[:hidden]] = False
    while (missing := hidden - np.count_nonzero(~left)) > 0:
        area, aspect = rng.uniform(hidden / 4, hidden), np.exp(rng.uniform(*np.log((0.3, 1 / 0.3))))
        high, wide = np.clip(np.rint(np.sqrt([area * aspect, area / aspect])), 1, grid).astype(int)
        top, side = rng.integers(0, grid[0] - high + 1), rng.integers(0, grid[1] - wide + 1)
        block = np.zeros(grid, bool)
        block[top : top + high, side : side + wide] = True
        left.flat[np.flatnonzero(block & left)[:missing]] = False
    return np.flatnonzero(left).astype(np.int32)


def outputs_of_head(
    head: nn.Module, samples: Sequence[Sample], features: Features, grid: tuple[int, int]
) -> Iterator[Outputs]:
    """A head's outputs on stored features, image after image."""
    for part in split_into_chunks(samples, images_at_once(math.prod(grid))):
        tokens = features.of(part)
        outputs = head(mx.array(tokens if tokens.ndim == 3 else tokens[:, None]), grid)
        arrays = {name: np.array(array.astype(mx.float32)) for name, array in outputs.items()}
        yield from ({name: array[row] for name, array in arrays.items()} for row in range(len(part)))


def outputs_of_files(
    learner: Learner, files: Sequence[str], processor: Aimv2Processor, fail: OnFailure = raise_failure
) -> Iterator[tuple[Decoded, Outputs]]:
    """The outputs of encoder and head on unaugmented images; an unreadable one goes to `fail(path, reason)`."""
    tokens = math.prod(processor.grid)
    for chunk in run_ahead(
        split_into_chunks(files, images_at_once(tokens)),
        Decoder(processor),
        lambda levels: learner(processor.normalised(levels)),
        patch=processor.patch_size,
        tokens=tokens,
    ):
        for image, outputs in chunk:
            if outputs is None:
                fail(image.path, image.failure or "")
            else:
                yield image, outputs


def outputs_of_learner(learner: Learner, samples: Sequence[Sample], processor: Aimv2Processor) -> Iterator[Outputs]:
    """The outputs of encoder and head on samples. Raises ValueError for an image that can no longer be read."""
    files = [sample.path for sample in samples]
    return (outputs for _, outputs in outputs_of_files(learner, files, processor))


def decoded(task: Task, samples: Sequence[Sample], outputs: Iterable[Outputs]) -> list[Any]:
    """A prediction for each sample from its outputs."""
    return [task.results.decode(output, sample.size) for sample, output in zip(samples, outputs, strict=True)]
