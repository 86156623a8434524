"""Makes an encoder take images of another size than its checkpoint's: the position table is resampled.

As timm and transformers do it; a native checkpoint has no table, and only its processor changes.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.processor import Aimv2Processor

NATIVE, NATIVE_WHOLE = 224, 448
"""Pixels of a side for native checkpoints, which take any: for labels of whole images, and for boxes and masks."""

LARGEST = 2044
"""Pixels of a side, 146 patches of 14: attention over more tokens would need more than 10 GB a head."""


def at_size(
    encoder: Aimv2VisionModel, processor: Aimv2Processor, size: int | None, *, whole: bool = False
) -> tuple[Aimv2VisionModel, Aimv2Processor]:
    """Encoder and processor for square images of `size` pixels a side: None takes the checkpoint's own.

    The processor cuts the middle out of an image, as the checkpoint's does, or with `whole` stretches all of it to the
    square. The weights are shared with `encoder`, only the positions are new. Raises ValueError for a size that is no
    multiple of the patch.
    """
    config = encoder.config
    patch = config.patch_size
    own = config.image_size
    if not whole and own is not None and size in (None, own):
        return encoder, processor
    if size is None:
        size = own or (NATIVE_WHOLE if whole else NATIVE) // patch * patch
    if own is None:
        size -= size % patch  # a native checkpoint drops what fills no patch
    if not patch <= size <= LARGEST or size % patch:
        below, above = (
            max(patch, min(LARGEST // patch * patch, n * patch)) for n in (size // patch, size // patch + 1)
        )
        raise ValueError(
            f"--image-size must be a multiple of the patch of {patch} pixels, at most {LARGEST}, got {size}; "
            f"take {below if below == above else f'{below} or {above}'}"
        )
    steps = replace(processor.preprocessing, resize=(size, size) if whole else size, crop=(size, size))
    resized = Aimv2Processor(steps, patch_size=patch)
    if own is None or size == own:
        return encoder, resized
    table = encoder.pos_embed.astype(mx.float32)
    grid, side = own // patch, size // patch
    model = Aimv2VisionModel(replace(config, image_size=size))
    model.update(encoder.parameters())
    model.pos_embed = resample(table, (grid, grid), (side, side)).astype(encoder.pos_embed.dtype)
    model.eval()
    return model, resized


def resample(table: mx.array, grid: tuple[int, int], target: tuple[int, int]) -> mx.array:
    """Positions of one grid at another, by cubic interpolation: `(rows * columns, D) -> (rows' * columns', D)`."""
    rows, columns = (mx.array(cubic_weights(*sizes)) for sizes in zip(grid, target, strict=True))
    x = table.reshape(*grid, -1)
    x = mx.tensordot(columns, mx.tensordot(rows, x, axes=1), axes=[[1], [1]])  # (columns', rows', D)
    return x.swapaxes(0, 1).flatten(0, 1)


def cubic_weights(source: int, target: int) -> np.ndarray:
    """Weights of cubic interpolation along one axis, `-> (target, source)` float32; each row's sum is 1.

    As torch's `interpolate(mode="bicubic", align_corners=False)`: Keys' kernel with a = -0.75, edges repeated.
    """
    places = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((target, source))
    for step in range(-1, 3):
        index = np.clip(first + step, 0, source - 1)
        np.add.at(weights, (np.arange(target), index), _keys(np.abs(places - first - step)))
    return weights.astype(np.float32)


def _keys(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic kernel at distances from 0 to 2 (IEEE Trans. ASSP 29, 1981)."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
