"""What masks and boxes share: matching files to images, fitting images to the encoder's square, resizing maps.

The whole image is stretched to the square, as by the processor of `loading.at_size`: no patch is spent on padding. For
training it is scaled, slightly distorted, and its colours are changed.

Maps are made larger and smaller by matrix products, which MLX runs fast on every device. Doubling is a linear map and
a rearrangement: a transposed convolution of stride 2 says the same, but takes some 40 times as long on MLX's CPU
backend (64 channels, 32 x 32, forward; gradients 30 times). Plain 3 x 3 convolutions are faster there than the same by
matrix products, so they stay convolutions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mlx_aimv2 import plot
from mlx_aimv2.images import open_image, to_rgb
from mlx_aimv2.images.find import Scan, has_suffix
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import samples
from mlx_aimv2.learn.samples import Sample, Size, part_of, same_form
from mlx_aimv2.learn.task_options import Type
from mlx_aimv2.train.augment import GREY, jittered
from mlx_aimv2.train.batches import Arrays

IMAGES = ("images", "img_dir", "JPEGImages", "leftImg8bit", "image", "imgs")
"""Names of the folder of images; the first is this package's, the others mmsegmentation's, VOC's, Cityscapes'."""

ENDINGS = re.compile(r"(_gt(fine|coarse))?_(masks?|seg(mentation)?|labels?|gt|label(train)?ids)$|_leftImg8bit$", re.I)
"""Endings that the name of a mask, or of a Cityscapes image, has in addition."""

Pairs: TypeAlias = "list[tuple[str, str]]"
"""An image, and the file with its mask or boxes."""

ZOOM, STRETCH, COLOUR = (0.7, 1.4), 1.15, 0.3
"""Ranges for training images: scale, aspect ratio, brightness, contrast, colour."""

TUNED = {
    "lora": Type(None, (5e-4,), epochs=30, batch_size=8),
    "dora": Type(None, (5e-4,), epochs=30, batch_size=8),
    "full": Type(None, (5e-4,), epochs=30, batch_size=8, layer_decay=0.75, drop_path=0.1),
}
"""How the encoder is trained with a dense head."""


def folders_beside(
    data: Path, scan: Scan, names: Sequence[str], holds: Callable[[Path, bool], bool]
) -> dict[str, tuple[Path, Path]]:
    """Folders of images and of their files, by part; the part is empty if DATA has none.

    The second has one of `names`, or is the first: as `holds(folder, beside)` says it, of the files below a
    folder, or right in it. Parts are folders around both or within both.
    """

    def pair(folder: Path) -> tuple[Path, Path] | None:
        images = next((folder / name for name in IMAGES if (folder / name).is_dir()), folder)
        others = (folder / name for name in names if (folder / name).is_dir())
        other = next((other for other in others if holds(other, False)), images if holds(images, True) else None)
        return None if other is None else (images, other)

    around = samples.parts_of(data, scan, lambda folder: pair(folder) is not None)
    pairs = {part: found for part, folder in around.items() if (found := pair(folder)) is not None}
    if "" not in pairs:
        return pairs
    images, others = pairs[""]
    within = samples.parts_of(images, scan, lambda folder: (others / folder.relative_to(images)).is_dir())
    return {part: (folder, others / folder.relative_to(images)) for part, folder in within.items()}


def by_name(
    folders: tuple[Path, Path], files: Sequence[str], noun: str, scan: Scan, *, without: str = "left out"
) -> Pairs:
    """Images of the first folder with those of the `files` below the other that have their name.

    A file may have one of `ENDINGS` in addition. What has no counterpart is left out with a note, or what `without`
    says for images; an image with several is a fault, and so is no match at all.
    """
    images, others = folders
    alike: dict[str, list[str]] = defaultdict(list)
    for file in files:
        alike[ENDINGS.sub("", _stem(file, others))].append(file)
    pairs: Pairs = []
    before = len(scan.faults)
    for image in sorted(set(scan.images(images)).difference(files)):
        stem = _stem(image, images)
        longer = alike[ENDINGS.sub("", stem)]
        found = [file for file in longer if _stem(file, others) == stem] or longer
        if not found:
            scan.note(image, f"has no {noun} of its name in {others}: {without}")
        elif len(found) > 1:
            scan.faults.append(f"{' and '.join(found)} belong to the same image, {image}: keep one of them")
        else:
            pairs.append((image, found[0]))
    if files and not pairs and len(scan.faults) == before:
        own = min(set(scan.images(images)).difference(files), default="none")
        scan.faults.append(f"no {noun} in {others} has the name of an image in {images}: {files[0]} for one, {own}")
    alone = sorted(set(files).difference(file for _, file in pairs))
    scan.note(alone, f"has no image of its name in {images}: left out")
    return pairs


def _stem(file: str, folder: Path) -> str:
    return same_form(str(Path(file).relative_to(folder).with_suffix("")))


def by_lists(around: str, lists: Path, pairs: Pairs, images: Path, scan: Scan) -> dict[str, Pairs]:
    """Pairs by part: that of the folder `around` them, or those that VOC's ImageSets list in `train.txt`, `val.txt`."""
    files = {part: file for file in sorted(lists.glob("*.txt")) if (part := part_of(file.stem)) and file.stem.isalpha()}
    if around or not files:
        return {around: pairs}
    known = {_stem(pair[0], images): pair for pair in pairs}
    found: dict[str, Pairs] = {}
    for part, file in files.items():
        lines = [same_form(line) for line in scan.text(file).splitlines()]
        names = dict.fromkeys(str(Path(line).with_suffix("")) if has_suffix(line) else line for line in lines if line)
        found[part] = [known[name] for name in names if name in known]
        missing = [f"{name} in {file}" for name in names if name not in known]
        scan.note(missing, "has no image or nothing that belongs to it: left out")
    if pairs and not any(found.values()):
        scan.faults.append(f"no list of {lists} names an image as it is called, such as {next(iter(known))}")
    listed = {pair for part in found.values() for pair in part}
    scan.note(sorted(image for image, _ in set(pairs) - listed), f"is in no list of {lists}: left out")
    return {part: own for part, own in found.items() if own}


def size_fault(path: str, size: Size, stated: Size, source: str) -> str | None:
    """Why the annotations in `source` would not fit an image, None if they do; `size` is upright, both (height, width).

    Annotations of the stored pixels of an image that its EXIF tag rotates are refused: for mirrored and square images
    the size would not reveal it.
    """
    if stated == size:
        return None
    fault = f"{size[0]}x{size[1]} pixels upright (height x width), but {source} has {stated[0]}x{stated[1]}"
    if stated == size[::-1] and open_image(path).orientation >= 5:
        advice = f"remove the tag (exiftool -Orientation= {path}), or draw on the upright image"
        return f"{path} is turned by its EXIF tag, {fault}, as it is stored: {advice}"
    return f"{path} has {fault}: they must be equal"


@dataclass(frozen=True)
class Placement:
    """The position of an image on a `canvas` of (height, width) pixels: `x' = scale_x * x + left`, y likewise.

    `size` (height, width) is that of the image, `mirrored` whether left and right are swapped first.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    scale_x: float
    scale_y: float
    left: float = 0.0
    top: float = 0.0
    mirrored: bool = False

    def boxes(self, boxes: NDArray[Any]) -> NDArray[Any]:
        """Boxes of the image on the canvas, not cut at its edge: `(n, 4) -> (n, 4)` left, top, right, bottom."""
        boxes = np.array(boxes, np.float64).reshape(-1, 4)
        if self.mirrored:
            boxes[:, [0, 2]] = self.size[1] - boxes[:, [2, 0]]
        scale = np.array([self.scale_x, self.scale_y] * 2)
        return boxes * scale + np.array([self.left, self.top] * 2)

    def back(self, boxes: NDArray[Any]) -> NDArray[Any]:
        """Boxes of the canvas in the image, clipped to it, mirrored if it is: `(n, 4) -> (n, 4)`."""
        scale = np.array([self.scale_x, self.scale_y] * 2)
        boxes = (np.asarray(boxes, np.float64) - np.array([self.left, self.top] * 2)) / scale
        result: NDArray[Any] = np.clip(boxes, 0, np.array([self.size[1], self.size[0]] * 2, np.float64))
        return result

    def draw(self, image: Image.Image, *, fill: Any, resample: int) -> Image.Image:
        """The image or mask on its canvas."""
        if self.mirrored:
            image = ImageOps.mirror(image)
        height, width = self.canvas
        canvas = Image.new(image.mode, (width, height), fill)
        # The part of the image that is on the canvas, and its position there, in whole pixels of the canvas.
        whole = np.rint(self.boxes(np.array([0, 0, *image.size])))
        there = np.clip(whole, 0, np.array([width, height] * 2)).astype(int)
        left, top, right, bottom = there[0].tolist()
        if right > left and bottom > top:
            part = tuple(self.back(there)[0].tolist())
            canvas.paste(image.resize((right - left, bottom - top), resample, box=part), (left, top))
        return canvas


def plain(size: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """The whole image on the whole canvas; both sizes are (height, width)."""
    return Placement(size, canvas, canvas[1] / size[1], canvas[0] / size[0])


def example(
    targets: Callable[[Sample, Aimv2Processor, Placement], Arrays],
    sample: Sample,
    processor: Aimv2Processor,
    *,
    rng: np.random.Generator | None,
    flip: bool = False,
) -> Arrays:
    """`pixels` (H, W, 3) of a sample and its `targets` at its position, random if there is an `rng`."""
    image = to_rgb(sample.path)
    size, canvas = (image.height, image.width), processor.canvas
    place = plain(size, canvas) if rng is None else random(size, canvas, rng, flip=flip)
    if rng is not None:
        image = jittered(image, COLOUR, rng)
    drawn = place.draw(image, fill=GREY, resample=processor.preprocessing.resample)
    return {"pixels": processor.pixels(drawn), **targets(sample, processor, place)}


def random(
    size: tuple[int, int], canvas: tuple[int, int], rng: np.random.Generator, *, flip: bool = False
) -> Placement:
    """The image scaled, slightly distorted, at a random position: a part of it, or all with a margin."""
    fit = plain(size, canvas)
    zoom, stretch = (np.exp(rng.uniform(*np.log(ends))) for ends in (ZOOM, (1 / STRETCH, STRETCH)))
    scale_x, scale_y = fit.scale_x * zoom * stretch**0.5, fit.scale_y * zoom / stretch**0.5
    free = np.array([canvas[1] - scale_x * size[1], canvas[0] - scale_y * size[0]])
    left, top = np.minimum(free, 0) + rng.random(2) * np.abs(free)
    mirrored = bool(flip and rng.random() < 0.5)
    return Placement(size, canvas, float(scale_x), float(scale_y), float(left), float(top), mirrored)


def worst(
    samples: Sequence[Sample],
    predictions: Sequence[Any],
    quality: Callable[[Sample, Any], float],
    draw: Callable[[Image.Image, Sample, Any], Sequence[Image.Image]],
) -> Image.Image:
    """The six worst images side by side, with the pictures `draw` makes of each in a column."""
    pairs = sorted(zip(samples, predictions, strict=True), key=lambda pair: quality(*pair))[:6]
    columns = []
    for sample, prediction in pairs:
        drawn = draw(to_rgb(sample.path), sample, prediction)
        columns.append(plot.below([plot.to_height(image, 300) for image in drawn], gap=8))
    return plot.beside(columns, gap=8)


class Double(nn.Module):
    """Twice as many rows and columns: `(B, h, w, C) -> (B, 2h, 2w, E)`; each position becomes four by a linear map."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 4 * out)

    def __call__(self, x: mx.array) -> mx.array:
        batch, rows, columns, _ = x.shape
        x = self.proj(x).reshape(batch, rows, columns, 2, 2, -1)
        # Row of the four beside the row, column beside the column.
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows, 2 * columns, -1)


class Refine(nn.Module):
    """Norm, ReLU and a 3 x 3 convolution, added to the input: `(B, h, w, C) -> (B, h, w, C)`.

    ReLU, because GELU's tanh takes a quarter of the time of the whole layer on MLX's CPU backend.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.conv(nn.relu(self.norm(x)))


def halve(x: mx.array) -> mx.array:
    """The largest of each 2 x 2 positions: `(B, h, w, C) -> (B, ceil(h/2), ceil(w/2), C)`; an odd edge is repeated."""
    x = mx.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)], mode="edge")
    batch, rows, columns, channels = x.shape
    return x.reshape(batch, rows // 2, 2, columns // 2, 2, channels).max(axis=(2, 4))


def bilinear(x: mx.array, size: tuple[int, int]) -> mx.array:
    """A map at `size` (rows, columns) by linear interpolation: `(B, h, w, C) -> (B, rows, columns, C)`."""
    batch, rows, columns, channels = x.shape
    down, across = (mx.array(linear_weights(*sizes)).astype(x.dtype) for sizes in ((rows, size[0]), (columns, size[1])))
    x = (down @ x.reshape(batch, rows, columns * channels)).reshape(batch, size[0], columns, channels)
    return across @ x  # the rows of a batch of matrices (columns, C)


@lru_cache(maxsize=32)
def linear_weights(source: int, target: int) -> np.ndarray:
    """Weights of linear interpolation along one axis, `-> (target, source)` float32; pixel centres, edges repeated."""
    places = (np.arange(target) + 0.5) * source / target - 0.5
    columns = [np.interp(places, np.arange(source), one) for one in np.eye(source)]
    return np.stack(columns, axis=1).astype(np.float32)
