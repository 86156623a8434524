"""Small images in every format that Pillow writes here, plain and with what files carry besides their pixels."""

from __future__ import annotations

import io
import random
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import broken_bytes

MODES = ("RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "F", "LA")

NOT_WRITTEN = ("PDF", "BUFR", "GRIB", "HDF5", "WMF")
"""Formats that Pillow only passes on, or does not read."""

SLOW = ("ICNS", "AVIF")
"""Formats that are written in one mode only, to save time."""

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("JPEG", {"progressive": True}),
    ("JPEG", {"quality": 30, "restart_marker_blocks": 1}),
    ("PNG", {"compress_level": 0}),
    ("PNG", {"bits": 4}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", {"compression": "packbits"}),
    ("TIFF", {"compression": "jpeg"}),
    ("TIFF", {"compression": "group4"}),
    ("WEBP", {"lossless": True}),
    ("JPEG2000", {"irreversible": True}),
    ("TGA", {"compression": "tga_rle"}),
    ("GIF", {"interlace": True}),
)
"""Format and options of the encoder."""


def make_images(folder: Path) -> None:
    """Files that are whole, each of some hundred bytes to some kilobytes; about 150 of them."""
    from PIL import Image

    Image.init()
    folder.mkdir()
    formats = [(name, {}) for name in sorted(Image.SAVE) if name not in NOT_WRITTEN]
    for number, (name, options) in enumerate((*formats, *VARIANTS)):
        for mode in MODES[:1] if name in SLOW else MODES:
            data = _saved(_picture(mode), name, {**_extras(name), **options})
            if data is not None:
                (folder / f"{number:02d}-{name}-{mode.replace(';', '-')}").write_bytes(data)


@cache
def _whole(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.iterdir())]


def broken_image(dice: random.Random, folder: Path) -> bytes:
    """One of these files, broken; half of the time near its start, where sizes and offsets are."""
    data = dice.choice(_whole(folder))
    if dice.random() < 0.5:
        head = dice.choice((32, 128, 512))
        return broken_bytes(data[:head], dice) + data[head:]
    return broken_bytes(data, dice)


def _picture(mode: str) -> Any:
    from PIL import Image

    image = Image.frombytes("RGB", (47, 43), random.Random(5).randbytes(47 * 43 * 3))
    image = Image.blend(image, Image.radial_gradient("L").resize((47, 43)).convert("RGB"), 0.8)
    if mode == "I;16":
        return Image.frombytes("I;16", (47, 43), random.Random(6).randbytes(47 * 43 * 2))
    return image.convert(mode)


def _extras(name: str) -> dict[str, Any]:
    """An EXIF block, a colour profile and a second frame where the format has a place for them."""
    from PIL import Image, ImageCms

    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    extras: dict[str, Any] = {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    if name in ("JPEG", "PNG", "WEBP"):
        extras["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if name in ("GIF", "WEBP", "PNG"):
        extras |= {"save_all": True, "append_images": [_picture("RGB").rotate(90).resize((47, 43))]}
    return extras


def _saved(image: Any, name: str, options: dict[str, Any]) -> bytes | None:
    if options.get("compression") in ("jpeg", "group4") and image.mode not in ("RGB", "L", "1"):
        return None  # libtiff would complain on stderr
    stream = io.BytesIO()
    try:
        image.save(stream, name, **options)
    except Exception:  # no such mode in this format
        return None
    return stream.getvalue()
