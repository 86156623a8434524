"""Draws masks and boxes over their images, in colours that belong to classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.learn.drawing import CLASSES

if TYPE_CHECKING:
    from PIL import Image

OPACITY = 0.55

LARGEST = 1600
"""Pixels of the longer side of an overlay; larger images are drawn smaller."""

SMALLEST = 448
"""Small images are drawn larger, so that names can be read."""

IGNORED = 255


@lru_cache
def palette() -> bytes:
    """The 256 colours of PASCAL VOC's masks, as every viewer of such masks knows them: bits of the class, shuffled.

    0 is black, 255 nearly white.
    """
    colours = []
    for value in range(256):
        rest, colour = value, [0, 0, 0]
        for bit in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        colours += colour
    return bytes(colours)


def palette_image(labels: NDArray[Any]) -> Image.Image:
    """Class numbers as a palette image whose values they are: `(H, W) uint8 -> image of mode P`."""
    from PIL import Image

    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette())
    return image


def class_colour(label: int) -> tuple[int, int, int]:
    """The colour of a class in overlays: ten that are easy to tell apart, then the palette's."""
    if label < len(CLASSES):
        return CLASSES[label]
    red, green, blue = palette()[3 * (label % 256) : 3 * (label % 256) + 3]
    return red, green, blue


def with_mask(image: Image.Image, labels: NDArray[Any], classes: Sequence[str]) -> Image.Image:
    """An image under its coloured mask, names at the middle of what they name: `image, (H, W) -> image`.

    A first class called background stays bare, as do pixels that nobody labelled.
    """
    from PIL import Image

    bare = [IGNORED, *([0] if classes and classes[0].lower() in BACKGROUND else [])]
    laid, mask = _sized(image), Image.fromarray(labels.astype(np.uint8))
    mask = mask.resize(laid.size, Image.Resampling.NEAREST)
    values = np.asarray(mask)
    table = np.array([class_colour(value) for value in range(256)], np.float64)
    opacity = np.where(np.isin(values, bare), 0, OPACITY)[..., None]
    pixels = np.asarray(laid, np.float64)
    laid = Image.fromarray(np.rint(pixels + opacity * (table[values] - pixels)).astype(np.uint8))
    for label in np.unique(values):
        if label in bare or label >= len(classes):
            continue
        rows, columns = np.nonzero(values == label)
        if len(rows) >= values.size // 400:
            middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            _name(laid, (int(columns[middle]), int(rows[middle])), classes[label], class_colour(int(label)), "mm")
    return laid


BACKGROUND = ("background", "_background_", "__background__", "unlabeled", "unlabelled")


def with_boxes(
    image: Image.Image,
    boxes: NDArray[Any],
    labels: NDArray[Any],
    classes: Sequence[str],
    *,
    scores: NDArray[Any] | None = None,
) -> Image.Image:
    """An image with frames around objects and their names, scores in percent: `image, (n, 4), (n,) -> image`."""
    from PIL import ImageDraw

    laid = _sized(image)
    scale = laid.width / image.width
    draw = ImageDraw.Draw(laid)
    line = max(2, round(min(laid.size) / 200))
    for i in range(len(boxes) - 1, -1, -1):  # the surest on top
        left, top, right, bottom = (float(n) * scale for n in boxes[i])
        colour = class_colour(int(labels[i]))
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        text = classes[labels[i]] if scores is None else f"{classes[labels[i]]} {100 * scores[i]:.0f}"
        _name(laid, (left, top), text, colour, "lb" if top > 24 else "lt")
    return laid


def grid(columns: Sequence[Sequence[Image.Image]], *, height: int = 300, gap: int = 8) -> Image.Image:
    """Columns of images side by side on white, every image brought to one height."""
    from PIL import Image

    sized = [[i.resize((max(1, round(i.width * height / i.height)), height)) for i in column] for column in columns]
    widths = [max(image.width for image in column) for column in sized]
    rows = max(len(column) for column in sized)
    canvas = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), rows * (height + gap) - gap), (255, 255, 255))
    left = 0
    for column, width in zip(sized, widths, strict=True):
        for row, image in enumerate(column):
            canvas.paste(image, (left, row * (height + gap)))
        left += width + gap
    return canvas


def _sized(image: Image.Image) -> Image.Image:
    """A copy in RGB whose longer side is between `SMALLEST` and `LARGEST`."""
    longer = max(image.size)
    scale = min(LARGEST / longer, 1) if longer > SMALLEST else SMALLEST / longer
    return image.convert("RGB").resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))


def _name(image: Image.Image, place: tuple[float, float], text: str, colour: tuple[int, int, int], anchor: str) -> None:
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    box = draw.textbbox(place, text, font=font, anchor=anchor)
    draw.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill=colour)
    draw.text(place, text, (255, 255, 255), font, anchor=anchor)
