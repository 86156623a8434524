"""Draws what the decoder predicts: originals beside their prefix followed by the predicted patches."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_aimv2.files import atomic_file
from mlx_aimv2.images.preprocessing import CLIP_MEAN, CLIP_STD
from mlx_aimv2.pretrain.objective import EPS, Batch, Pretraining, patches_of


def draw_samples(model: Pretraining, batch: Batch, file: Path) -> None:
    """A PNG with a row for each image: the original; its prefix and the patches predicted from those before each.

    Predictions are of normalised patches, so they are shown with the mean and deviation of the true ones.
    """
    from PIL import Image

    patch_size = model.encoder.config.patch_size
    rows, columns = model.encoder.grid(batch.pixels)
    patches = patches_of(batch.pixels, patch_size)
    predicted, _ = model.predict(batch)
    mean = patches.mean(axis=-1, keepdims=True)
    deviation = mx.sqrt(mx.square(patches - mean).mean(axis=-1, keepdims=True) + EPS)
    shown = predicted.astype(mx.float32) * deviation[:, 1:] + mean[:, 1:]
    shown = mx.concatenate([patches[:, :1], shown], axis=1)
    is_prefix = mx.arange(rows * columns)[None] < batch.lengths[:, None]
    shown = mx.where(is_prefix[..., None], patches, shown)
    sides = [np.array(x).reshape(-1, rows, columns, patch_size, patch_size, 3) for x in (patches, shown)]
    images = [
        side.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * patch_size, columns * patch_size, 3) for side in sides
    ]
    grid = np.concatenate([np.concatenate(list(image), axis=0) for image in images], axis=1)
    levels = (grid * np.array(CLIP_STD) + np.array(CLIP_MEAN)).clip(0, 1) * 255
    with atomic_file(file) as stream:
        Image.fromarray(np.rint(levels).astype(np.uint8)).save(stream, format="PNG")
