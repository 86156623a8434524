"""Puts a title above an image; `demo.py` draws with it."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from mlx_aimv2 import plot


def titled(image: Image.Image, title: str, *, subtitle: str = "", size: int = 22) -> Image.Image:
    """A copy of an image with a line of text above it, and a fainter one below that."""
    band = round(size * 1.7) + (round(size * 1.05) if subtitle else 0)
    canvas = Image.new("RGB", (image.width, image.height + band), plot.PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((10, size * 0.4), title, plot.INK, ImageFont.load_default(size))
    if subtitle:
        draw.text((10, size * 1.65), subtitle, plot.FAINT, ImageFont.load_default(round(size * 0.72)))
    canvas.paste(image, (0, band))
    return canvas
