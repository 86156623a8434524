"""Examples to batches: decoded, augmented, tokenized; the same for the same seed, also after an interruption.

Example number n, counted over all epochs, has a random generator of its own. So what it becomes depends on neither the
batch it falls into nor on the rank that prepares it, and a resumed run needs to know n alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.images import to_rgb
from mlx_aimv2.preprocessing import published
from mlx_aimv2.pretrain.augment import Augmentation
from mlx_aimv2.pretrain.captioned import Data, Example
from mlx_aimv2.pretrain.grids import Grid
from mlx_aimv2.pretrain.objective import Batch
from mlx_aimv2.pretrain.prefix import draw_lengths
from mlx_aimv2.processor import Aimv2Processor
from mlx_aimv2.tokenizer import Tokenizer

Pixels: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


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

        chance = np.random.default_rng((self.seed, 1, number))
        rows, columns = grid
        length = int(draw_lengths(1, rows * columns, chance)[0])
        texts = example.texts
        if self.augmentation is None or chance.random() < self.first_caption:
            texts = texts[:1]
        caption = texts[int(chance.integers(len(texts)))]
        image = to_rgb(example.image)
        size = (rows * self.vision.patch_size, columns * self.vision.patch_size)
        if self.augmentation is not None:
            image = self.augmentation(image, size, chance, keep_shape=self.vision.is_native)
        elif self.vision.is_native:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        return Prepared(self.processor.pixels(image), caption, length, number, example.name)


class Stream:
    """Prepared examples without end, those of one rank: `rank`, `rank + ranks`, … from number `start` on."""

    def __init__(
        self, data: Data, prepare: Preparation, *, seed: int, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.position = start
        self._prepare = prepare
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

    def take(self, wanted: int, grid: Grid, *, most: int | None = None) -> list[Prepared]:
        """The next examples, in one grid.

        An image that cannot be read is passed over with a note; more than `most` of them in a row are an error.
        """
        found: list[Prepared] = []
        failed, most = 0, 10 * wanted + 100 if most is None else most
        while len(found) < wanted:
            number, example = next(self._numbered)
            self.position = number + 1
            try:
                found.append(self._prepare(number, example, grid))
                failed = 0
            except (ValueError, OSError) as error:
                warnings.warn(f"{error}; passed over", stacklevel=2)
                failed += 1
                if failed > most:
                    raise ValueError(f"{failed} images in a row cannot be read, the last one: {error}") from None
        return found


class Ahead:
    """Prepares the next batch in a thread while the device computes; `(examples, position after them)` each time.

    `grids` gives each batch's grid.
    """

    def __init__(self, stream: Stream, size: int, grids: Iterator[Grid]) -> None:
        self._stream, self._size, self._grids = stream, size, grids
        self._pool = ThreadPoolExecutor(1)
        self._next = self._pool.submit(self._take)

    def _take(self) -> tuple[list[Prepared], int]:
        return self._stream.take(self._size, next(self._grids)), self._stream.position

    def __call__(self) -> tuple[list[Prepared], int]:
        result = self._next.result()
        self._next = self._pool.submit(self._take)
        return result

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


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
