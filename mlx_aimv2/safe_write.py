"""Writes files and folders whole or not at all: beside their target, which takes the name when they are complete.

A process that is killed leaves its hidden temporary behind; the next one that writes to the same target removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".unfinished"
"""How the name of a hidden file or folder ends while it is being written."""


def check_target(path: Path) -> None:
    """Raises FileExistsError if something stands at the target, OSError if nothing can be written there."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"Cannot save to the path {path} as it already exists. Remove it or choose another.")
    parent = path.absolute().parent
    existing = next(place for place in (parent, *parent.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"Cannot save to the path {path}: {existing} cannot be written to. Choose another place.")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `path` only if the block ends well, and vanishes otherwise."""
    check_target(path)
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, path.name)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=parent))
    lock = _locked(beside)
    try:
        yield beside
        beside.chmod(0o777 & ~_umask())  # mkdtemp's folders are private, a result is as public as its neighbours
        for file in beside.iterdir():
            _flush_to_disk(file)
        check_target(path)
        beside.rename(path)
    except OSError as error:
        if error.strerror is None:
            raise
        elsewhere = error.filename is not None and not str(error.filename).startswith(str(beside))
        what = error.filename if elsewhere else f"Cannot save to the path {path}"
        raise type(error)(f"{what}: {error.strerror}.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside `path`, which takes its name when the block ends well and is deleted when it does not."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(beside).chmod(0o666 & ~_umask())
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as the ecosystem does: four spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_abandoned(parent: Path, name: str) -> None:
    """Removes the hidden folders of processes that were killed: the lock of a folder ends with the process."""
    for folder in parent.glob(f".{glob.escape(name)}.*{UNFINISHED}"):
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, which ends with the process; None if another process holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
