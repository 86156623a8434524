"""Images with captions to batches: grids, crops, prefix lengths, ids; the same for the same seed, also when resumed.

Example number n, counted over all epochs, has a random generator of its own. So what it becomes depends on neither the
batch it falls into nor on the rank that prepares it, and a resumed run needs to know n alone.

Native encoders: the paper draws 2 ** n patches with n from a normal distribution cut to 7 … 12, and resizes images to
that area in their own shape. Here a batch has one shape, drawn with the number, and crops of that shape: so nothing is
distorted and nothing is filled up. Centre and deviation of n are not in the paper: here the middle, and 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.images import to_rgb
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.pretrain.captioned import Data, Example
from mlx_aimv2.pretrain.objective import Batch, draw_lengths
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.train.augment import ASPECT, Augmentation
from mlx_aimv2.train.batches import MakeAll

Grid: TypeAlias = tuple[int, int]
"""Rows and columns of patches."""

PATCHES = (1 << 7, 1 << 12)
"""The fewest and the most patches of an image."""


Pixels: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


def grid_of(vision: Aimv2VisionConfig, rng: np.random.Generator, *, patches: tuple[int, int] = PATCHES) -> Grid:
    """The grid of a batch: that of the fixed size, or one drawn between the fewest and the most patches."""
    if vision.image_size is not None:
        side = vision.image_size // vision.patch_size
        return side, side
    low, high = (math.log2(count) for count in patches)
    n = math.inf
    while not low <= n <= high:
        n = rng.normal((low + high) / 2, 1)
    aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    rows = max(1, round(math.sqrt(2**n / aspect)))
    return rows, max(2, int(2**n / rows))


def middle_grid(vision: Aimv2VisionConfig, *, patches: tuple[int, int] = PATCHES) -> Grid:
    """The grid for validation: that of the fixed size, or a square in the middle of what is drawn."""
    if vision.image_size is not None:
        side = vision.image_size // vision.patch_size
        return side, side
    side = max(2, round((patches[0] * patches[1]) ** 0.25))
    return side, side


@dataclass(frozen=True)
class Prepared:
    """One example, ready to be stacked: pixels (H, W, 3), its caption, its prefix length, its number and name."""

    pixels: Pixels
    caption: str
    length: int
    number: int
    name: str


class Preparation:
    """Examples to pixels and captions: with `augmentation` for training, without for validation."""

    def __init__(
        self,
        vision: Aimv2VisionConfig,
        *,
        seed: int,
        augmentation: Augmentation | None = None,
        first_caption: float = 0.0,
    ) -> None:
        self.vision = vision
        self.processor = Aimv2Processor(published(vision.image_size), patch_size=vision.patch_size)
        self.seed = seed
        self.augmentation = augmentation
        self.first_caption = first_caption

    def __call__(self, number: int, example: Example, grid: Grid) -> Prepared:
        """Raises ValueError or OSError for an image that cannot be read."""
        from PIL import Image, ImageOps

        rng = np.random.default_rng((self.seed, 1, number))
        rows, columns = grid
        length = int(draw_lengths(1, rows * columns, rng)[0])
        texts = example.texts
        if self.augmentation is None or rng.random() < self.first_caption:
            texts = texts[:1]
        caption = texts[int(rng.integers(len(texts)))]
        image = to_rgb(example.image)
        size = (rows * self.vision.patch_size, columns * self.vision.patch_size)
        if self.augmentation is not None:
            aspects = (size[1] / size[0],) * 2 if self.vision.is_native else ASPECT
            image = self.augmentation(image, size, rng, aspects=aspects)
        elif self.vision.is_native:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        return Prepared(self.processor.pixels(image), caption, length, number, example.name)


class Stream:
    """Examples without end, those of one rank: `rank`, `rank + ranks`, … from number `start` on."""

    def __init__(
        self,
        data: Data,
        grid: Callable[[int], Grid],
        *,
        size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """`size` is the examples of a batch on this rank, `grid` gives the grid of a batch by its number."""
        self.position = start
        self._grid, self._size, self._most = grid, size, 10 * size + 100
        self._numbered = self._own(data, seed, start, rank, ranks)

    def _own(self, data: Data, seed: int, start: int, rank: int, ranks: int) -> Iterator[tuple[int, Example]]:
        number = 0
        for epoch in count():
            before = number
            for example in data.epoch(np.random.default_rng((seed, 0, epoch))):
                if number >= start and number % ranks == rank:
                    yield number, example
                number += 1
            if number == before:
                raise ValueError("the data holds no image with a caption that can be read")

    def take(self, number: int, make_all: MakeAll) -> list[Prepared]:
        """The examples of batch `number`, in one grid.

        An image that cannot be read is passed over with a note; more than `most` of them in a row are an error.
        """
        found: list[Prepared] = []
        failed, grid = 0, self._grid(number)
        while len(found) < self._size:
            drawn = list(islice(self._numbered, self._size - len(found)))
            for (n, _), made in zip(drawn, make_all([(*one, grid) for one in drawn]), strict=True):
                self.position = n + 1
                if not isinstance(made, Exception):
                    found.append(made)
                    failed = 0
                    continue
                warnings.warn(f"{made}; passed over", stacklevel=2)
                failed += 1
                if failed > self._most:
                    raise ValueError(f"{failed} images in a row cannot be read, the last one: {made}")
        return found


def first_examples(data: Data, prepare: Preparation, grid: Grid, most: int) -> list[Prepared]:
    """The first examples in the order of the files, those that can be read: for validation and sample images."""
    found: list[Prepared] = []
    for number, example in enumerate(islice(data.epoch(None), most)):
        try:
            found.append(prepare(number, example, grid))
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; passed over", stacklevel=2)
    return found


def collate(examples: Sequence[Prepared], tokenizer: Tokenizer) -> Batch:
    """Prepared examples as one batch."""
    return Batch(
        pixels=mx.array(np.stack([one.pixels for one in examples])),
        ids=mx.array(tokenizer([one.caption for one in examples])),
        lengths=mx.array(np.array([one.length for one in examples], np.int32)),
    )
