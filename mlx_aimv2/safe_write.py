"""Writes files and folders whole or not at all: beside their target, which takes the name when they are complete.

One rule for everything that is written. An input is never replaced, nor is anything but a regular file or a folder of
ours. What stands at the target and is not ours is refused unless `overwrite` says otherwise. A process that is killed
leaves a hidden temporary behind; the next one that writes to the same target removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mlx_aimv2.safe_read import expand_user

UNFINISHED = ".unfinished"
"""How the name of a hidden file or folder ends while it is being written."""

PREVIOUS = ".previous"
"""How the name of a folder ends that is being replaced, until its successor has the name."""

NAME_LENGTH = 50
"""Characters of the target's name in that of the temporary: file systems allow 255 bytes, and a suffix is added."""

TRIES = 100
"""Times that a temporary is made anew because another process took it for an abandoned one."""

TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
"""How the system says that a folder cannot take a name because something has it."""

BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""How the system says that another process holds a lock; other numbers mean a file system without locks."""


def check_target(
    path: Path,
    *,
    overwrite: bool = False,
    is_own: Callable[[Path], bool] = lambda folder: False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Raises OSError where a folder cannot be written: something stands there, or nothing can be written there.

    With `overwrite` a folder for which `is_own` says yes is replaced, unless it is or holds one of the `inputs`, or
    lies in one.
    """
    there = path.exists() or path.is_symlink()
    if there and not overwrite:
        raise FileExistsError(f"Cannot save to the path {path} as it already exists. Remove it or choose another.")
    if there:
        if path.is_symlink() or not path.is_dir() or not is_own(path):
            raise FileExistsError(f"Cannot save to the path {path}: only a folder written by convert is overwritten.")
        if near := next((str(one) for one in inputs if _overlap(path, Path(one))), None):
            raise FileExistsError(f"Cannot save to the path {path}: {near} is read, and lies in it or around it.")
    parent = path.absolute().parent
    existing = next(place for place in (parent, *parent.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"Cannot save to the path {path}: {existing} cannot be written to. Choose another place.")


def check_file(
    path: Path,
    *,
    option: str,
    is_own: Callable[[bytes], bool],
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    head: int = 4096,
) -> None:
    """Raises ValueError or OSError where a file cannot or must not be written; `option` is the flag to change.

    An input is never replaced, whatever name it is given by. A file is replaced if `is_own` says of its first `head`
    bytes that an earlier run wrote it, if it is empty, or with `overwrite`.
    """
    folder = Path(os.path.realpath(path)).parent  # the file that a link leads to is written, not the link
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {path}: {folder} does not exist; make that folder first")
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder: name a file")
    if path.exists():
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise FileExistsError(f"{option} {path} is a pipe or a device: name a file")
        for one in inputs:
            if _is_same_file(one, about):
                raise FileExistsError(
                    f"{option} {path} would replace {os.fspath(one)}, which never happens: choose another name"
                )
        if about.st_size and not overwrite:
            with path.open("rb") as file:
                known = is_own(file.read(head))
            if not known:
                raise FileExistsError(
                    f"{option} {path} is there already and mlx-aimv2 did not write it: choose another name, "
                    "or add --overwrite"
                )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: {folder} cannot be written to; choose another")


@contextlib.contextmanager
def atomic_folder(
    path: Path,
    *,
    overwrite: bool = False,
    is_own: Callable[[Path], bool] = lambda folder: False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """A folder to write into that takes the name `path` only if the block ends well, and vanishes otherwise."""
    inputs = list(inputs)
    check_target(path, overwrite=overwrite, is_own=is_own, inputs=inputs)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as beside:
        folder = beside / "folder"
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            _flush_to_disk(file)
        check_target(path, overwrite=overwrite, is_own=is_own, inputs=inputs)
        _take_name(folder, path, overwrite=overwrite)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside `path`, which takes its name when the block ends well and is deleted when it does not.

    Where `path` is a link, the file that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    with temporary_folder(path) as beside:
        with (beside / "file").open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (beside / "file").replace(path)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that no other process takes for an abandoned one, and that goes with the block.

    Errors of the system that name no other file end as one line with the target's name.
    """
    parent, start = path.absolute().parent, f".{path.name[:NAME_LENGTH]}."
    beside: Path | None = None
    lock: int | None = None
    try:
        remove_abandoned(path)
        for _ in range(TRIES):
            if beside is not None:
                _discard(beside)
            # Known before it is made: a signal may come at any moment.
            beside = parent / f"{start}{secrets.token_hex(8)}{UNFINISHED}"
            _mine.add(beside)
            beside.mkdir(0o700)
            # Until it is locked another process may take it for an abandoned one and remove it: then the lock is not
            # to be had, or is that of a folder without a name, and another one is made.
            with contextlib.suppress(BlockingIOError):
                lock = _lock(beside)
                if lock is None or _is_same_file(beside, os.fstat(lock)):
                    break
                os.close(lock)
                lock = None
        else:
            raise OSError(f"Cannot save to the path {path}: other processes keep removing what is written there.")
        yield beside
    except OSError as error:
        if error.strerror is None:
            raise
        inside = error.filename is None or beside is None or str(error.filename).startswith(str(beside))
        what = f"Cannot save to the path {path}" if inside else error.filename
        raise type(error)(f"{what}: {error.strerror}.") from None
    finally:
        if beside is not None:
            _discard(beside)
        if lock is not None:
            os.close(lock)


def take_free_name(file: Path, path: Path) -> None:
    """Gives a finished file a name that nothing has. Raises FileExistsError where another process was quicker."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        file.rename(path)


def remove_abandoned(path: Path) -> None:
    """Removes what killed processes left: the lock of a temporary ends with its process.

    A folder that a killed process had moved away, to replace it, gets its name back.
    """
    parent, name = path.absolute().parent, glob.escape(path.name[:NAME_LENGTH])
    for left in (*parent.glob(f".{name}.*{UNFINISHED}"), *parent.glob(f".{name}.*{PREVIOUS}")):
        try:
            lock = _lock(left)
        except (BlockingIOError, OSError):
            continue
        if lock is None:  # without locks nobody knows whether it is still being written
            continue
        if left.name.endswith(PREVIOUS) and not path.exists():
            with contextlib.suppress(OSError):
                left.rename(path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
        os.close(lock)


def discard_unfinished() -> None:
    """Removes what this process has not finished writing, before it ends without running to its end."""
    for folder in list(_mine):
        for _ in range(TRIES):  # another thread may still be writing into it
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break


def stems_below(given: Iterable[str | os.PathLike[str]], files: Sequence[str]) -> dict[str, Path]:
    """How what is written of each file begins: its path below the folder that was given, without suffix.

    Where several folders or files were given it is the path below the folder that all lie in. The suffix stays where
    another file has the rest of the name, in any case of letters.
    """
    folders = [os.path.normpath(expand_user(one).absolute()) for one in given if expand_user(one).is_dir()]
    others = [Path(file).parent for file in files if not any(Path(file).is_relative_to(one) for one in folders)]
    common = os.path.commonpath([*folders, *others]) if files else ""
    names = {file: Path(os.path.relpath(file, common)) for file in files}
    shared = Counter(str(name.with_suffix("")).casefold() for name in names.values())
    is_shared = {file: shared[str(name.with_suffix("")).casefold()] > 1 for file, name in names.items()}
    return {file: name if is_shared[file] else name.with_suffix("") for file, name in names.items()}


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as the ecosystem does: four spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


_mine: set[Path] = set()
"""The temporaries of this process."""


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _mine.discard(folder)


def _take_name(folder: Path, path: Path, *, overwrite: bool) -> None:
    """Gives a finished folder its name. Raises FileExistsError where another process was quicker."""
    previous: Path | None = None
    try:
        if overwrite and path.exists():
            parent, start = path.absolute().parent, f".{path.name[:NAME_LENGTH]}."
            previous = Path(tempfile.mkdtemp(prefix=start, suffix=PREVIOUS, dir=parent))
            path.rename(previous)  # onto an empty folder, which it replaces
        folder.rename(path)
    except BaseException as error:
        if previous is not None and not path.exists():
            previous.rename(path)
        if isinstance(error, OSError) and error.errno in TAKEN:
            raise FileExistsError(
                f"Cannot save to the path {path} as it already exists. Another process made it meanwhile."
            ) from None
        raise
    if previous is not None:
        shutil.rmtree(previous, ignore_errors=True)


def _lock(place: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder, which ends with the process.

    None on a file system without locks. Raises BlockingIOError if another process holds it or has removed the place.
    """
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BlockingIOError from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in BUSY:
            raise BlockingIOError from None
        return None
    return descriptor


def _is_same_file(place: str | os.PathLike[str], about: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(place), about)  # noqa: PTH116 - a Path each would cost more than the call
    except (OSError, ValueError):
        return False


def _overlap(one: Path, other: Path) -> bool:
    """Whether one of two folders lies in the other, or both are one."""
    first, second = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    return first == second or first in second.parents or second in first.parents


def _flush_to_disk(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
