"""Reads untrusted files within bounds, and writes files and folders whole or not at all.

What is read is a regular file of no more bytes than expected, without ever waiting for one that is something else. An
input is never replaced, nor is anything but a regular file or a folder of ours; what stands at the target and is not
ours is refused unless `overwrite` says otherwise. A process that is killed leaves a hidden temporary behind; the next
one that writes to the same target removes it.
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
"""64 MiB: the largest text file of a released checkpoint, a tokenizer.json, has 3 MB."""

MAX_JSON_BYTES = 1 << 24
"""16 MiB: of a JSON file that is read whole, which may take thirty times the memory."""

MAX_IMAGE_BYTES = 1 << 30

BLOCK = 1 << 20
"""Bytes that are read at a time where nobody says how many there are."""

HEAD_BYTES = 4096
"""Of a file in the way, what is looked at for the mark of the run that wrote it."""

CACHE_VARIABLE = "MLX_AIMV2_CACHE"
"""The environment variable that names another folder for what may be computed again, and for locks."""

UNFINISHED = ".unfinished"
"""How the name of a hidden file or folder ends while it is being written."""

PREVIOUS = "previous"
"""In the hidden folder, a folder that is being replaced, until its successor has the name."""

PATIENCE = 10.0
"""Seconds that another process may take to finish what it writes to the same target."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a disk, a quota or a file that takes no more."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(about: os.stat_result) -> str:
    """What something that is no regular file is called; some systems have more kinds than `KINDS`."""
    return KINDS.get(stat.S_IFMT(about.st_mode), "something else")


def expand_user(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~name` replaced by the home folder; a name that no user has stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for ~nobody


def cache_folder() -> Path:
    """`$MLX_AIMV2_CACHE`, else `mlx-aimv2` in `$XDG_CACHE_HOME` or `~/.cache`; the temporary folder without a home."""
    own = os.environ.get(CACHE_VARIABLE)
    folder = expand_user(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mlx-aimv2")
    homeless = folder.parts[:1] and folder.parts[0].startswith("~")  # a container's user may have none
    return Path(tempfile.gettempdir()) / f"mlx-aimv2-{os.getuid()}" if homeless else folder


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is there, under a name that an untrusted list gives: none has a NUL or more than 255 bytes."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for them


def stat_of(path: str) -> os.stat_result | None:
    """What the system says of a file, once for each of many; None where it says nothing."""
    try:
        return os.stat(path)  # noqa: PTH116 - a Path would cost more than the call itself
    except (OSError, ValueError):
        return None


def marks_of(about: os.stat_result) -> tuple[int, int, int, int]:
    """By what a change of a file shows: size in bytes, mtime and ctime in nanoseconds, inode (SQLite holds 63 bits)."""
    largest = (1 << 63) - 1  # nanoseconds from 2262 on are more
    return about.st_size, min(about.st_mtime_ns, largest), min(about.st_ctime_ns, largest), about.st_ino & largest


def is_unchanged(about: os.stat_result, size: int, mtime_ns: int, ctime_ns: int | None, inode: int | None) -> bool:
    """Whether a file is as it was by these marks, of which earlier releases kept the first two.

    The inode counts where ctime is no copy of mtime: file systems that keep none (exFAT, FUSE) number files anew
    whenever they are mounted.
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
    """Why something cannot be read, going on with a sentence that starts with its name."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    return str(error) if error.errno is None else f"cannot be read: {error.strerror}"


def one_line(error: OSError, what: object) -> str:
    """What an error of the system says about `what`, and what to do about a full disk."""
    advice = " Make room, or choose another one." if error.errno in FULL else ""
    return str(error) if error.strerror is None else f"{what}: {error.strerror}.{advice}"


@contextlib.contextmanager
def _regular_file(path: str | os.PathLike[str], wanted: str = "a file") -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file, open, and how it was then; of others OSError says without a number: is a device, not a file."""
    try:
        # A named pipe would else wait for somebody to write into it.
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
    """Raises FileNotFoundError for a link that leads to nothing, as in a cache whose download broke off."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which is not there: fetch it again")


def check_size(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> None:
    """Raises ValueError for a file that is larger than such files are."""
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read of such a file")


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
    """Content of a regular file, and how the file was before it was read, so that a change during it shows later.

    Raises OSError without a name in it, as the system does or with a reason that continues a sentence.
    """
    with _regular_file(path, "an image") as (file, about):
        if about.st_size > MAX_IMAGE_BYTES:
            raise OSError(f"has {about.st_size:,} bytes, more than an image of {MAX_IMAGE_BYTES:,} bytes")
        return about, file.read(about.st_size)


def read_stream(stream: BinaryIO) -> bytes:
    """Everything in an open file, from its start where it can go there; its place is the end afterwards."""
    if hasattr(stream, "seek"):
        with contextlib.suppress(OSError):  # a pipe that the caller opened is read from where it is
            stream.seek(0)
    data = bytearray()
    while block := stream.read(BLOCK):
        if not isinstance(block, bytes):
            raise OSError(f"gives {type(block).__name__} instead of bytes: open it in mode 'rb'")
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
    """Raises OSError where a folder cannot be written: something stands there, or nothing can be written there.

    With `overwrite` a folder for which `is_own` says yes is replaced, unless it is or holds one of the `inputs`, or
    lies in one.
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
                raise FileExistsError(f"Cannot save to the path {path}: {one} is read, and lies in it or around it.")
    existing = next(place for place in path.absolute().parents if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"Cannot save to the path {path}: {existing} cannot be written to. Choose another place.")


def check_file(
    path: Path,
    *,
    option: str,
    is_own: Callable[[bytes], bool],
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Raises ValueError or OSError where a file cannot or must not be written; `option` is the flag to change.

    Never one of the inputs; a file is replaced if `is_own` says of its first `HEAD_BYTES` bytes that an earlier run
    wrote it, if it is empty, or with `overwrite`.
    """
    folder = Path(os.path.realpath(path)).parent  # the file that a link leads to is written, not the link
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {path}: {folder} does not exist; make that folder first")
    if path.exists():
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise FileExistsError(f"{option} {path} is {kind_of(about)}: name a file")
        for one in inputs:
            if (other := stat_of(os.fspath(one))) is not None and os.path.samestat(other, about):
                raise FileExistsError(f"{option} {path} would replace {one}, which never happens: choose another name")
        if about.st_size and not overwrite and not is_own(read_start(path, max_bytes=HEAD_BYTES)):
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
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """A folder to write into that takes the name `path` only if the block ends well, and vanishes otherwise."""
    check_target(path, overwrite=overwrite, is_own=is_own, inputs=inputs)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as beside:
        folder = beside / "folder"
        folder.mkdir()
        yield folder
        for file in (path for path in folder.rglob("*") if path.is_file()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        check_target(path, overwrite=overwrite, is_own=is_own, inputs=inputs)  # another process may have made it
        if overwrite and path.exists():
            path.rename(beside / PREVIOUS)  # from where it comes back if its successor does not take its name
        folder.rename(path)


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
    """A hidden folder beside `path` that goes with the block; one process at a time has it, others wait for a moment.

    What a killed process left there goes first. Errors of the system that name no other file end as one line with the
    target's name.
    """
    target = path.absolute()
    # Only those processes share the hidden name that share the lock: on one machine, with one cache.
    shared = hashlib.sha256(os.fsencode(_lock_file(target)) + platform.node().encode()).hexdigest()[:16]
    beside = target.parent / f".{target.name[:50]}.{shared}{UNFINISHED}"  # file systems allow 255 bytes
    try:
        with locked(path, patience=PATIENCE):
            try:
                _remove_unfinished(target, beside)
                _mine[target] = beside  # known before there is anything: a signal may come at any moment
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
    """A block that one process at a time is in for this path; raises FileExistsError after `patience` seconds."""
    from filelock import FileLock, Timeout  # not before something is written: it takes 0.1 s to import

    lock_file = _lock_file(path.absolute())
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise FileExistsError(
            f"Cannot save to the path {path}: another process is writing there. Wait for it, or choose another one."
        ) from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # ours as long as it is held: thousands would stay
        lock.release()


def discard_unfinished() -> None:
    """Removes what this process has not finished writing, before it ends without running to its end."""
    for target, beside in list(_mine.items()):
        _remove_unfinished(target, beside)


def stems_below(given: Iterable[str | os.PathLike[str]], files: Sequence[str]) -> dict[str, Path]:
    """How what is written of each file begins: its path below the folder that holds all that was given.

    It has no suffix, unless another file has the rest of the name, in any case of letters.
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
"""What this process is writing to -> the hidden folder beside it."""


def _lock_file(target: Path) -> Path:
    """The lock of a target among what may be computed again, or in the temporary folder."""
    locks = cache_folder() / "locks"
    with contextlib.suppress(OSError):
        locks.mkdir(parents=True, exist_ok=True)
    if not os.access(locks, os.W_OK | os.X_OK):
        locks = Path(tempfile.gettempdir())
    real = Path(os.path.realpath(target.parent)) / target.name
    return locks / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.lock"


def _remove_unfinished(target: Path, beside: Path) -> None:
    """Removes the hidden folder; a folder that was moved there, to be replaced, gets its name back first."""
    if (beside / PREVIOUS).exists() and not target.exists():
        (beside / PREVIOUS).rename(target)
    shutil.rmtree(beside, ignore_errors=True)
