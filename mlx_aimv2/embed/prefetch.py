"""How do image files become pixels ahead of the model, whatever is in them?

path -> bytes, SHA-256 -> RGB -> pixels (H, W, 3); nothing in a file raises: what is wrong with it is told in words.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mlx_aimv2.images import name_of, to_rgb

if TYPE_CHECKING:
    from mlx_aimv2.processor import Aimv2Processor

Array: TypeAlias = np.ndarray[Any, Any]

MIN_PATCHES = 112
MAX_PATCHES = 4096
"""Native checkpoints were trained on images of 112 to 4096 patches."""

MAX_FILE_BYTES = 1 << 30

Known: TypeAlias = Callable[[str, bytes], bool]
"""Whether the embedding of this file, by its path and the SHA-256 digest of its content, needs no pixels."""


@dataclass
class Decoded:
    """A file read and hashed, with its pixels (H, W, 3), with None where its content is known, or with a failure.

    `failure` and `note` continue a sentence that starts with the path.
    """

    path: str
    size: int = 0
    mtime_ns: int = 0
    sha256: bytes = b""
    pixels: Array | None = None
    failure: str | None = None
    note: str | None = None


class Decoder:
    """Turns files into pixels for one checkpoint; any thread may call it."""

    def __init__(
        self, processor: Aimv2Processor, *, max_patches: int | None = None, known: Known | None = None
    ) -> None:
        """`max_patches` is for native checkpoints, None for others; what is `known` gets no pixels."""
        self.processor = processor
        self.max_patches = max_patches
        self.known = known

    def __call__(self, path: str) -> Decoded:
        """One file, `path -> Decoded`."""
        try:
            about, data = _read(path)
        except OSError as error:
            return Decoded(path, failure=_reason(error))
        found = Decoded(path, about.st_size, about.st_mtime_ns, hashlib.sha256(data).digest())
        if self.known is None or not self.known(path, found.sha256):
            called = [path]
            try:
                self._decode(found, data, called)
            except Exception as error:  # decoders raise whatever they meet, and one file must not end the run
                found.failure = _without_names(str(error) or type(error).__name__, called)
        return found

    def ahead(self, paths: Sequence[str], pool: ThreadPoolExecutor, count: int) -> Iterator[Decoded]:
        """Files in their order, of which `count` are decoded ahead of the one that is asked for."""
        coming: deque[Future[Decoded]] = deque()
        for path in paths:
            coming.append(pool.submit(self, path))
            if len(coming) > count:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    def _decode(self, found: Decoded, data: bytes, called: list[str]) -> None:
        stream: Any = io.BytesIO(data)
        stream.name = called[0]  # what errors call it
        image = to_rgb(stream)
        called.append(name_of(image))
        if self.max_patches is None:
            found.pixels = self.processor.pixels(image)
            return
        pixels = self.processor.pixels(image, max_patches=self.max_patches)
        patch = self.processor.patch_size
        rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
        # Without the remainder, which the model drops, all images of one grid have one size.
        found.pixels = np.ascontiguousarray(pixels[: rows * patch, : columns * patch])
        if rows * columns < MIN_PATCHES:
            found.note = f"has {rows}x{columns} patches; the checkpoint was trained on {MIN_PATCHES} and more"


def _read(path: str) -> tuple[os.stat_result, bytes]:
    """Content of a regular file and how the file was before it was read, so that a change during it shows later."""
    # O_NONBLOCK: opening a named pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError("is not a file that holds an image")
        if about.st_size > MAX_FILE_BYTES:
            raise OSError(f"has {about.st_size} bytes, more than an image of {MAX_FILE_BYTES} bytes")
        return about, file.read()


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "was deleted before it could be read"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    if error.errno == errno.EISDIR:
        return "is a folder"
    return str(error) if error.errno is None else f"cannot be read: {error.strerror}"


def _without_names(reason: str, called: list[str]) -> str:
    reason = " ".join(reason.split())
    for name in called:
        reason = reason.removeprefix(f"{name} ")
    return reason
