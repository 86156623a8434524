"""Reads files that strangers wrote, within bounds: regular files only, no more bytes than expected, one clear line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 1 << 26
"""64 MiB: the largest text file of a released checkpoint, a tokenizer.json, has 3 MB."""


def expand_user(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~name` replaced by the home folder; a name that no user has stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for ~nobody


def read_bytes(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`.

    Raises FileNotFoundError, ValueError for a folder, pipe, device or larger file, and OSError for one that cannot be
    read; each names the file.
    """
    content, size = _read(path, max_bytes + 1)
    if max(size, len(content)) > max_bytes:
        raise ValueError(f"{path} has {max(size, len(content)):,} bytes; at most {max_bytes:,} are read of such a file")
    return content


def _read(path: Path, count: int) -> tuple[bytes, int]:
    """The first bytes of a regular file, and how long it is said to be."""
    try:
        # O_NONBLOCK: opening a named pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except PermissionError:
        raise PermissionError(f"{path} may not be read: permission denied") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path}: wanted a file, got a folder, a pipe or a device")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(count), about.st_size
    finally:
        os.close(descriptor)


def read_text(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a UTF-8 file, with or without a byte order mark; errors as `read_bytes`, ValueError if no text."""
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_start(path: Path, *, max_bytes: int) -> bytes:
    """The first `max_bytes` of a regular file, however long it is; errors as `read_bytes`."""
    return _read(path, max_bytes)[0]


def check_link(path: Path) -> None:
    """Raises FileNotFoundError for a link that leads to nothing, as in a cache whose download broke off."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which is not there: fetch it again"  # noqa: PTH115
        )


def check_size(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> None:
    """Raises ValueError for a file that is larger than such files are."""
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read of such a file")


def read_json(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, ValueError or OSError that names the file."""
    check_link(path)
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no {path.name}; a checkpoint has one beside its weights")
    text = read_text(path, max_bytes=max_bytes)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted an object, got a {type(content).__name__}")
    return content
