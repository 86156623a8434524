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


def dated(path: Path, original: str | None, changed: str | None = None, **settings: object) -> Path:
    """Writes an image anew with EXIF's DateTimeOriginal and DateTime."""
    exif = Image.Exif()
    if original is not None:
        exif.get_ifd(0x8769)[0x9003] = original
    if changed is not None:
        exif[0x0132] = changed
    with Image.open(path) as opened:
        opened.convert("RGB").save(path, exif=exif.tobytes(), **settings)
    return path
