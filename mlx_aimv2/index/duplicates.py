"""Finds images that occur more than once in an index: the same file, the same image, or similar ones.

    vectors -> pairs of neighbours -> small images (n, S, S, 3), laid over each other -> groups

The vectors only make proposals: a model may hardly notice that two clocks show different hours. Whether two files are
the same image, in another size, quality or crop, is decided by their pixels.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_aimv2.images import FAST, open_image
from mlx_aimv2.index.reader import Date, Index

Array: TypeAlias = NDArray[Any]

KINDS = {"file": "the same file", "image": "the same image", "similar": "similar images"}
"""Kind of a group -> what its images are."""

NEIGHBOURS = 16
"""Of each image, by the cosine of their vectors, are compared."""

MIN_COSINE = 0.7
"""Of neighbours: 0.3 % of the planted copies of 796 drawings had none that is nearer, by the smallest of our models."""

SIMILAR = 0.95
"""The cosine from which images are called similar."""

SIDE, FINE = 32, 64
"""Sides of the small images on which two are laid over each other, and compared if both have so many pixels."""

MAX_CROP = 0.08
"""Share of a side by which one image may be larger than the other or beside it."""

MAX_STRETCH = 1.1
"""Ratio of their aspect ratios: a crop of 3 % on two sides changes it by 6 %."""

MAX_COARSE = 45.0
"""Root mean square of the difference of 8 x 8 pixels, of 255: beyond it no crop of 3 % brings two images together."""

STEPS = 6
"""Of Gauss and Newton's method."""

BLOCK = 4
"""Pixels on a side of the blocks whose mean difference counts, so that noise does not."""

GREY_LEVELS = 15.0
"""By which equal images may differ in a block, beside what a shift of a pixel changes there."""

MAX_DIFFERENCE = 1.1
"""The largest of a block, in those: on planted copies it was less in 99 % of the cases, and among the drawings
themselves for those alone that are the same (docs/searching.md)."""

PAIRS = 256
"""Compared at a time."""

ROWS = 2048
"""Of vectors multiplied with all others at a time."""


Progress: TypeAlias = "Callable[[int, int, str], None]"
"""Called with how many images are read, how many there are to read, and what they are."""


@dataclass(frozen=True)
class Member:
    """An image of a group: its path, its file's size in bytes, its size in pixels."""

    path: str
    bytes: int
    height: int
    width: int


@dataclass(frozen=True)
class Group:
    """Images that are the same (`kind`, one of KINDS), the one to keep first: most pixels, then most bytes."""

    kind: str
    members: tuple[Member, ...]


def find_duplicates(
    index: Index,
    *,
    similar: float | None = None,
    under: str | os.PathLike[str] | None = None,
    after: Date | None = None,
    before: Date | None = None,
    on_progress: Progress = lambda done, total, unit: None,
) -> tuple[list[Group], list[str]]:
    """The groups by kind, and the paths of images that can no longer be read.

    Every pair of vectors is compared. `similar` is the cosine from which different images count as similar: such a
    group has one member, the one to keep, from each group of equal images; without it there are none. `under`,
    `after` and `before` choose images as in `Index.search`. Nothing is changed.
    """
    stamps = index.stamps()
    files: dict[bytes, list[str]] = defaultdict(list)
    for path in index.paths(under, after=after, before=before):
        files[stamps[path].sha256].append(path)
    contents = list(files.values())
    first = [paths[0] for paths in contents]
    pairs, cosines = _neighbours(index, first)
    near = pairs[cosines >= MIN_COSINE]
    repeated = [one for one, paths in enumerate(contents) if len(paths) > 1]
    small = _Small(first, np.union1d(near.ravel(), repeated).astype(int).tolist(), on_progress)
    same = _Joined(len(contents), small.worth)
    while len(near := near[np.not_equal(*same.firsts[near.T])]):  # what is joined by others need not be compared
        batch, near = near[:PAIRS], near[PAIRS:]
        for pair in batch[small.same(batch)].tolist():
            # Two different images may have small versions that look the same, so their largest ones decide.
            largest = same.firsts[pair].tolist()
            if largest[0] != largest[1] and (sorted(largest) == sorted(pair) or small.same(np.array([largest]))[0]):
                same.join(*pair)

    def member(content: int, path: str) -> Member:
        return Member(path, stamps[path].size, *small.sizes.get(content, (0, 0)))

    groups = []
    best: dict[int, Member] = {}
    for together in same.groups():
        members = sorted((member(one, path) for one in together for path in contents[one]), key=_worth)
        best[int(same.firsts[together[0]])] = members[0]
        if len(members) > 1:
            groups.append(Group("file" if len(together) == 1 else "image", tuple(members)))
    if similar is not None:
        alike = _Joined(len(contents), small.worth)
        for pair in same.firsts[pairs[cosines >= similar]].tolist():
            alike.join(*pair)
        for together in alike.groups():
            if len(together) > 1:
                groups.append(Group("similar", tuple(sorted((best[one] for one in together), key=_worth))))
    order = list(KINDS)
    groups.sort(key=lambda group: (order.index(group.kind), -len(group.members), os.fsencode(group.members[0].path)))
    return groups, small.unreadable


def _worth(member: Member) -> tuple[int, int, int, bytes]:
    """What sorts the image to keep to the front: pixels, bytes, then the shorter name."""
    return -member.height * member.width, -member.bytes, len(member.path), os.fsencode(member.path)


class _Joined:
    """Numbers from 0 in groups, each known by the one of the largest `worth`; at first each is one of its own."""

    def __init__(self, count: int, worth: Callable[[int], Any]) -> None:
        self.worth = worth
        self.firsts = np.arange(count)
        """By which number the group of each one is known."""
        self.members = [[one] for one in range(count)]

    def join(self, one: int, other: int) -> None:
        """Makes one group of two."""
        firsts = self.firsts[[one, other]].tolist()
        first, second = sorted(firsts, key=lambda each: (-self.worth(each), each))
        if first != second:
            self.firsts[self.members[second]] = first
            self.members[first] += self.members[second]

    def groups(self) -> list[list[int]]:
        """All groups, each ascending, in the order of their smallest numbers."""
        return sorted(sorted(self.members[first]) for first in set(self.firsts.tolist()))


def _neighbours(index: Index, paths: Sequence[str]) -> tuple[Array, Array]:
    """Each image and its nearest ones, every pair once, the nearest first: (P, 2) numbers of `paths`, (P,) cosines."""
    vectors = mx.array(index.read_vectors().of(index.identities(paths)))
    count = min(NEIGHBOURS, len(paths) - 1)
    if count < 1:
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    pairs, values = [], []
    for start in range(0, len(paths), ROWS):
        cosines = vectors[start : start + ROWS] @ vectors.T
        rows = mx.arange(len(cosines))
        cosines[rows, rows + start] = -2.0
        nearest = mx.argpartition(-cosines, count - 1, axis=1)[:, :count]
        pairs.append(np.array(mx.stack([mx.broadcast_to(rows[:, None] + start, nearest.shape), nearest], axis=-1)))
        values.append(np.array(mx.take_along_axis(cosines, nearest, axis=1)))
    low, high = np.sort(np.concatenate(pairs).reshape(-1, 2).astype(np.int64), axis=1).T
    once, first = np.unique(low * len(paths) + high, return_index=True)
    nearness = np.concatenate(values).ravel()[first]
    order = np.argsort(-nearness, kind="stable")
    return np.stack(np.divmod(once[order], len(paths)), axis=1), nearness[order]


class _Small:
    """Small versions of the images of these numbers in `paths`, and their sizes (height, width) in pixels."""

    def __init__(self, paths: Sequence[str], numbers: Sequence[int], on_progress: Progress) -> None:
        self.paths = paths
        self.sizes: dict[int, tuple[int, int]] = {}
        self.unreadable: list[str] = []
        self.rows: dict[int, int] = {}
        self.pixels = np.empty((len(numbers), SIDE, SIDE, 3), np.uint8)
        with ThreadPoolExecutor(os.cpu_count() or 1, "small") as pool:
            for done, (number, read) in enumerate(zip(numbers, pool.map(self._read, numbers), strict=True), 1):
                if read is None:
                    self.unreadable.append(paths[number])
                else:
                    self.rows[number] = len(self.rows)
                    self.pixels[self.rows[number]], self.sizes[number] = read
                on_progress(done, len(numbers), "images")

    def _read(self, number: int, side: int = SIDE) -> tuple[Array, tuple[int, int]] | None:
        try:
            opened = open_image(self.paths[number], policy=FAST)
            width, height = opened.size
            image, _ = opened.rgb((2 * side, 2 * side))
            return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)), (height, width)
        except Exception:  # as when embedding: a decoder may raise anything
            return None

    def worth(self, number: int) -> int:
        """How many pixels an image has."""
        height, width = self.sizes.get(number, (0, 0))
        return height * width

    def same(self, pairs: Array) -> Array:
        """Which pairs are one image, (P, 2) -> (P,)."""
        is_open = np.array([self._may_be_same(*pair) for pair in pairs.tolist()], bool)
        result = np.zeros(len(pairs), bool)
        for way in (pairs, pairs[:, ::-1]):  # a crop lies over a part of the whole image, not the other way round
            if len(rows := np.flatnonzero(is_open & ~result)):
                result[rows] = self._difference(way[rows]) <= MAX_DIFFERENCE
        return result

    def _may_be_same(self, one: int, other: int) -> bool:
        if one not in self.rows or other not in self.rows:
            return False
        ratios = [height / width for height, width in (self.sizes[one], self.sizes[other])]
        if max(ratios) > MAX_STRETCH * min(ratios):
            return False
        first, second = (self.pixels[self.rows[number]].astype(np.float32) for number in (one, other))
        # (S, S, 3) -> (8, 8, 3)
        coarse = (first - second).reshape(8, SIDE // 8, 8, SIDE // 8, 3).mean(axis=(1, 3))
        return bool(np.sqrt(np.mean(coarse**2)) <= MAX_COARSE)

    def _difference(self, pairs: Array) -> Array:
        """How much the worst block differs after the first image was laid over the second, (P, 2) -> (P,)."""
        rows = np.array([self.rows[one] for one in pairs.ravel().tolist()], np.int64).reshape(-1, 2)
        first, second = (self.pixels[rows[:, which]].astype(np.float32) for which in (0, 1))
        place = _placement(first.mean(axis=3), second.mean(axis=3))
        result = _worst_block(_moved(first, place), second)
        for row, pair in enumerate(pairs.tolist()):
            if result[row] <= 2 * MAX_DIFFERENCE and min(min(self.sizes[one]) for one in pair) >= FINE:
                large = [read[0] for one in pair if (read := self._read(one, FINE)) is not None]
                if len(large) == len(pair):
                    first, second = (pixels[None].astype(np.float32) for pixels in large)
                    finer = _placement(first.mean(axis=3), second.mean(axis=3), place[row : row + 1])
                    result[row] = _worst_block(_moved(first, finer), second)[0]
        return result


def _placement(first: Array, second: Array, start: Array | None = None) -> Array:
    """How the first grey images lie over the second ones, (n, S, S) twice -> (n, 4): scale and shift along x and y.

    Gauss and Newton's method from `start`, or from no change, in shares of a side; the best of its steps counts.
    """
    count, side, _ = first.shape
    place = np.zeros((count, 4), np.float32) if start is None else start
    best = place
    smallest = np.full(count, np.inf)
    at = _centres(side)
    for _ in range(STEPS + 1):
        moved = _moved(first[..., None], place)[..., 0]
        error = moved - second
        mean = (error**2).mean(axis=(1, 2))
        is_better = mean < smallest
        smallest, best = np.where(is_better, mean, smallest), np.where(is_better[:, None], place, best)
        down, along = (np.gradient(moved, axis=axis) * side for axis in (1, 2))
        slopes = np.stack([along * at, along, down * at[:, None], down], axis=-1).reshape(count, -1, 4)
        normal = slopes.transpose(0, 2, 1) @ slopes + 0.1 * side * side * np.eye(4, dtype=np.float32)
        step = np.linalg.solve(normal, slopes.transpose(0, 2, 1) @ error.reshape(count, -1, 1))[..., 0]
        place = (place - step).clip(-MAX_CROP, MAX_CROP).astype(np.float32)
    return best


def _centres(side: int) -> Array:
    """Centres of the pixels of a side from -0.5 to 0.5, (S,)."""
    return ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)


def _moved(images: Array, place: Array) -> Array:
    """Images with their pixels where `place` puts them, (n, S, S, C), (n, 4) -> (n, S, S, C), linearly interpolated."""
    count, side, *_ = images.shape

    def weights(scale: Array, shift: Array) -> Array:
        at = (_centres(side) * (1 + scale[:, None]) + shift[:, None] + 0.5) * side - 0.5
        return np.maximum(0, 1 - np.abs(at.clip(0, side - 1)[:, :, None] - np.arange(side))).astype(np.float32)

    along = weights(place[:, 0], place[:, 1])[:, None] @ images
    moved: Array = (weights(place[:, 2], place[:, 3]) @ along.reshape(count, side, -1)).reshape(images.shape)
    return moved


def _worst_block(first: Array, second: Array) -> Array:
    """The largest difference of a block, in levels that equal images may have, (n, S, S, 3) twice -> (n,)."""
    blocks = first.shape[1] // BLOCK
    slopes = [np.maximum(*(np.abs(np.gradient(x, axis=axis)) for axis in (1, 2))) for x in (first, second)]
    relative = np.abs(first - second) / (GREY_LEVELS + np.minimum(*slopes))
    worst: Array = relative.reshape(-1, blocks, BLOCK, blocks, BLOCK, 3).mean(axis=(2, 4, 5)).max(axis=(1, 2))
    return worst
