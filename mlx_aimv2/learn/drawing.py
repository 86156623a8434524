"""Draws what model cards and overlays are made of: images in rows with captions, columns, colours of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mlx_aimv2 import plot

if TYPE_CHECKING:
    from PIL import Image

Colour: TypeAlias = tuple[int, int, int]

FAINT = (120, 124, 132)

CLASSES = (
    (214, 69, 65),
    (56, 120, 190),
    (44, 150, 90),
    (236, 150, 30),
    (130, 85, 175),
    (0, 155, 170),
    (190, 90, 140),
    (120, 130, 40),
    (105, 85, 70),
    (90, 105, 130),
)
"""Ten colours that are easy to tell apart on white."""


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    frames: Sequence[Sequence[Colour | None]] | None = None,
    side: int = 96,
    gap: int = 10,
) -> Image.Image:
    """Images in rows on white, each fitted into a square of `side` pixels.

    `captions` and `frames` follow the shape of `rows`: a line of text under each image, a coloured frame around it.
    """
    from PIL import Image, ImageDraw, ImageOps

    text = max(11, side // 8) if captions else 0
    step = (side + gap, side + gap + (text + 6 if captions else 0))
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * step[0] + gap, len(rows) * step[1] + gap), plot.PAPER)
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            left, top = gap + c * step[0], gap + r * step[1]
            fitted = ImageOps.contain(image.convert("RGB"), (side, side), plot.sampling(image, side))
            place = (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2)
            canvas.paste(fitted, place)
            if frames and (colour := frames[r][c]):
                edges = (place[0] - 3, place[1] - 3, place[0] + fitted.width + 2, place[1] + fitted.height + 2)
                draw.rectangle(edges, outline=colour, width=3)
            if captions:
                draw.text((left + side / 2, top + side + 5), captions[r][c], plot.INK, font(text), anchor="mt")
    return canvas


def below(images: Sequence[Image.Image], *, gap: int = 24) -> Image.Image:
    """Images in a column as they are, their left edges in line."""
    places = np.cumsum([0, *(image.height + gap for image in images)])
    size = (max(image.width for image in images), int(places[-1]) - gap)
    return plot.pasted(images, [(0, int(top)) for top in places[:-1]], size)


def font(size: int) -> Any:
    """Pillow's own font in `size` pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size)
