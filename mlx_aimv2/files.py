"""Reads untrusted files within bounds, and writes files and folders completely or not at all.

Only regular files of at most the expected size are read, and pipes or devices are never waited for. An input is never
replaced, nor is anything but a regular file or a folder of ours; anything else at the target is refused unless
`overwrite` is set. A killed process leaves a hidden temporary file behind; the next one that writes to the same target
removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mlx_aimv2.untrusted_json import parse

MAX_TEXT_BYTES = 1 << 26
"""64 MiB: the largest text file in a released checkpoint, a tokenizer.json, has 3 MB."""

MAX_JSON_BYTES = 1 << 24
"""16 MiB: for a JSON file read in one piece, which may take thirty times the memory."""

MAX_IMAGE_BYTES = 1 << 30

BLOCK = 1 << 20
"""Bytes read at a time when the total is unknown."""

HEAD_BYTES = 4096
"""The part of an existing file that is searched for the mark of the run that wrote it."""

CACHE_VARIABLE = "MLX_AIMV2_CACHE"
"""The environment variable for another cache folder, which also holds locks."""

UNFINISHED = ".unfinished"
"""Suffix of a hidden file or folder while it is being written."""

PREVIOUS = "previous"
"""Where a replaced folder waits, inside the hidden one, until its successor has the name."""

PATIENCE = 10.0
"""Seconds to wait for another process that writes to the same target."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers for a full disk, an exhausted quota and a file at its size limit."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(about: os.stat_result) -> str:
    """The word for something that is not a regular file; some systems have more kinds than `KINDS`."""
    return KINDS.get(stat.S_IFMT(about.st_mode), "something else")


def expand_user(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~name` replaced by the home folder; the name of an unknown user is left unchanged."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for ~nobody


def cache_folder() -> Path:
    """`$MLX_AIMV2_CACHE`, else `mlx-aimv2` in `$XDG_CACHE_HOME` or `~/.cache`; the temporary folder without a home."""
    own = os.environ.get(CACHE_VARIABLE)
    folder = expand_user(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mlx-aimv2")
    homeless = folder.parts[:1] and folder.parts[0].startswith("~")  # a container's user may have none
    return Path(tempfile.gettempdir()) / f"mlx-aimv2-{os.getuid()}" if homeless else folder


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file with a name from an untrusted list exists; a name with a NUL or over 255 bytes cannot."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for them


def stat_of(path: str) -> os.stat_result | None:
    """The system's record of a file, cheap enough for many; None if there is none."""
    try:
        return os.stat(path)  # noqa: PTH116 - a Path would cost more than the call itself
    except (OSError, ValueError):
        return None


def marks_of(about: os.stat_result) -> tuple[int, int, int, int]:
    """What reveals a changed file: size in bytes, mtime and ctime in nanoseconds, inode (63 bits, for SQLite)."""
    largest = (1 << 63) - 1  # nanoseconds from 2262 on are more
    return about.st_size, min(about.st_mtime_ns, largest), min(about.st_ctime_ns, largest), about.st_ino & largest


def is_unchanged(about: os.stat_result, size: int, mtime_ns: int, ctime_ns: int | None, inode: int | None) -> bool:
    """Whether a file is unchanged by these marks, of which earlier releases kept the first two.

    The inode counts unless ctime is a copy of mtime: file systems without a ctime (exFAT, FUSE) renumber their files
    at every mount.
    """
    now = marks_of(about)
    if ctime_ns is None or now[:2] != (size, mtime_ns):
        return now[:2] == (size, mtime_ns)
    return now[2] == ctime_ns and (now[3] == inode or ctime_ns == mtime_ns)


# Reading


def read_bytes(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`.

    Raises FileNotFoundError, ValueError for a folder, pipe, device or larger file, and OSError for one that cannot be
    read; each names the file.
    """
    content = read_start(path, max_bytes=max_bytes + 1)
    if len(content) > max_bytes:
        check_size(path, max_bytes=max_bytes)
    return content


def read_start(path: Path, *, max_bytes: int) -> bytes:
    """The first `max_bytes` of a regular file, however long it is; errors as `read_bytes`."""
    try:
        with _regular_file(path) as (file, _):
            return file.read(max_bytes)
    except OSError as error:
        raise (ValueError if error.errno is None else type(error))(f"{path} {reason_of(error)}") from None


def reason_of(error: OSError) -> str:
    """Why something cannot be read, as the rest of a sentence that starts with its name."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    return str(error) if error.errno is None else f"cannot be read: {error.strerror}"


def one_line(error: OSError, what: object) -> str:
    """The system's error about `what`, with advice if the disk is full."""
    advice = " Make room, or choose another one." if error.errno in FULL else ""
    return str(error) if error.strerror is None else f"{what}: {error.strerror}.{advice}"


@contextlib.contextmanager
def _regular_file(path: str | os.PathLike[str], wanted: str = "a file") -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file, open, and its state at that time; for others an OSError like "is a device, not a file"."""
    try:
        # Otherwise a named pipe would wait for a writer.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except IsADirectoryError:
        raise IsADirectoryError(f"is a folder, not {wanted}") from None
    with file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(f"is {kind_of(about)}, not {wanted}")
        yield file, about


def read_text(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a UTF-8 file, with or without a byte order mark; errors as `read_bytes`, ValueError if no text."""
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def check_link(path: Path) -> None:
    """Raises FileNotFoundError for a dangling link, as in a cache whose download was interrupted."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which is not there: fetch it again")


def check_size(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> None:
    """Raises ValueError for a file above the limit."""
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; the limit for such a file is {max_bytes:,}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, ValueError or OSError that names the file."""
    check_link(path)
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no {path.name}; a checkpoint has one beside its weights")
    content = parse(read_text(path, max_bytes=MAX_JSON_BYTES), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted an object, got a {type(content).__name__}")
    return content


def read_image_file(path: str | os.PathLike[str]) -> tuple[os.stat_result, bytes]:
    """Content of a regular file, and its state before reading, so a change meanwhile can be noticed later.

    Raises OSError without a file name, the system's or with a reason that continues a sentence.
    """
    with _regular_file(path, "an image") as (file, about):
        if about.st_size > MAX_IMAGE_BYTES:
            raise OSError(f"has {about.st_size:,} bytes, more than an image of {MAX_IMAGE_BYTES:,} bytes")
        return about, file.read(about.st_size)


def read_stream(stream: BinaryIO) -> bytes:
    """Everything in an open file, from its start if it can seek; its position is at the end afterwards."""
    if hasattr(stream, "seek"):
        with contextlib.suppress(OSError):  # a pipe opened by the caller is read from its current position
            stream.seek(0)
    data = bytearray()
    while block := stream.read(BLOCK):
        if not isinstance(block, bytes):
            raise OSError(f"returns {type(block).__name__} instead of bytes: open it in mode 'rb'")
        data += block
        if len(data) > MAX_IMAGE_BYTES:
            raise OSError(f"has more than {MAX_IMAGE_BYTES:,} bytes, more than an image")
    return bytes(data)


# Writing


def check_target(
    path: Path,
    *,
    overwrite: bool = False,
    is_own: Callable[[Path], bool] = lambda folder: False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Raises OSError if a folder cannot be written: the path exists, or writing there is not allowed.

    With `overwrite` a folder that `is_own` accepts is replaced, unless it is, contains or is inside one of the
    `inputs`.
    """
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise FileExistsError(f"Cannot save to the path {path} as it already exists. Remove it or choose another.")
        if path.is_symlink() or not path.is_dir() or not is_own(path):
            raise FileExistsError(f"Cannot save to the path {path}: only a folder written by convert is overwritten.")
        target = Path(os.path.realpath(path))
        for one in inputs:
            read = Path(os.path.realpath(one))
            if target.is_relative_to(read) or read.is_relative_to(target):
                raise FileExistsError(f"Cannot save to the path {path}: {one} is an input, inside or around it.")
    existing = next(place for place in path.absolute().parents if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"Cannot save to the path {path}: {existing} is not writable. Choose another place.")


def check_file(
    path: Path,
    *,
    option: str,
    is_own: Callable[[bytes], bool],
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Raises ValueError or OSError if a file cannot or must not be written; `option` is the flag to change.

    An input is never replaced; another file is if `is_own` recognises its first `HEAD_BYTES` bytes as an earlier
    run's, if it is empty, or with `overwrite`.
    """
    folder = Path(os.path.realpath(path)).parent  # the file that a link leads to is written, not the link
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {path}: {folder} does not exist; create it first")
    if path.exists():
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise FileExistsError(f"{option} {path} is {kind_of(about)}: name a file")
        for one in inputs:
            if (other := stat_of(os.fspath(one))) is not None and os.path.samestat(other, about):
                raise FileExistsError(f"{option} {path} would replace the input {one}: choose another name")
        if about.st_size and not overwrite and not is_own(read_start(path, max_bytes=HEAD_BYTES)):
            raise FileExistsError(
                f"{option} {path} exists and was not written by mlx-aimv2: choose another name, or add --overwrite"
            )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: {folder} is not writable; choose another")


@contextlib.contextmanager
def atomic_folder(
    path: Path,
    *,
    overwrite: bool = False,
    is_own: Callable[[Path], bool] = lambda folder: False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """A folder to write into that gets the name `path` only if the block succeeds, and is removed otherwise."""
    check_target(path, overwrite=overwrite, is_own=is_own, inputs=inputs)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as beside:
        folder = beside / "folder"
        folder.mkdir()
        yield folder
        for file in (path for path in folder.rglob("*") if path.is_file()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        check_target(path, overwrite=overwrite, is_own=is_own, inputs=inputs)  # another process may have created it
        if overwrite and path.exists():
            path.rename(beside / PREVIOUS)  # restored from there if its successor does not get its name
        folder.rename(path)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write next to `path`, which gets its name if the block succeeds and is deleted otherwise.

    If `path` is a link, the file it points to is replaced.
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
    """A hidden folder next to `path`, removed when the block ends; one process at a time has it, others wait a moment.

    What a killed process left there is removed first. System errors that name no other file become one line with the
    target's name.
    """
    target = path.absolute()
    # Only processes that share the lock share the hidden name: on one machine, with one cache.
    shared = hashlib.sha256(os.fsencode(_lock_file(target)) + platform.node().encode()).hexdigest()[:16]
    beside = target.parent / f".{target.name[:50]}.{shared}{UNFINISHED}"  # file systems allow 255 bytes
    try:
        with locked(path, patience=PATIENCE):
            try:
                _remove_unfinished(target, beside)
                _mine[target] = beside  # recorded before it exists: a signal may come at any moment
                beside.mkdir(0o700)
                yield beside
            finally:
                _remove_unfinished(target, beside)
                _mine.pop(target, None)
    except OSError as error:
        if error.strerror is None:
            raise
        inside = error.filename is None or str(error.filename).startswith(str(beside))
        what = f"Cannot save to the path {path}" if inside else error.filename
        raise type(error)(one_line(error, what)) from None


@contextlib.contextmanager
def locked(path: Path, *, patience: float) -> Iterator[None]:
    """A block that only one process at a time enters for this path; raises FileExistsError after `patience` seconds."""
    from filelock import FileLock, Timeout  # only when something is written: the import takes 0.1 s

    lock_file = _lock_file(path.absolute())
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise FileExistsError(
            f"Cannot save to the path {path}: another process is writing there. Wait for it, or choose another path."
        ) from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # still ours while held; otherwise thousands would pile up
        lock.release()


def discard_unfinished() -> None:
    """Removes what this process has not finished writing, before it exits early."""
    for target, beside in list(_mine.items()):
        _remove_unfinished(target, beside)


def stems_below(given: Iterable[str | os.PathLike[str]], files: Sequence[str]) -> dict[str, Path]:
    """The stem of each file's outputs: its path below the folder that contains all given files.

    It has no suffix, unless another file has the same stem, ignoring case.
    """
    folders = [os.path.normpath(expand_user(one).absolute()) for one in given if expand_user(one).is_dir()]
    others = [Path(file).parent for file in files if not any(Path(file).is_relative_to(one) for one in folders)]
    common = os.path.commonpath([*folders, *others]) if files else ""
    names = {file: Path(os.path.relpath(file, common)) for file in files}
    stems = {file: name.with_suffix("") for file, name in names.items()}
    shared = Counter(str(stem).casefold() for stem in stems.values())
    return {file: names[file] if shared[str(stem).casefold()] > 1 else stem for file, stem in stems.items()}


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as the ecosystem does: four spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


_mine: dict[Path, Path] = {}
"""What this process is writing to -> the hidden folder next to it."""


def _lock_file(target: Path) -> Path:
    """The lock file of a target in the cache, or in the temporary folder."""
    locks = cache_folder() / "locks"
    with contextlib.suppress(OSError):
        locks.mkdir(parents=True, exist_ok=True)
    if not os.access(locks, os.W_OK | os.X_OK):
        locks = Path(tempfile.gettempdir())
    real = Path(os.path.realpath(target.parent)) / target.name
    return locks / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.lock"


def _remove_unfinished(target: Path, beside: Path) -> None:
    """Removes the hidden folder; a folder moved there to be replaced gets its name back first."""
    if (beside / PREVIOUS).exists() and not target.exists():
        (beside / PREVIOUS).rename(target)
    shutil.rmtree(beside, ignore_errors=True)
