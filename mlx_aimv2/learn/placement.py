"""Lays an image of any shape on the square that the encoder takes, and brings boxes and masks along.

The whole image is stretched to the square, as the processor of `loading.at_size` does it: no patch is spent on
padding. For training it is drawn larger or smaller, a little out of shape, and its colours are changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.images import to_rgb
from mlx_aimv2.train.augment import GREY, jittered

if TYPE_CHECKING:
    from PIL import Image

    from mlx_aimv2.images.processor import Aimv2Processor

ZOOM = (0.7, 1.4)
"""How much larger or smaller than on the plain canvas a training image is drawn."""

STRETCH = 1.15
"""Width against height of a training image, to either side."""

COLOUR = 0.3
"""How far brightness, contrast and colour of a training image go, to either side of 1."""


@dataclass(frozen=True)
class Placement:
    """Where an image lies on its canvas of `canvas` (height, width) pixels: `x' = scale_x * x + left`, y likewise.

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
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        if self.mirrored:
            width = self.size[1]
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        scale = np.array([self.scale_x, self.scale_y] * 2)
        return boxes * scale + np.array([self.left, self.top] * 2)

    def back(self, boxes: NDArray[Any]) -> NDArray[Any]:
        """Boxes of the canvas in the image, cut at its edge: `(n, 4) -> (n, 4)`; for placements not mirrored."""
        scale = np.array([self.scale_x, self.scale_y] * 2)
        boxes = (np.asarray(boxes, np.float64) - np.array([self.left, self.top] * 2)) / scale
        result: NDArray[Any] = np.clip(boxes, 0, np.array([self.size[1], self.size[0]] * 2, np.float64))
        return result

    def draw(self, image: Image.Image, *, fill: Any, resample: int) -> Image.Image:
        """The image or mask on its canvas."""
        from PIL import Image, ImageOps

        if self.mirrored:
            image = ImageOps.mirror(image)
        height, width = self.canvas
        # The part of the image that lies on the canvas, and where it lies there, in whole pixels of the canvas.
        x = np.clip(np.rint([self.left, self.left + self.scale_x * self.size[1]]), 0, width).astype(int)
        y = np.clip(np.rint([self.top, self.top + self.scale_y * self.size[0]]), 0, height).astype(int)
        canvas = Image.new(image.mode, (width, height), fill)
        if x[1] > x[0] and y[1] > y[0]:
            part = np.array([x[0] - self.left, y[0] - self.top, x[1] - self.left, y[1] - self.top])
            part = part / np.array([self.scale_x, self.scale_y] * 2)
            part = np.clip(part, 0, np.array([*image.size] * 2, np.float64))
            shape = (int(x[1] - x[0]), int(y[1] - y[0]))
            canvas.paste(image.resize(shape, resample, box=tuple(part.tolist())), (int(x[0]), int(y[0])))
        return canvas


def plain(size: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """The whole image on the whole canvas; both sizes are (height, width)."""
    return Placement(size, canvas, canvas[1] / size[1], canvas[0] / size[0])


def placed(
    size: tuple[int, int], canvas: tuple[int, int], chance: np.random.Generator | None, *, flip: bool = False
) -> Placement:
    """`random` with `chance`, `plain` without."""
    return plain(size, canvas) if chance is None else random(size, canvas, chance, flip=flip)


def on_canvas(
    path: str, processor: Aimv2Processor, chance: np.random.Generator | None, *, flip: bool = False
) -> tuple[NDArray[Any], Placement]:
    """An image's pixels (H, W, 3) for training, and where on them it lies; with `chance` as `random` places it."""
    image = to_rgb(path)
    place = placed((image.height, image.width), canvas_size(processor), chance, flip=flip)
    if chance is not None:
        image = jittered(image, COLOUR, chance)
    return processor.pixels(place.draw(image, fill=GREY, resample=processor.preprocessing.resample)), place


def canvas_size(processor: Aimv2Processor) -> tuple[int, int]:
    """(height, width) of the images that a processor with one size makes."""
    size = processor.preprocessing.final_size
    if size is None:
        raise ValueError("images of one batch need one size: make the processor with loading.at_size")
    return size


def random(
    size: tuple[int, int], canvas: tuple[int, int], chance: np.random.Generator, *, flip: bool = False
) -> Placement:
    """The image larger or smaller, a little out of shape, anywhere: a part of it, or all with a margin."""
    fit = plain(size, canvas)
    zoom, stretch = (np.exp(chance.uniform(*np.log(ends))) for ends in (ZOOM, (1 / STRETCH, STRETCH)))
    scale_x, scale_y = fit.scale_x * zoom * stretch**0.5, fit.scale_y * zoom / stretch**0.5
    free = np.array([canvas[1] - scale_x * size[1], canvas[0] - scale_y * size[0]])
    left, top = np.minimum(free, 0) + chance.random(2) * np.abs(free)
    mirrored = bool(flip and chance.random() < 0.5)
    return Placement(size, canvas, float(scale_x), float(scale_y), float(left), float(top), mirrored)
