"""The images of an index as the page sees them: by number, as thumbnails, found, placed in the plane."""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_aimv2.images import FAST, Policy, open_image
from mlx_aimv2.images.open import ImageInput, Levels
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.index.duplicates import Group, find_duplicates
from mlx_aimv2.index.page import thumbnail
from mlx_aimv2.index.reader import Date, Index
from mlx_aimv2.learn.classify.head import MIN_STD
from mlx_aimv2.plot import component_colours, principal_components
from mlx_aimv2.serve.plane import neighbour_plane

Array = NDArray[Any]

UNTRUSTED = Policy(decode="fast", max_pixels=50_000_000)
"""For images that a client sends."""

MAX_PATCHES = 1024
"""Of an image that is looked at: on more a patch is too small to be hit."""

LARGE = 3
"""Times the size in which the model sees an image, for the eyes of people."""

THUMBNAILS = 2048
"""Kept in memory, some 20 kB each."""

PLACED = 2000
"""Images whose neighbours are kept together in the plane; the others lie beside the nearest of them."""


class Gallery:
    """An index, whose images are known by their numbers in the order of their paths."""

    def __init__(self, index: Index) -> None:
        """Reads the vectors. Raises ValueError for an index that has none to be compared."""
        index.read_vectors()
        self.index = index
        self.paths = list(index.paths())
        self.numbers = {path: number for number, path in enumerate(self.paths)}
        self.thumbnail = lru_cache(THUMBNAILS)(self._thumbnail)
        self._starting = threading.Lock()

    @cached_property
    def vectors(self) -> Array:
        """Of all images at unit length, (P, D) float32."""
        return self.index.read_vectors().of(self.index.identities(self.paths))

    @cached_property
    def spread(self) -> tuple[Array, Array]:
        """The mean and the deviation of the vectors, (D,) each."""
        return self.vectors.mean(axis=0), np.maximum(self.vectors.std(axis=0), MIN_STD)

    @cached_property
    def folders(self) -> dict[str, int]:
        """Every folder with images right in it, and how many."""
        return dict(Counter(str(Path(path).parent) for path in self.paths))

    def described(self, number: int) -> dict[str, Any]:
        """What the page says of an image."""
        path = Path(self.paths[number])
        return {"id": number, "path": shown(path), "name": shown(path.name), "folder": shown(path.parent.name)}

    def path(self, number: int) -> str:
        """The path of an image. Raises LookupError for a number that no image has."""
        if not 0 <= number < len(self.paths):
            raise LookupError(f"there is no image {number}: the index has {len(self.paths):,}")
        return self.paths[number]

    def search(
        self,
        parts: Sequence[tuple[float, Array]],
        k: int,
        *,
        min_score: float | None = None,
        folder: str | None = None,
        after: Date | None = None,
        before: Date | None = None,
    ) -> list[dict[str, Any]]:
        """The nearest images, best first. Raises LookupError for a folder without images of the index."""
        under = None
        if folder is not None:
            under = next((one for one in self.folders if shown(one) == folder), None)
            if under is None:
                raise LookupError(f"the index has no images in the folder {folder[:200]}")
        found = self.index.search(list(parts), k, min_score=min_score, under=under, after=after, before=before)
        return [self.described(self.numbers[match.path]) | {"score": match.score} for match in found]

    def _thumbnail(self, number: int) -> bytes | None:
        return thumbnail(self.path(number))

    @cached_property
    def principal(self) -> Array:
        """The images in the plane of their first two principal components, (P, 2) from 0 to 1."""
        return _framed(principal_components(self.vectors, 2))

    def neighbours(self) -> Job:
        """The images in the plane so that neighbours lie together, (P, 2) from 0 to 1; the first call begins it."""
        with self._starting:
            return self._neighbours

    @cached_property
    def _neighbours(self) -> Job:
        return Job(self._placed)

    def _placed(self, on_progress: Callable[[int, int, str], None]) -> Array:
        count = len(self.paths)
        chosen = np.sort(np.random.default_rng(0).permutation(count)[:PLACED])
        plane = neighbour_plane(self.vectors[chosen], on_step=lambda step, steps: on_progress(step, steps, "steps"))
        places = np.empty((count, 2))
        for start in range(0, count, 4096):
            cosines = self.vectors[start : start + 4096] @ self.vectors[chosen].T
            places[start : start + 4096] = plane[cosines.argmax(axis=1)]
        places[chosen] = plane
        return _framed(places)

    def duplicates(self) -> Job:
        """The groups of images that are the same; the first call begins to look for them."""
        with self._starting:
            return self._duplicates

    @cached_property
    def _duplicates(self) -> Job:
        return Job(lambda on_progress: find_duplicates(self.index, on_progress=on_progress)[0])


class Job:
    """Work in a thread of its own: its `result`, None until it is there, how far it is, and what went wrong."""

    def __init__(self, work: Callable[[Callable[[int, int, str], None]], Any]) -> None:
        self.result: Any = None
        self.error = ""
        self.done, self.total = 0, 0
        threading.Thread(target=self._run, args=[work], daemon=True).start()

    def _run(self, work: Callable[[Callable[[int, int, str], None]], Any]) -> None:
        try:
            self.result = work(self._on_progress)
        except Exception as error:  # the page shows it
            self.error = str(error) or type(error).__name__

    def _on_progress(self, done: int, total: int, unit: str) -> None:
        self.done, self.total = done, total


@dataclass(frozen=True)
class View:
    """What the model sees of an image: `tokens` (N, D) at unit length, in rows and columns."""

    tokens: Array
    grid: tuple[int, int]

    def colours(self) -> Array:
        """The three principal components as colours, (rows, columns, 3) uint8."""
        return np.rint(component_colours(self.tokens, self.grid) * 255).astype(np.uint8)

    def similar(self, token: Array) -> Array:
        """How like a token (D,) each patch is, (rows, columns) cosines."""
        return (self.tokens @ token).reshape(self.grid)


def levels_of(processor: Aimv2Processor, image: ImageInput, *, policy: Policy = FAST) -> Levels:
    """An image as the model takes it, `-> (H, W, 3) uint8`."""
    return processor.levels(open_image(image, policy=policy), max_patches=MAX_PATCHES if processor.any_size else None)


def enlarged(processor: Aimv2Processor, path: str) -> bytes:
    """What the model sees of an image as a JPEG, with more pixels than it takes."""
    steps, patch = processor.preprocessing, processor.patch_size
    if not processor.is_native:
        larger = Aimv2Processor(replace(steps, resize=_times(steps.resize), crop=_times(steps.crop)), patch_size=patch)
        image = Image.fromarray(levels_of(larger, path))
        height, width = (length // LARGE // patch * patch * LARGE for length in (image.height, image.width))
    else:
        image = Image.fromarray(levels_of(processor, path))
        height, width = image.height // patch * patch, image.width // patch * patch
    stream = io.BytesIO()
    image.crop((0, 0, width, height)).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def _times(size: Any) -> Any:
    return tuple(LARGE * length for length in size) if isinstance(size, tuple) else size and LARGE * size


def _framed(places: Array) -> Array:
    """Places stretched to a square, (P, 2) -> (P, 2) from 0 to 1."""
    low, high = places.min(axis=0), places.max(axis=0)
    framed: Array = (places - low) / np.maximum(high - low, 1e-12)
    return framed


def shown(path: str | Path) -> str:
    """A path as text that every JSON holds: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def grouped(gallery: Gallery, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups of duplicates for the page, the image to keep first."""
    return [
        {
            "kind": group.kind,
            "images": [
                gallery.described(gallery.numbers[one.path]) | {"bytes": one.bytes, "pixels": [one.width, one.height]}
                for one in group.members
            ],
        }
        for group in groups
    ]
