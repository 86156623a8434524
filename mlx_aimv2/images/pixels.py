"""Turns what a decoder or a caller gives into pixels: 8 bits per colour, mode RGB, upright, on white.

(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, wider integers, or float from 0 to 1 -> PIL image
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Levels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom of the part of an image that is the image: decoding at a scale may add a rim."""


def from_array(array: np.ndarray[Any, Any], name: str) -> Image.Image:
    """An array `(H, W)` or `(H, W, C)` -> PIL image in mode L, RGB or RGBA.

    Raises ValueError with one line that names the image where its shape or its range is unclear.
    """
    from PIL import Image

    shape = "x".join(str(n) for n in array.shape)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        raise ValueError(f"{name} of shape {shape} has its colours first: give array.transpose(1, 2, 0)")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"{name} has shape {shape}; wanted (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if 0 in array.shape:
        raise ValueError(f"{name} has shape {shape}: no pixels in it")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array, name)))


def _eight_bits(array: np.ndarray[Any, Any], name: str) -> Levels:
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        return cast("Levels", array)
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "u" and array.dtype.itemsize == 2:
        # The high byte, as Pillow does for 16-bit colour: exact for 8-bit images stored as v * 256 and as v * 257.
        return (array >> 8).astype(np.uint8)
    if kind not in "iuf":
        raise ValueError(f"{name} holds {array.dtype}; wanted uint8, uint16, bool, or float from 0 to 1")
    low, high = array.min(), array.max()
    if kind == "f" and low >= 0 and high <= 1:
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if kind != "f" and low >= 0 and high <= 65535:
        # Wider integers say nothing of their range: 8 bits where all fit in 8, else 16.
        return (array >> 8 if high > 255 else array).astype(np.uint8)
    raise ValueError(
        f"{name} holds {array.dtype} from {low} to {high}; wanted uint8, uint16, bool, or float from 0 to 1: "
        "scale it first"
    )


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
    upright.info = {key: image.info[key] for key in ("transparency",) if key in image.info}  # not to be turned again
    return upright


def turned_box(filled: tuple[float, float], size: tuple[int, int], orientation: int) -> Box:
    """The part (0, 0, *filled) of an image of this (width, height), after it was turned upright."""
    (wide, high), (width, height) = filled, size
    left = width - wide if orientation in (2, 3, 7, 8) else 0.0
    top = height - high if orientation in (3, 4, 6, 7) else 0.0
    if orientation >= 5:
        return top, left, top + high, left + wide
    return left, top, left + wide, top + high


def flattened(image: Image.Image, name: str) -> Image.Image:
    """Mode RGB: levels of 8 bits, and white behind what is transparent, as in transformers: it is often noise."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = from_array(np.asarray(image), name)
    try:
        if image.mode in ("La", "RGBa"):  # colours already multiplied by their opacity
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        on_white = Image.new("RGB", image.size, (255, 255, 255))
        on_white.paste(image, mask=image.getchannel("A"))
        return on_white
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{name} has the colour mode {image.mode}, which Pillow cannot turn into RGB: {error}"
        ) from None
