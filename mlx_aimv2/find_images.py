"""Finds the image files that a user means by folders, files, patterns and lists.

PATH … -> Listing: absolute names in one fixed order, each file once, what cannot be an image with the reason, and what
was passed over.
"""

from __future__ import annotations

import codecs
import errno
import glob
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlx_aimv2.exclude import Rules
from mlx_aimv2.files import expand_user

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

EVICTED = ".icloud"
"""What macOS appends to the name of an image that it moved to iCloud; a dot goes before it."""

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

    `files` sorted by their bytes, each file once, however many names lead to it; `problems` pairs of (name, reason)
    where the reason continues a sentence that starts with the name; `missing` what was asked for and names nothing;
    `roots` the folders that were walked and hold images; `empty` the folders asked for that hold none.

    What was passed over in folders: `excluded` folders and files by the pattern or name that excluded them, `suffixes`
    other files by their suffix; `evicted` are the names of images that are in iCloud and not on this disk.
    """

    files: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    excluded: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)
    evicted: set[str] = field(default_factory=set)


def list_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
) -> Listing:
    """Finds the images: `one path or several files, folders and patterns -> Listing`.

    Folders are walked to the bottom; in them only names with one of `SUFFIXES` count, hidden names are passed over, and
    so are the folders of `exclude.EXCLUDED_FOLDERS` and what `exclude` names; `include` takes all the same what it
    names (`exclude.Rules`). Links to folders are followed after everything else, so that a folder reached twice is
    listed under its own name and no circle is walked. Names that exist are never taken for patterns.
    """
    walk = _Walk(Rules(tuple(exclude), tuple(include)))
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        walk.argument(os.fspath(path))
    return walk.finish()


def read_list(data: bytes) -> list[str]:
    """Names from a list's bytes: separated by NUL where it holds one (then names may hold newlines), else lines.

    A byte order mark is dropped, lists in UTF-16 are read, and lines may end as on Windows.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", errors="replace").encode()
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        return [os.fsdecode(name) for name in data.split(b"\0") if name]
    lines = [line for line in data.split(b"\n") if line]
    if all(line.endswith(b"\r") for line in lines):
        lines = [line[:-1] for line in lines if line != b"\r"]
    return [os.fsdecode(line) for line in lines]


def identity(path: str, about: os.stat_result) -> tuple[int, int] | str:
    """What tells a file from all others, however its name is spelled: device and inode, or else its real path."""
    return (about.st_dev, about.st_ino) if about.st_ino else os.path.realpath(path)


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


@dataclass(frozen=True)
class _Folder:
    """A folder to walk: its path, its device and inode, and its path below the folder that was asked for."""

    path: str
    about: os.stat_result
    below: str = ""


class _Walk:
    """The state of one listing."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.found = Listing()
        self.files: dict[tuple[int, int] | str, tuple[bool, bytes, str]] = {}
        """Identity of a file -> the best name so far: links last, then by its bytes."""
        self.roots: dict[str, None] = {}
        self.links: list[_Folder] = []
        self.visited: set[tuple[int, int] | str] = set()

    def argument(self, given: str) -> None:
        path = os.path.normpath(expand_user(given).absolute())
        try:
            about = os.stat(path)  # noqa: PTH116 - a Path would cost more than the call itself over 100,000 names
        except OSError as error:
            if os.path.lexists(path) or error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
                self.problem(path, _reason(error, is_link=Path(path).is_symlink()))
            elif glob.has_magic(given):
                self.pattern(given)
            else:
                self.found.missing.append(given)
            return
        if stat.S_ISDIR(about.st_mode):
            self.roots[path] = None
            self.walk(_Folder(path, about))
        else:
            self.file(path, about)

    def pattern(self, given: str) -> None:
        names = sorted(glob.glob(str(expand_user(given)), recursive=True))  # noqa: PTH207 - absolute patterns too
        if not names:
            self.found.missing.append(given)
        for name in names:
            if Path(name).is_dir() or has_suffix(name):
                self.argument(name)

    def finish(self) -> Listing:
        while self.links:
            link = self.links.pop(0)
            target, here = os.path.realpath(link.path), os.path.realpath(Path(link.path).parent)
            if target == here or is_under(here, [target]):
                self.problem(link.path, "is a link back to a folder that it lies in")
            else:
                self.walk(link)
        found = self.found
        found.files = [name for _, _, name in sorted(self.files.values(), key=lambda best: best[1])]
        for root in self.roots:
            (found.roots if any(is_under(file, [root]) for file in found.files) else found.empty).append(root)
        return found

    def walk(self, folder: _Folder) -> None:
        pending = [folder]
        while pending:
            folder = pending.pop()
            if (known := identity(folder.path, folder.about)) in self.visited:
                continue
            self.visited.add(known)
            path = folder.path
            if (inside := PACKAGES.get(Path(path).suffix)) is not None and (Path(path) / inside).is_dir():
                path = str(Path(path) / inside)
            try:
                entries = sorted(os.scandir(path), key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                self.problem(path, _reason(error))
                continue
            for entry in entries:
                try:
                    self.entry(entry, folder, pending)
                except OSError as error:
                    if has_suffix(entry.name) or error.errno == errno.ELOOP:
                        self.problem(entry.path, _reason(error, is_link=entry.is_symlink()))

    def entry(self, entry: os.DirEntry[str], folder: _Folder, pending: list[_Folder]) -> None:
        name, below = entry.name, f"{folder.below}{entry.name}"
        if name.startswith("."):
            if name.endswith(EVICTED) and has_suffix(name[1 : -len(EVICTED)]):
                self.found.evicted.add(str(Path(entry.path).with_name(name[1 : -len(EVICTED)])))
            if not self.rules.includes(below, is_folder=entry.is_dir()):
                return
        is_folder = entry.is_dir()
        by = self.rules.excluded_by(below, is_folder=is_folder, parent=Path(folder.path).name)
        if by is not None:
            self.found.excluded[by] = self.found.excluded.get(by, 0) + 1
        elif is_folder:
            inside = _Folder(entry.path, entry.stat(), f"{below}/")
            (self.links if entry.is_symlink() else pending).append(inside)
            if has_suffix(name):
                self.problem(entry.path, "is a folder, not an image")
        elif has_suffix(name) or self.rules.includes(below):
            if entry.is_file(follow_symlinks=False) and entry.inode():
                self.add((folder.about.st_dev, entry.inode()), entry.path, is_link=False)
            else:
                self.file(entry.path, entry.stat(), is_link=entry.is_symlink())
        elif entry.is_file():
            suffix = Path(name).suffix.lower() or "no suffix"
            self.found.suffixes[suffix] = self.found.suffixes.get(suffix, 0) + 1

    def file(self, path: str, about: os.stat_result, *, is_link: bool = False) -> None:
        if stat.S_ISREG(about.st_mode):
            self.add(identity(path, about), path, is_link=is_link)
        else:
            self.problem(path, f"is {KINDS.get(stat.S_IFMT(about.st_mode), 'something else')}, not an image")

    def add(self, known: tuple[int, int] | str, path: str, *, is_link: bool) -> None:
        best = self.files.get(known)
        if best is not None and best[2] != path and not _is_same(best[2], path):
            known = os.path.realpath(path)  # some network and layered file systems give two files one number
            best = self.files.get(known)
        candidate = (is_link, os.fsencode(path), path)
        self.files[known] = candidate if best is None else min(best, candidate)

    def problem(self, path: str, reason: str) -> None:
        self.found.problems.append((path, reason))


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)  # noqa: PTH121
    except OSError:
        return False


def _reason(error: OSError, *, is_link: bool = False) -> str:
    if error.errno == errno.ELOOP:
        return "is a link that leads in a circle"
    if error.errno == errno.ENOENT and is_link:
        return "is a link that leads nowhere"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    return f"cannot be read: {error.strerror or error}"
