"""Writes image files for tests: soft random colours, noise, one plain colour."""

from pathlib import Path

import numpy as np
from PIL import Image


def image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """An image of soft random colours, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    low = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def noise(path: Path, seed: int) -> Path:
    """An image of 60 x 50 soft random colours."""
    return image(path, (60, 50), seed)


def plain(path: Path, colour: tuple[int, int, int]) -> Path:
    """An image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (50, 44), colour).save(path)
    return path
