"""Turns arrays that hold an image into PIL images of 8 bits per colour.

(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, wider integers, or float from 0 to 1 -> PIL image
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Levels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


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
