"""Reads and decodes image files ahead of the model, whatever is in them.

path -> bytes, SHA-256 -> levels (H, W, 3) uint8; nothing in a file raises: what is wrong with it is reported.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mlx_aimv2.files import read_image_file
from mlx_aimv2.images import POLICY, Policy, open_image
from mlx_aimv2.images.pixels import Levels

if TYPE_CHECKING:
    from mlx_aimv2.processor import Aimv2Processor

MIN_PATCHES = 112
MAX_PATCHES = 4096
"""Native checkpoints were trained on images of 112 to 4096 patches."""

FILE_BYTES = 64 << 20
"""Content of files that wait to be decoded, all threads together; a single file may have more."""

DECODING_BYTES = 160 << 20
"""What is decoded at one time, all threads together; a single image may take more."""

Known: TypeAlias = Callable[[str, bytes], bool]
"""Whether the embedding of this file, by its path and the SHA-256 digest of its content, needs no pixels."""


@dataclass
class Decoded:
    """A file read and hashed, with its levels (H, W, 3), with None where its content is known, or with a failure.

    `failure` and `note` continue a sentence that starts with the path.
    """

    path: str
    size: int = 0
    mtime_ns: int = 0
    sha256: bytes = b""
    levels: Levels | None = None
    failure: str | None = None
    note: str | None = None


class Budget:
    """So many bytes, which threads take and give back; one that wants more than all of it waits until it is alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self.changed = threading.Condition()

    @contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        """Waits until so many bytes are free."""
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
        max_patches: int | None = None,
        known: Known | None = None,
        policy: Policy = POLICY,
    ) -> None:
        """`max_patches` is for native checkpoints, None for others; what is `known` gets no levels."""
        self.processor = processor
        self.max_patches = max_patches
        self.known = known
        self.policy = policy
        # A thread takes the bytes of its file first and those for decoding it second, and never the other way round.
        self.files, self.decoding = Budget(FILE_BYTES), Budget(DECODING_BYTES)

    def __call__(self, path: str) -> Decoded:
        """One file, `path -> Decoded`."""
        try:
            with self.files.take(_size_of(path)):
                about, data = read_image_file(path)
                found = Decoded(path, about.st_size, about.st_mtime_ns, hashlib.sha256(data).digest())
                if self.known is None or not self.known(path, found.sha256):
                    self._decode(found, data)
                return found
        except OSError as error:
            return Decoded(path, failure=_reason(error))

    def ahead(self, paths: Sequence[str], pool: ThreadPoolExecutor, count: int) -> Iterator[Decoded]:
        """Files in their order, of which `count` are decoded ahead of the one that is asked for."""
        coming: deque[Future[Decoded]] = deque()
        for path in paths:
            coming.append(pool.submit(self, path))
            if len(coming) > count:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    def _decode(self, found: Decoded, data: bytes) -> None:
        name = found.path
        try:
            opened = open_image(data, policy=self.policy, name=name)
            with self.decoding.take(self.processor.decoding_bytes(opened, max_patches=self.max_patches)):
                levels = self.processor.levels(opened, max_patches=self.max_patches)
        except Exception as error:  # decoders raise whatever they meet, and one file must not end the run
            found.failure = " ".join((str(error) or type(error).__name__).split()).removeprefix(f"{name} ")
            return
        notes = opened.notes
        if self.max_patches is not None:
            patch = self.processor.patch_size
            rows, columns = levels.shape[0] // patch, levels.shape[1] // patch
            # Without the remainder, which the model drops, all images of one grid have one size.
            levels = np.ascontiguousarray(levels[: rows * patch, : columns * patch])
            if rows * columns < MIN_PATCHES:
                notes.append(f"has {rows}x{columns} patches; the checkpoint was trained on {MIN_PATCHES} and more")
        found.levels = levels
        found.note = "; ".join(notes) or None


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - once for each of many files
    except (OSError, ValueError):
        return 0


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "was deleted before it could be read"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    return str(error) if error.errno is None else f"cannot be read: {error.strerror}"
