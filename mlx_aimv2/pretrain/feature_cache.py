"""The frozen trunk's features of all images, computed once and kept on disk in half precision."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_aimv2.images import to_rgb
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.captioned import Data
from mlx_aimv2.processor import Aimv2Processor
from mlx_aimv2.train.augment import Augmentation

BATCH = 64


@dataclass(frozen=True)
class Features:
    """Features (n, views, N, D) float16 on disk, and the captions of the n images."""

    array: np.ndarray[Any, np.dtype[np.float16]]
    texts: list[tuple[str, ...]]


def cache_features(
    model: Aimv2VisionModel,
    processor: Aimv2Processor,
    data: Data,
    file: Path,
    *,
    views: int,
    augmentation: Augmentation,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> Features:
    """The trunk's last hidden states of every image, as it is and in `views - 1` random crops.

    An image that cannot be read is passed over with a note. Raises OSError where the disk has no room for them.
    """
    size, tokens = model.config.image_size, model.config.num_patches
    if size is None or tokens is None:
        raise ValueError("LiT tuning keeps features of equal length; this encoder takes images of any size")
    count = sum(1 for _ in data.epoch(None))
    shape = (count, views, tokens, model.config.hidden_size)
    needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(file.parent).free
    if needed > free:
        raise OSError(
            f"the features of {count:,} images in {views} views need {needed:,} bytes, {file.parent} has {free:,}; "
            "take fewer --views"
        )
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    texts: list[tuple[str, ...]] = []
    pending: list[np.ndarray[Any, Any]] = []

    def flush() -> None:
        done = len(texts) * views - len(pending)
        flat = array.reshape(count * views, *shape[2:])
        for start in range(0, len(pending), BATCH):
            pixels = mx.array(np.stack(pending[start : start + BATCH]))
            found = np.array(model(pixels).last_hidden_state.astype(mx.float32))
            flat[done + start : done + start + len(found)] = found
        pending.clear()
        report(f"features of {len(texts):,} of {count:,} images")

    for number, example in enumerate(data.epoch(None)):
        chance = np.random.default_rng((seed, 2, number))
        try:
            image = to_rgb(example.image)
            crops = [augmentation(image, (size, size), chance) for _ in range(views - 1)]
            own = [processor.pixels(one) for one in (image, *crops)]
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; passed over", stacklevel=2)
            continue
        pending += own
        texts.append(example.texts)
        if len(pending) >= 16 * BATCH:
            flush()
    if pending:
        flush()
    array.flush()
    return Features(array[: len(texts)], texts)
