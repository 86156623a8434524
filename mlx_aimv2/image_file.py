"""Reads the file of an image: a regular file of bounded size, without ever waiting for one that is something else."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import BinaryIO

MAX_FILE_BYTES = 1 << 30

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_image_file(path: str | os.PathLike[str]) -> tuple[os.stat_result, bytes]:
    """Content of a regular file, and how the file was before it was read, so that a change during it shows later.

    Raises OSError without a name in it: FileNotFoundError, IsADirectoryError and PermissionError as the system does,
    else a reason that continues a sentence which starts with the path.
    """
    try:
        # O_NONBLOCK: opening a named pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if (kind := _kind(path)) is not None:  # sockets cannot be opened at all
            raise OSError(f"is {kind}, not an image") from None
        raise error
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        _check(about)
        return about, _bounded(file, about.st_size)


def read_stream(stream: BinaryIO) -> bytes:
    """Everything in an open file, from its start where it can go there; its place is the end afterwards."""
    if hasattr(stream, "seek"):
        with suppress(OSError):  # a pipe that the caller opened is read from where it is
            stream.seek(0)
    return _bounded(stream)


def _kind(path: str | os.PathLike[str]) -> str | None:
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode))  # noqa: PTH116 - one call in a path of many files
    except (OSError, ValueError):
        return None


def _check(about: os.stat_result) -> None:
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError("is a folder")
    if not stat.S_ISREG(about.st_mode):
        raise OSError(f"is {KINDS.get(stat.S_IFMT(about.st_mode), 'something else')}, not an image")
    if about.st_size > MAX_FILE_BYTES:
        raise OSError(f"has {about.st_size:,} bytes, more than an image of {MAX_FILE_BYTES:,} bytes")


def _bounded(file: BinaryIO, size: int = MAX_FILE_BYTES) -> bytes:
    # Asked for all that is allowed, a file would reserve that much memory: slower by far than reading a small one.
    data = file.read(size + 1)
    if not isinstance(data, bytes):
        raise OSError(f"gives {type(data).__name__} instead of bytes: open it in mode 'rb'")
    if size < len(data) <= MAX_FILE_BYTES:
        data += file.read(MAX_FILE_BYTES + 1 - len(data))
    if len(data) > MAX_FILE_BYTES:  # it has grown, or its size was not reported
        raise OSError(f"has more than {MAX_FILE_BYTES:,} bytes, more than an image")
    return data
