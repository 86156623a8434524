"""Reads and decodes images ahead of the model and gives it batches of one size: the one loop of the package.

    items -> threads: bytes, SHA-256, levels (H, W, 3) uint8 -> batches of some 4096 tokens -> outputs in order

Nothing in a file raises: errors are reported. A batch never crosses a chunk of items: which images share a batch
depends only on the chunks, not on where an earlier run was interrupted or on how many Macs share the work, so the
results are the same to the last bit.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast

import mlx.core as mx
import numpy as np

from mlx_aimv2.files import marks_of, read_image_file, reason_of, stat_of
from mlx_aimv2.images.open import POLICY, Levels, OpenImage, Policy, open_image

if TYPE_CHECKING:
    from mlx_aimv2.images.processor import Aimv2Processor

BATCH_TOKENS = 4608
"""Max tokens in a batch: 16, 8 or 4 images at 224, 336 or 448, whose rows fill the tiles of an M5's matrix units."""

CHUNK = 32
"""Consecutive names whose images may share a batch."""

IN_FLIGHT = 2
"""Unfinished batches on the device: it computes one while the next is being put together."""

MIN_PATCHES = 112
MAX_PATCHES = 4096
"""Native checkpoints were trained on images of 112 to 4,096 patches."""

FILE_BYTES = 64 << 20
"""Bytes of files waiting to be decoded, over all threads; a single file may exceed it."""

DECODING_BYTES = 160 << 20
"""Bytes being decoded at a time, over all threads; a single image may exceed it."""

Known: TypeAlias = Callable[[str, bytes], bool]
"""Whether the embedding of this file, by its path and the SHA-256 digest of its content, needs no pixels."""

Outputs: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""The model's outputs for one image, by name, in float32."""


class WithLevels(Protocol):
    """A thread's result for an item: levels (…, H, W, 3) uint8, or None; cleared when the model gets them."""

    levels: Levels | None


Item = TypeVar("Item")
Ready = TypeVar("Ready")
Image = TypeVar("Image", bound=WithLevels)


def split_into_chunks(items: Sequence[Item], size: int = CHUNK) -> list[Sequence[Item]]:
    """Cuts a list into chunks of `size`, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def images_at_once(tokens: int) -> int:
    """How many images with this many tokens make a batch: a power of two, at least one."""
    return 1 << max(1, BATCH_TOKENS // max(1, tokens)).bit_length() - 1


@contextmanager
def ahead(
    items: Iterable[Item], prepare: Callable[[Item], Ready], *, count: int, threads: int | None = None
) -> Iterator[Iterator[Ready]]:
    """`prepare(item)` for each item in order, done by threads up to `count` items ahead of the one requested.

    `threads` is one per core by default. Items are taken one after another by the caller's own thread.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, "decode")

    def in_order() -> Iterator[Ready]:
        coming: deque[Future[Ready]] = deque()
        for item in items:
            coming.append(pool.submit(prepare, item))
            if len(coming) > count:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    wait = True
    try:
        yield in_order()
    except KeyboardInterrupt:
        wait = False  # stopping the run does not wait for a slow decoder
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


def run_ahead(
    chunks: Iterable[Sequence[Item]],
    prepare: Callable[[Item], Image],
    compute: Callable[[mx.array], dict[str, mx.array]],
    *,
    patch: int,
    tokens: int | None = None,
    threads: int | None = None,
) -> Iterator[list[tuple[Image, Outputs | None]]]:
    """The results of `prepare` and the model for each chunk's items, in order: `items -> (image, outputs or None) …`.

    `compute` takes levels (B, …, H, W, 3) uint8 of one size, at most `BATCH_TOKENS` tokens of `patch` pixels a side at
    a time, and returns `{name: (B, …)}`; without levels from `prepare` the outputs are None. `tokens` is the number per
    item, if it is the same for all.
    """
    threads = threads or os.cpu_count() or 1
    # Enough to feed the threads and the next two batches; a native image may take ten megabytes.
    count = 2 * threads + min(CHUNK, 2 * images_at_once(tokens or BATCH_TOKENS // 8))
    ends = chain.from_iterable((*chunk, None) for chunk in chunks)  # None after the last item of each chunk
    before: tuple[list[Image], list[_Batch]] | None = None
    shapes: set[tuple[int, ...]] = set()
    with ahead(ends, lambda item: None if item is None else prepare(item), count=count, threads=threads) as coming:
        for first in coming:
            rest = iter(coming.__next__, None)
            chunk = cast("Iterable[Image]", () if first is None else chain([first], rest))
            now = _submitted(chunk, compute, patch)
            if before is not None:  # read while the device has more to do
                yield _read(*before)
            before = now
            sizes = {batch.shape for batch in now[1]}
            if shapes and sizes != shapes:
                mx.clear_cache()  # buffers of shapes that may not come again
            shapes = sizes
        if before is not None:
            yield _read(*before)


@dataclass
class _Batch:
    """Outputs of a batch, the index of each of its images in the chunk, and the shape of one of them."""

    outputs: dict[str, mx.array]
    indices: list[int]
    shape: tuple[int, ...]


def _submitted(
    chunk: Iterable[Image], compute: Callable[[mx.array], dict[str, mx.array]], patch: int
) -> tuple[list[Image], list[_Batch]]:
    """Sends a chunk's images to the device, grouped by size, each batch as soon as it is full."""
    images: list[Image] = []
    batches: list[_Batch] = []
    groups: dict[tuple[int, ...], list[int]] = {}

    def submit(shape: tuple[int, ...]) -> None:
        indices = groups.pop(shape)
        # One byte per level goes to the device, a quarter of the size of the pixels made from it there.
        levels = mx.array(np.stack([cast("Levels", images[index].levels) for index in indices]))
        for index in indices:
            images[index].levels = None  # freed before the model runs
        outputs = compute(levels)
        if len(batches) >= IN_FLIGHT:
            mx.eval(batches[-IN_FLIGHT].outputs)
        mx.async_eval(outputs)  # type: ignore[no-untyped-call]
        batches.append(_Batch(outputs, indices, shape))

    for index, image in enumerate(chunk):
        images.append(image)
        if image.levels is None:
            continue
        shape = image.levels.shape
        groups.setdefault(shape, []).append(index)
        *several, height, width, _ = shape
        tokens = math.prod(several) * (height // patch) * (width // patch)
        if len(groups[shape]) == images_at_once(tokens):
            submit(shape)
    for shape in list(groups):
        submit(shape)
    return images, batches


def _read(images: list[Image], batches: list[_Batch]) -> list[tuple[Image, Outputs | None]]:
    """Reads a chunk's outputs from the device."""
    outputs: dict[int, Outputs] = {}
    while batches:
        batch = batches.pop(0)
        arrays = {name: np.array(array.astype(mx.float32)) for name, array in batch.outputs.items()}
        for row, index in enumerate(batch.indices):
            outputs[index] = {name: array[row] for name, array in arrays.items()}
    return [(image, outputs.get(index)) for index, image in enumerate(images)]


@dataclass
class Decoded:
    """A file read and hashed, with its levels (H, W, 3), with None if its content is known, or with a failure.

    `failure` and `note` continue a sentence that starts with the path; `marks` are `files.marks_of`, `upright` is the
    image's own (height, width), `taken` the day from its EXIF, 2024-05-17 or "".
    """

    path: str
    marks: tuple[int, int, int, int] = (0, 0, 0, 0)
    sha256: bytes = b""
    levels: Levels | None = None
    upright: tuple[int, int] = (0, 0)
    failure: str | None = None
    note: str | None = None
    taken: str = ""


class Budget:
    """A budget of bytes that threads take and return; one that wants more than all of it waits until it is alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self.changed = threading.Condition()

    @contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        """Waits until this many bytes are free."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + wanted <= self.size)
            self.taken += wanted
        try:
            yield
        finally:
            with self.changed:
                self.taken -= wanted
                self.changed.notify_all()


class Decoder:
    """Turns files into levels for one checkpoint; any thread may call it."""

    def __init__(
        self,
        processor: Aimv2Processor,
        *,
        max_patches: int = MAX_PATCHES,
        known: Known | None = None,
        policy: Policy = POLICY,
    ) -> None:
        """`max_patches` applies if images may have any size; what is `known` gets no levels."""
        if max_patches < 1:
            raise ValueError(f"max_patches (--max-patches) must be at least 1, got {max_patches}")
        self.processor = processor
        self.max_patches = max_patches if processor.any_size else None
        self.known = known
        self.policy = policy
        # A thread takes the bytes for its file first and those for decoding second, never the other way round.
        self.files, self.decoding = Budget(FILE_BYTES), Budget(DECODING_BYTES)

    def __call__(self, path: str) -> Decoded:
        """One file, `path -> Decoded`."""
        before = stat_of(path)
        try:
            with self.files.take(before.st_size if before is not None else 0):
                about, data = read_image_file(path)
                found = self.content(path, data)
                found.marks = marks_of(about)
                return found
        except FileNotFoundError:
            return Decoded(path, failure="was deleted before it could be read")
        except OSError as error:
            return Decoded(path, failure=reason_of(error))

    def content(self, name: str, data: bytes) -> Decoded:
        """The content of a file, `name, bytes -> Decoded`."""
        found = Decoded(name, sha256=hashlib.sha256(data).digest())
        is_known = self.known is not None and self.known(name, found.sha256)
        try:
            opened = open_image(data, policy=self.policy, name=name)
            found.taken = opened.taken
            if not is_known:
                self._decode(found, opened)
        except Exception as error:  # decoders raise whatever they meet, and one file must not end the run
            if not is_known:
                found.failure = " ".join((str(error) or type(error).__name__).split()).removeprefix(f"{name} ")
        return found

    def levels(self, opened: OpenImage, sha256: bytes) -> Levels:
        """The model's view of an image, (…, H, W, 3); `sha256` is that of its file."""
        return self.processor.levels(opened, max_patches=self.max_patches)

    def _decode(self, found: Decoded, opened: OpenImage) -> None:
        with self.decoding.take(self.processor.decoding_bytes(opened, max_patches=self.max_patches)):
            levels = self.levels(opened, found.sha256)
        notes = opened.notes
        if self.max_patches is not None:
            patch = self.processor.patch_size
            rows, columns = levels.shape[0] // patch, levels.shape[1] // patch
            # Without the remainder, which the model drops, all images with one grid have one size.
            levels = np.ascontiguousarray(levels[: rows * patch, : columns * patch])
            if rows * columns < MIN_PATCHES:
                notes.append(f"has {rows}x{columns} patches; the checkpoint was trained on {MIN_PATCHES} and more")
        found.levels = levels
        found.upright = (opened.size[1], opened.size[0])
        found.note = "; ".join(notes) or None
