"""Finds the decoder of an image file, and makes upright RGB of what it decoded.

open file -> PIL image, not loaded; loaded PIL image -> turned upright -> mode RGB, transparency laid on white
"""

from __future__ import annotations

import struct
from typing import IO, TYPE_CHECKING, TypeAlias, cast

import numpy as np

from mlx_aimv2.image_array import from_array

if TYPE_CHECKING:
    from PIL import Image

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom of the part of an image that is the image: decoding at a scale may add a rim."""

# Pillow reads these by starting another program, which a folder of strangers' images should not be able to do.
NOT_OPENED = {"EPS"}

# The brands by which a HEIC file names itself, after "ftyp" at byte 4.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}

STRIP_PIXELS = 1 << 20
"""Pixels that are laid on white at once."""


def identify(stream: IO[bytes], name: str) -> Image.Image:
    """What Image.open does, without its DecompressionBombWarning: filters of warnings belong to all threads."""
    from PIL import Image

    start = stream.read(16).ljust(16, b"\0")  # some of Pillow's plugins unpack numbers without asking for its length
    tried: set[str] = set()
    fault = ""
    for prepare in (Image.preinit, Image.init):
        prepare()
        for kind in [kind for kind in Image.ID if kind not in tried | NOT_OPENED]:
            tried.add(kind)
            make, accept = Image.OPEN[kind]
            answer = accept is None or accept(start)
            if not answer or isinstance(answer, str):  # a string tells what Pillow was built without
                continue
            try:
                stream.seek(0)
                return make(stream, name)
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                if accept is not None:  # it began as one of these, so this is the fault to tell
                    fault = fault or f"{kind}: {error}"
            except MemoryError:
                raise
            except Exception as error:
                raise ValueError(f"{name} cannot be read as an image: {error}") from None
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
        return _open_heic(stream, name)
    raise ValueError(
        f"{name} is a broken {fault}" if fault else f"{name} is not an image in a format that Pillow reads"
    )


def _open_heic(stream: IO[bytes], name: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise ValueError(f"{name} is a HEIC image: pip install 'mlx-aimv2[heic]' to read it") from None
    try:
        stream.seek(0)
        # A Pillow image that decodes when it is loaded, so that its size is checked before.
        return cast("Image.Image", pillow_heif.HeifImageFile(stream, name))
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from None


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Upright, by the number that EXIF keeps."""
    from PIL import Image

    turn = Image.Transpose
    method = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }.get(orientation)
    if method is None:
        return image
    upright = image.transpose(method)
    upright.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
    return upright


def turned_box(filled: tuple[float, float], size: tuple[int, int], orientation: int) -> Box:
    """The part (0, 0, *filled) of an image of this (width, height), after it was turned upright."""
    (wide, high), (width, height) = filled, size
    left, top = (
        width - wide if orientation in (2, 3, 7, 8) else 0.0,
        height - high if orientation in (3, 4, 6, 7) else 0.0,
    )
    if orientation >= 5:
        return top, left, top + high, left + wide
    return left, top, left + wide, top + high


def flattened(image: Image.Image, name: str) -> Image.Image:
    """Mode RGB: levels of 8 bits, transparency laid on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = from_array(np.asarray(image), name)
    try:
        if image.mode in ("La", "RGBa"):  # colours already multiplied by their opacity
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            return _on_white(image)
        return image.convert("RGB")
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{name} has the colour mode {image.mode}, which Pillow cannot turn into RGB: {error}"
        ) from None


def _on_white(image: Image.Image) -> Image.Image:
    """White behind what is transparent, as in transformers: what lies hidden there is often noise.

    In strips, so that a large image is not held four times.
    """
    from PIL import Image

    done = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        if "transparency" in image.info:
            strip.info["transparency"] = image.info["transparency"]
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        done.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return done
