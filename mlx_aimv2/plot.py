"""Draws as PIL images: maps of dense features, masks and boxes over images, confusion matrices, images in rows.

Every square of a map is one token; nothing is smoothed, so the picture shows exactly what the model said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

Colour: TypeAlias = tuple[int, int, int]

INK, PAPER = (34, 36, 42), (255, 255, 255)
FAINT = (120, 124, 132)

CLASSES = (
    "#d64541", "#3878be", "#2c965a", "#ec961e", "#8255af", "#009baa", "#be5a8c", "#788228", "#695546", "#5a6982",
)  # fmt: skip
"""Ten colours that are easy to tell apart on white."""

IGNORED = 255
"""The value of unlabelled pixels in a mask; they are ignored everywhere."""

BACKGROUND = ("background", "_background_", "__background__", "unlabeled", "unlabelled")
"""Names of a first class that overlays leave uncoloured."""

OPACITY = 0.55

LARGEST = 1600
"""Pixels of the longer side of an overlay; larger images are drawn smaller."""

SMALLEST = 448
"""Small images are enlarged, to make names readable."""

CELL = 28
MAX_CLASSES = 40
"""Pixels of a cell of a confusion matrix, and the classes that it shows: the most confused ones."""

CHART, MAX_LINES = (420, 260), 14
"""Pixels of a chart, width and height, and the lines that are drawn in it."""

HEAT = ((16, 18, 52), (62, 38, 120), (140, 46, 116), (214, 84, 80), (248, 158, 66), (252, 236, 152))
"""From different to similar; lightness rises throughout, so the order survives in grey."""


def principal_components(features: NDArray[Any], count: int) -> NDArray[Any]:
    """The directions along which features differ most, `(n, D), count -> (n, count)` coordinates, most variance first.

    The sign of a component, which is arbitrary, is chosen to make its largest weight positive. If there are fewer
    components than requested, the rest is zero.
    """
    centred = np.asarray(features, np.float64)
    centred = centred - centred.mean(axis=0)
    wide = centred.shape[1] > len(centred)  # the smaller of the two square products has the same components
    product = centred @ centred.T if wide else centred.T @ centred
    spread, vectors = np.linalg.eigh(product)  # smallest first
    spread, vectors = spread[::-1][:count], vectors[:, ::-1][:, :count]
    directions = (centred.T @ vectors if wide else vectors)[:, spread > 1e-9 * max(np.trace(product), 1e-30)].T
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    largest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    coordinates = np.zeros((len(centred), count))
    coordinates[:, : len(directions)] = centred @ directions.T
    return coordinates


def pca_map(tokens: NDArray[Any], grid: tuple[int, int], *, cell: int = 14) -> Image.Image:
    """Dense features as colours, `(N, D), (rows, columns) -> image`: similar colours are similar tokens.

    Red, green and blue are the first three principal components of this image's tokens, each stretched between its
    2nd and 98th percentile. Each token is a square of `cell` pixels.
    """
    return _squares(component_colours(tokens, grid), cell)


def component_colours(tokens: NDArray[Any], grid: tuple[int, int]) -> NDArray[Any]:
    """The colours of `pca_map`, `(N, D), (rows, columns) -> (rows, columns, 3)` from 0 to 1."""
    _check_grid(tokens, grid)
    coordinates = principal_components(tokens, 3)
    low, high = np.percentile(coordinates, [2, 98], axis=0)
    flat = high - low < 1e-12
    levels = np.where(flat, 0.5, (coordinates - low) / np.where(flat, 1, high - low))
    colours: NDArray[Any] = levels.clip(0, 1).reshape(*grid, 3)
    return colours


def similarities(tokens: NDArray[Any], grid: tuple[int, int], patch: tuple[int, int]) -> NDArray[Any]:
    """Cosines of all tokens with one of them, `(N, D), (rows, columns), (row, column) -> (rows, columns)`."""
    _check_grid(tokens, grid)
    if not all(0 <= index < size for index, size in zip(patch, grid, strict=True)):
        raise ValueError(
            f"has no patch {patch[0]},{patch[1]}: the last of its {grid[0]} rows and {grid[1]} columns is "
            f"{grid[0] - 1},{grid[1] - 1}"
        )
    unit = np.asarray(tokens, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    cosines: NDArray[Any] = unit @ unit[patch[0] * grid[1] + patch[1]]
    return cosines.reshape(grid)


def similarity_map(
    tokens: NDArray[Any], grid: tuple[int, int], patch: tuple[int, int], *, cell: int = 14
) -> Image.Image:
    """How similar each patch is to one of them, `(N, D), (rows, columns), (row, column) -> image`.

    Dark is the least similar in this image, bright the most; the patch itself has a white frame.
    """
    cosines = similarities(tokens, grid, patch)
    low, high = cosines.min(), cosines.max()
    spread = high - low
    image = _squares(heat((cosines - low) / spread if spread > 1e-12 else np.ones(grid)), cell)
    return framed(image, grid, patch)


def heat(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers from 0 to 1 as colours from 0 to 1, dark to bright: `(...) -> (..., 3)`."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, stops, channel) for channel in zip(*HEAT, strict=True)], axis=-1) / 255


def framed(image: Image.Image, grid: tuple[int, int], patch: tuple[int, int]) -> Image.Image:
    """A copy of an image with a white frame around one patch of its grid."""
    image = image.copy()
    high, wide = image.height / grid[0], image.width / grid[1]
    top, left = patch[0] * high, patch[1] * wide
    box = (round(left), round(top), round(left + wide) - 1, round(top + high) - 1)
    draw = ImageDraw.Draw(image)
    line = max(1, round(min(high, wide) / 20))
    draw.rectangle(box, outline=PAPER, width=line)
    draw.rectangle((box[0] + line, box[1] + line, box[2] - line, box[3] - line), outline=INK, width=1)
    return image


def to_height(image: Image.Image, height: int) -> Image.Image:
    """An image at this height, with its aspect ratio; a tiny one keeps its squares."""
    width = max(1, round(image.width * height / image.height))
    return image.convert("RGB").resize((width, height), sampling(image, height))


def beside(images: Sequence[Image.Image], *, gap: int = 24) -> Image.Image:
    """Images in a row at their own size, aligned at the top."""
    widths, heights = zip(*(image.size for image in images), strict=True)
    canvas = Image.new("RGB", (sum(widths) + gap * (len(images) - 1), max(heights)), PAPER)
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + gap
    return canvas


def below(images: Sequence[Image.Image], *, gap: int = 24) -> Image.Image:
    """Images in a column at their own size, aligned at the left."""
    turned = [image.transpose(Image.Transpose.TRANSPOSE) for image in images]
    return beside(turned, gap=gap).transpose(Image.Transpose.TRANSPOSE)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    frames: Sequence[Sequence[Colour | None]] | None = None,
    side: int = 96,
    gap: int = 10,
) -> Image.Image:
    """Images in rows on white, each fitted into a square of `side` pixels.

    `captions` and `frames` follow the shape of `rows`: lines of text under each image, a coloured frame around it.
    """
    text = max(11, side // 8)
    lines = max(caption.count("\n") + 1 for row in captions for caption in row) if captions else 0
    step = (side + gap, side + gap + lines * (text + 6))
    columns = max(len(row) for row in rows)
    font = ImageFont.load_default(text)
    canvas = Image.new("RGB", (columns * step[0] + gap, len(rows) * step[1] + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            left, top = gap + c * step[0], gap + r * step[1]
            fitted = ImageOps.contain(image.convert("RGB"), (side, side), sampling(image, side))
            if frames and (colour := frames[r][c]):
                fitted = ImageOps.expand(fitted, 3, colour)
            canvas.paste(fitted, (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2))
            if captions:
                caption = captions[r][c] if lines > 1 else " ".join(captions[r][c].split())
                at = (left + side / 2, top + side + 5)
                draw.text(at, caption, INK, font, anchor="ma" if lines > 1 else "mt", align="center")
    return canvas


@lru_cache
def palette() -> NDArray[Any]:
    """The colours of PASCAL VOC's masks, which viewers of such masks know: the bits of the class, shuffled.

    `-> (256, 3) uint8`; 0 is black, 255 nearly white.
    """
    steps = np.arange(8)[:, None]  # three bits of the class at a time give one bit of each channel, the highest first
    bits = np.arange(256)[:, None, None] >> (3 * steps + np.arange(3)) & 1
    return (bits << (7 - steps)).sum(axis=1).astype(np.uint8)


def palette_image(labels: NDArray[Any]) -> Image.Image:
    """Class numbers as the values of a palette image: `(H, W) uint8 -> image of mode P`."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette().tobytes())
    return image


def class_colour(label: int) -> Colour:
    """The colour of a class in overlays: ten that are easy to tell apart, then the palette's."""
    if label < len(CLASSES):
        return ImageColor.getrgb(CLASSES[label])[:3]
    red, green, blue = palette()[label % 256].tolist()
    return red, green, blue


def with_mask(image: Image.Image, labels: NDArray[Any], classes: Sequence[str]) -> Image.Image:
    """An image under its coloured mask, with names at the middle of their areas: `image, (H, W) -> image`.

    A first class called background stays uncoloured, as do unlabelled pixels.
    """
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


def with_boxes(
    image: Image.Image,
    boxes: NDArray[Any],
    labels: NDArray[Any],
    classes: Sequence[str],
    *,
    scores: NDArray[Any] | None = None,
) -> Image.Image:
    """An image with frames around objects and their names, scores in percent: `image, (n, 4), (n,) -> image`."""
    laid = _sized(image)
    scale = laid.width / image.width
    draw = ImageDraw.Draw(laid)
    line = max(2, round(min(laid.size) / 200))
    for i in range(len(boxes) - 1, -1, -1):  # the most confident on top
        left, top, right, bottom = (float(n) * scale for n in boxes[i])
        colour = class_colour(int(labels[i]))
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        text = classes[labels[i]] if scores is None else f"{classes[labels[i]]} {100 * scores[i]:.0f}"
        _name(laid, (left, top), text, colour, "lb" if top > 24 else "lt")
    return laid


def confusion_image(counts: NDArray[Any], classes: Sequence[str]) -> Image.Image:
    """The matrix as an image: rows are labels, columns predictions, darker means more often."""
    shown = np.arange(len(classes))
    if len(classes) > MAX_CLASSES:
        mistaken = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
        shown = np.sort(np.argsort(-mistaken, kind="stable")[:MAX_CLASSES])
    counts = counts[np.ix_(shown, shown)]
    names = [
        name if len(name) <= 18 else f"{name[:17]}…" for name in (" ".join(classes[int(i)].split()) for i in shown)
    ]
    large, small = ImageFont.load_default(13), ImageFont.load_default(11)
    left = round(max(large.getlength(name) for name in names)) + 34
    side = CELL * len(names)
    canvas = Image.new("RGB", (left + side + 12, left + side + 28), PAPER)
    draw = ImageDraw.Draw(canvas)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for r, c in np.ndindex(counts.shape):
        x, y = left + c * CELL, left + r * CELL
        colour = (30, 110, 60) if r == c else (190, 40, 30)
        ink = tuple(round(255 + (part - 255) * float(shares[r, c]) ** 0.5) for part in colour)
        draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=ink, outline=(225, 225, 225))
        if counts[r, c]:
            text = INK if shares[r, c] < 0.4 else PAPER
            draw.text((x + CELL / 2, y + CELL / 2), f"{counts[r, c]}", text, small, anchor="mm")
    for i, name in enumerate(names):
        draw.text((left - 8, left + (i + 0.5) * CELL), name, INK, large, anchor="rm")
        strip = Image.new("RGB", (left - 8, CELL), PAPER)
        ImageDraw.Draw(strip).text((0, CELL / 2), name, INK, large, anchor="lm")
        canvas.paste(strip.rotate(90, expand=True), (left + i * CELL, 0))
    words = "rows: the label, columns: what was predicted"
    draw.text((left + side, left + side + 6), words, FAINT, small, anchor="rt")
    return canvas


def curves(
    lines: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    *,
    x: str,
    y: str,
    bounds: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """Lines by name, each through its points (n,), (n,), on axes called `x` and `y`; only the first ones if many.

    `bounds` are the left, lower, right and upper limits of the axes, by default those of the points.
    """
    lines = dict(list(lines.items())[:MAX_LINES])
    values = np.concatenate([np.asarray(points, np.float64) for points in lines.values()], axis=1)
    ends = np.array(bounds or (*values.min(axis=1), *values.max(axis=1)), np.float64)
    spans = np.where(ends[2:] > ends[:2], ends[2:] - ends[:2], 1)
    (width, height), (left, top), font = CHART, (80, 16), ImageFont.load_default(13)
    canvas = Image.new("RGB", (left + width + 200, top + height + 44), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, left + width, top + height), outline=(225, 225, 225))
    for i, (text, anchor) in enumerate(((x, "m"), (y, "r"))):
        for end, share in ((ends[i], 0.0), (ends[2 + i], 1.0), (None, 0.5)):
            at = (left + share * width, top + height + 8) if i == 0 else (left - 8, top + (1 - share) * height)
            draw.text(at, text if end is None else f"{end:.3g}", INK, font, anchor=anchor + "tm"[i])
    for number, (name, points) in enumerate(lines.items()):
        shares = (np.stack(points, axis=1) - ends[:2]) / spans
        places = np.array([left, top + height]) + shares * np.array([width, -height])
        draw.line([tuple(place) for place in places.tolist()], class_colour(number), 2)
        draw.text((left + width + 12, top + 18 * number), name[:24], class_colour(number), font)
    return canvas


def _check_grid(tokens: NDArray[Any], grid: tuple[int, int]) -> None:
    if tokens.ndim != 2 or len(tokens) != math.prod(grid):
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} has {math.prod(grid)} tokens (N, D), got an array {tuple(tokens.shape)}"
        )


def _squares(levels: NDArray[Any], cell: int) -> Image.Image:
    """`(rows, columns, 3)` from 0 to 1 -> an image whose squares are `cell` pixels wide."""
    image = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
    return image.resize((image.width * cell, image.height * cell), Image.Resampling.NEAREST)


def sampling(image: Image.Image, side: int) -> Any:
    """Images are smoothed, except that one enlarged a lot shows its pixels."""
    return Image.Resampling.NEAREST if 4 * max(image.size) <= side else Image.Resampling.LANCZOS


def _sized(image: Image.Image) -> Image.Image:
    """A copy in RGB whose longer side is between `SMALLEST` and `LARGEST`."""
    longer = max(image.size)
    scale = min(LARGEST / longer, 1) if longer > SMALLEST else SMALLEST / longer
    return image.convert("RGB").resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))


def _name(image: Image.Image, at: tuple[float, float], text: str, colour: Colour, anchor: str) -> None:
    draw, text = ImageDraw.Draw(image), " ".join(text.split())  # with such an anchor Pillow draws a single line only
    box = draw.textbbox(at, text, font=ImageFont.load_default(16), anchor=anchor)
    draw.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill=colour)
    draw.text(at, text, PAPER, ImageFont.load_default(16), anchor=anchor)
