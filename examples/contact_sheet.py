"""Arranges images on one canvas: in rows with captions and frames, below each other, with a title.

`demo.py` and `most_similar.py` draw with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mlx_aimv2 import plot

Colour = tuple[int, int, int]

FAINT = (120, 124, 132)


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
                draw.text((left + side / 2, top + side + 5), captions[r][c], plot.INK, _font(text), anchor="mt")
    return canvas


def titled(image: Image.Image, title: str, *, subtitle: str = "", size: int = 22) -> Image.Image:
    """A copy of an image with a line of text above it, and a fainter one below that."""
    band = round(size * 1.7) + (round(size * 1.05) if subtitle else 0)
    canvas = Image.new("RGB", (image.width, image.height + band), plot.PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((10, size * 0.4), title, plot.INK, _font(size))
    if subtitle:
        draw.text((10, size * 1.65), subtitle, FAINT, _font(round(size * 0.72)))
    canvas.paste(image, (0, band))
    return canvas


def below(images: Sequence[Image.Image], *, gap: int = 24) -> Image.Image:
    """Images in a column as they are, their left edges in line."""
    places = np.cumsum([0, *(image.height + gap for image in images)])
    size = (max(image.width for image in images), int(places[-1]) - gap)
    return plot.pasted(images, [(0, int(top)) for top in places[:-1]], size)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
