"""Finds the image files that a user means by folders, files, patterns and lists.

PATH … -> Listing: absolute names in one fixed order, and what cannot be an image with the reason.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlx_aimv2.safe_read import expand_user

SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)
"""Endings, in any case, by which an image is recognised inside a folder; a file given by name needs none of them."""

PACKAGES = {".photoslibrary": "originals"}
"""Folders that macOS shows as one document -> the only folder in them that holds the images themselves."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass
class Listing:
    """What was found. All names are absolute; those that are not UTF-8 hold surrogates, as Python's `os` gives them.

    `files` sorted by their bytes, each once; `problems` pairs of (name, reason) where the reason continues a sentence
    that starts with the name; `missing` what was asked for and names nothing; `roots` the folders that were walked and
    hold images; `empty` the folders asked for that hold none.
    """

    files: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def list_images(paths: Iterable[str | os.PathLike[str]]) -> Listing:
    """Finds the images: `files, folders and patterns -> Listing`.

    Folders are walked to the bottom; in them only names with one of `SUFFIXES` count and hidden names are passed over.
    Links to folders are followed after everything else, so that a folder reached twice is listed under its own name and
    no circle is walked. Names that exist are never taken for patterns.
    """
    walk = _Walk()
    for path in paths:
        walk.argument(os.fspath(path))
    return walk.finish()


def read_list(data: bytes) -> list[str]:
    """Names from a list's bytes: separated by NUL where it holds one (then names may hold newlines), else lines."""
    separator = b"\0" if b"\0" in data else b"\n"
    return [os.fsdecode(name) for name in data.split(separator) if name]


def is_gone(path: str) -> bool:
    """Whether no file has this name any more; one that merely cannot be looked at is not gone."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - as above
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def is_under(path: str, roots: Iterable[str]) -> bool:
    """Whether a name lies in one of these folders."""
    return any(path.startswith(root if root.endswith(os.sep) else root + os.sep) for root in roots)


def has_suffix(name: str) -> bool:
    """Whether a name ends as images' names do."""
    return name.lower().endswith(SUFFIXES)


class _Walk:
    """The state of one listing."""

    def __init__(self) -> None:
        self.found = Listing()
        self.files: set[str] = set()
        self.roots: dict[str, None] = {}
        self.links: list[tuple[str, os.stat_result]] = []
        self.visited: set[tuple[int, int]] = set()

    def argument(self, given: str) -> None:
        path = os.path.normpath(expand_user(given).absolute())
        try:
            kind = os.stat(path)  # noqa: PTH116 - a Path would cost more than the call itself over 100,000 names
        except OSError as error:
            if os.path.lexists(path) or error.errno != errno.ENOENT:
                self.problem(path, _reason(error, is_link=Path(path).is_symlink()))
            elif glob.has_magic(given):
                self.pattern(given)
            else:
                self.found.missing.append(given)
            return
        if stat.S_ISDIR(kind.st_mode):
            self.roots[path] = None
            self.folder(path, kind)
        else:
            self.file(path, kind)

    def pattern(self, given: str) -> None:
        names = sorted(glob.glob(str(expand_user(given)), recursive=True))  # noqa: PTH207 - absolute patterns too
        if not names:
            self.found.missing.append(given)
        for name in names:
            if Path(name).is_dir() or has_suffix(name):
                self.argument(name)

    def finish(self) -> Listing:
        while self.links:
            path, kind = self.links.pop(0)
            target, here = os.path.realpath(path), os.path.realpath(Path(path).parent)
            if target == here or is_under(here, [target]):
                self.problem(path, "is a link back to a folder that it lies in")
            else:
                self.folder(path, kind)
        found = self.found
        found.files = sorted(self.files, key=os.fsencode)
        for root in self.roots:
            (found.roots if any(is_under(file, [root]) for file in found.files) else found.empty).append(root)
        return found

    def folder(self, path: str, kind: os.stat_result) -> None:
        pending = [(path, kind)]
        while pending:
            path, kind = pending.pop()
            if (kind.st_dev, kind.st_ino) in self.visited:
                continue
            self.visited.add((kind.st_dev, kind.st_ino))
            if (inside := PACKAGES.get(Path(path).suffix)) is not None and (Path(path) / inside).is_dir():
                path = str(Path(path) / inside)
            try:
                entries = sorted(os.scandir(path), key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                self.problem(path, _reason(error))
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    self.entry(entry, pending)
                except OSError as error:
                    if has_suffix(entry.name) or error.errno == errno.ELOOP:
                        self.problem(entry.path, _reason(error, is_link=entry.is_symlink()))

    def entry(self, entry: os.DirEntry[str], pending: list[tuple[str, os.stat_result]]) -> None:
        if entry.is_file(follow_symlinks=False):
            if has_suffix(entry.name):
                self.files.add(entry.path)
            return
        kind = entry.stat()
        if stat.S_ISDIR(kind.st_mode):
            if entry.is_symlink():
                self.links.append((entry.path, kind))
            else:
                pending.append((entry.path, kind))
        if has_suffix(entry.name):
            self.file(entry.path, kind)

    def file(self, path: str, kind: os.stat_result) -> None:
        if stat.S_ISREG(kind.st_mode):
            self.files.add(path)
        else:
            self.problem(path, f"is {KINDS.get(stat.S_IFMT(kind.st_mode), 'something else')}, not an image")

    def problem(self, path: str, reason: str) -> None:
        self.found.problems.append((path, reason))


def _reason(error: OSError, *, is_link: bool = False) -> str:
    if error.errno == errno.ELOOP:
        return "is a link that leads in a circle"
    if error.errno == errno.ENOENT and is_link:
        return "is a link that leads nowhere"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    return f"cannot be read: {error.strerror or error}"
