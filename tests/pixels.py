"""Pixels for tests: soft noise, levels from pixels and back, a PNG header, a stored JSON file."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_aimv2.images.preprocessing import CLIP_MEAN, CLIP_STD


def noise(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    """Blotches rather than white noise, so that a filter has something to keep."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 5 + 2, width // 5 + 2, 4), np.uint8)
    whole = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return whole[..., : channels[0]] if channels else whole[..., 0]


def normalised(levels: np.ndarray) -> np.ndarray:
    return (levels / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)


def levels(pixels: np.ndarray) -> np.ndarray:
    """Back from pixels to the 0 to 255 they came from."""
    return np.rint((pixels * np.array(CLIP_STD) + np.array(CLIP_MEAN)) * 255).astype(int)


def stored(folder: Path, fields: dict, name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(json.dumps(fields))
    return folder


def png(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds no pixel of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
