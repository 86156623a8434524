"""Finds the image files in the given folders, files, patterns and lists: the one scan of every verb.

PATH … -> Listing: absolute names in one fixed order, each file once, what cannot be an image, and what was skipped.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeAlias

from pathspec import GitIgnoreSpec

from mlx_aimv2.files import MAX_TEXT_BYTES, expand_user, kind_of, read_text, reason_of
from mlx_aimv2.images.raw import RAW_SUFFIXES, can_read_raw

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)
"""Suffixes, in any case, that mark an image inside a folder; a file given by name needs none of them."""

EVICTED = ".icloud"
"""What macOS appends to the name of an image moved to iCloud; it also puts a dot before the name."""

SHOWN = 8
"""Kinds of skipped files to name in the count."""

ADVICE = {
    **dict.fromkeys(RAW_SUFFIXES, "raw: pip install 'mlx-aimv2[raw]', or export it as JPEG"),
    ".jxl": "JPEG XL, export it as JPEG",
    ".mpo": "--include '*.mpo' takes its first image",
    ".apng": "--include '*.apng' takes its first frame",
}
"""Suffix -> what to do about it."""

EXCLUDED_FOLDERS = (
    *("@eaDir", "@tmp", "#recycle", "#snapshot"),  # thumbnails, temporary files, bin and snapshots of a Synology NAS
    *("@__thumb", "@Recycle", "@Recently-Snapshot"),  # the same on a QNAP NAS
    *("$RECYCLE.BIN", "RECYCLER", "System Volume Information"),  # Windows' own
    "__MACOSX",  # resource forks in a zip archive from a Mac
    "lost+found",  # fragments found by a file system check
)
"""Folders that are skipped anywhere. Hidden names, such as .Trashes, always are."""

FOUND = ".found-by-mlx-aimv2"
"""Marks the folder into which `search` copies or links images."""

OWN_FILES = (
    (FOUND,),
    ("head.json",),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
    ("state.safetensors",),
)
"""Marks of a folder written by this package (copies, a head, a model, a run's state): its pictures are not data."""

OWN = "of mlx-aimv2's own folders"

LIBRARIES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary", ".lrlibrary", "iphoto library")
"""Suffixes of photo libraries, in lower case."""

EXCLUDED_IN_LIBRARIES = ("resources", "Thumbnails", "Previews", "Caches", "database", "Database", "private", "scopes")
"""Folders directly inside a photo library with smaller copies of its images."""

EXCLUDED_SUFFIXES = (".lrdata", ".cocatalogdb")
"""Suffix of a folder with a photo program's previews."""

_NAMES = {name.lower(): name for name in EXCLUDED_FOLDERS}


class Rules:
    """What is skipped (`exclude`) and what is included all the same (`include`), as .gitignore patterns.

    Without a slash a pattern is compared with names at any depth, with one it is compared with the path below the
    given folder; a slash at the end matches only folders. The last match decides, `!` reverses earlier ones. Letter
    case is ignored. An included file needs no image suffix. Raises ValueError for an invalid pattern.
    """

    def __init__(self, exclude: Iterable[str] = (), include: Iterable[str] = ()) -> None:
        self._exclude, self._include = _compiled(exclude, "--exclude"), _compiled(include, "--include")

    def includes(self, path: str, *, is_folder: bool = False) -> bool:
        """Whether --include names this path below the given folder."""
        return _last_match(self._include, path, is_folder=is_folder) is not None

    def excluded_by(self, path: str, *, is_folder: bool, parent: str) -> str | None:
        """The pattern or listed name for which a relative path, in `parent`, is skipped, or None."""
        if self.includes(path, is_folder=is_folder):
            return None
        pattern = _last_match(self._exclude, path, is_folder=is_folder)
        if pattern is not None or not is_folder:
            return pattern
        name = PurePath(path).name
        if name in EXCLUDED_IN_LIBRARIES and PurePath(parent).name.lower().endswith(LIBRARIES):
            return f"{name} of a photo library"
        previews = (f"*{suffix}" for suffix in EXCLUDED_SUFFIXES if name.lower().endswith(suffix))
        return _NAMES.get(name.lower()) or next(previews, None)


def _compiled(patterns: Iterable[str], flag: str) -> list[tuple[str, Any]]:
    """Each pattern with its form in pathspec, in lower case."""
    found = []
    for pattern in patterns:
        # "#recycle" is a name here: a line of .gitignore would be a comment.
        line = f"\\{pattern}" if pattern.startswith("#") else pattern
        try:
            rules = GitIgnoreSpec.from_lines([line.lower()]).patterns if pattern.strip("/! ") else []
        except (ValueError, re.error):
            rules = []
        if not rules or rules[0].include is None:
            raise ValueError(f"{flag} {pattern!r} is not a pattern: give one such as '*.png' or 'Trash/'")
        found.append((pattern, rules[0]))
    return found


def _last_match(rules: list[tuple[str, Any]], path: str, *, is_folder: bool) -> str | None:
    """The pattern that decides about a path; None if none does or it begins with `!`."""
    name = f"{path.lower()}/" if is_folder else path.lower()
    for pattern, rule in reversed(rules):
        found = rule.match_file(name)
        # pathspec marks a match through a parent folder's name with this group.
        if found and not (found.match.groupdict().get("ps_d") and found.match.end("ps_d") < len(name)):
            return pattern if rule.include else None
    return None


def is_junk(name: str) -> bool:
    """Whether a scan would skip a path in an archive: hidden, such as a Mac's `._` files, or on the list."""
    return any(part.startswith(".") or part.lower() in _NAMES for part in PurePosixPath(name).parts)


@dataclass
class Listing:
    """What was found. All names are absolute; those that are not UTF-8 contain surrogates, as from Python's `os`.

    `files` sorted by their bytes, each file once, however many names lead to it; `problems` pairs of (name, reason)
    where the reason continues a sentence that starts with the name; `missing` given paths that do not exist; `roots`
    the scanned folders with images, `empty` those without. Skipped: `excluded` folders and files, by the pattern or
    name that excluded them, and other files, by their `suffixes`; `evicted` images are in iCloud and not on this disk;
    `folders` were not entered because the scan was not deep.
    """

    files: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    excluded: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    evicted: set[str] = field(default_factory=set)
    folders: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> dict[str, int]:
        """How many files and folders were skipped, by suffix or by what excluded them."""
        return {**self.suffixes, **self.excluded}

    def check_any(self) -> None:
        """Raises FileNotFoundError, naming the given paths, if there is no image at all."""
        if not self.files and not self.problems:
            asked = [f"{path} does not exist" for path in self.missing]
            names = f"looked for names that end in {' '.join(SUFFIXES)}"
            asked += [f"no images in {path}, {names}" for path in self.empty]
            asked += [f"skipped: {counted(self.skipped)}"] if self.skipped else []
            raise FileNotFoundError(f"{'; '.join(asked) or 'nothing'}: give images, or folders with images")


def list_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
) -> Listing:
    """Finds the images: `one path or several files, folders and patterns -> Listing`.

    Folders are scanned recursively. Only files with one of `SUFFIXES` count; skipped are hidden names, the folders in
    `EXCLUDED_FOLDERS`, those written by this package and what `exclude` names; `include` overrides this (`Rules`).
    Links to folders come last, so a folder reached twice is listed under its own name and no cycle is scanned. A name
    that exists is not treated as a pattern.
    """
    lister = _Lister(Rules(exclude, include))
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        lister.argument(os.fspath(path))
    return lister.finish()


def read_list(data: bytes) -> list[str]:
    """Names from a list's bytes: separated by NUL if it contains one, else by line, with Windows' line ends too."""
    lines = data.split(b"\0") if b"\0" in data else data.replace(b"\r\n", b"\n").split(b"\n")
    return [os.fsdecode(name) for name in lines if name]


def identity(path: str, about: os.stat_result) -> tuple[int, int] | str:
    """A file's identity, however its name is spelled: device and inode, or else its real path."""
    return (about.st_dev, about.st_ino) if about.st_ino else os.path.realpath(path)


def is_gone(path: str) -> bool:
    """Whether no file has this name any more; one that merely cannot be accessed is not gone."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - as above
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def is_under(path: str, roots: Iterable[str]) -> bool:
    """Whether a name is inside one of these folders."""
    return any(path.startswith(root if root.endswith(os.sep) else root + os.sep) for root in roots)


def has_suffix(name: str) -> bool:
    """Whether a name has an image's suffix."""
    return name.lower().endswith(SUFFIXES) or (name.lower().endswith(RAW_SUFFIXES) and can_read_raw())


def counted(skipped: Mapping[str, int], *, advice: Mapping[str, str] = ADVICE) -> str:
    """`12 .mov, 3 .jxl (JPEG XL, export it as JPEG), 2 @eaDir`, the most frequent first."""
    order = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {name}{f' ({advice[name]})' if name in advice else ''}" for name, count in order[:SHOWN]]
    more = sum(count for _, count in order[SHOWN:])
    return ", ".join([*parts, *([f"{more:,} others"] if more else [])])


class Scan:
    """Scans the folders of one collection, labelled images or captions, and records what was skipped or is wrong.

    `broken` are lines about what cannot be an image; `notes` say what was skipped, each kind once. Any of `faults`,
    which readers of the collection add, makes it unusable.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.faults: list[str] = []
        self._listings: dict[tuple[Path, bool], Listing] = {}
        self._notes: dict[str, dict[str, None]] = {}

    def images(self, folder: Path) -> list[str]:
        """The images in a folder and below it, sorted, their names starting with the folder as given."""
        return self._listing(folder, deep=True).files

    def loose(self, folder: Path) -> list[str]:
        """The images directly in a folder."""
        return self._listing(folder, deep=False).files

    def folders(self, folder: Path) -> list[Path]:
        """The folders directly in a folder that would be scanned for images, sorted."""
        return [Path(name) for name in self._listing(folder, deep=False).folders]

    def was_read(self, folder: Path, suffix: str) -> None:
        """Removes the files of a suffix from a folder's record: they were not skipped."""
        self._listing(folder, deep=True).suffixes.pop(suffix.lower(), None)

    def unlisted(self, folder: Path, file: Path, names: Iterable[str]) -> None:
        """Notes the images in a folder that a file does not list; `names` are those it does."""
        self.was_read(folder, file.suffix)
        listed = set(map(os.path.normpath, names))
        others = [image for image in self.images(folder) if os.path.normpath(image) not in listed]
        self.note(others, f"is not listed in {file.name}: skipped")

    def text(self, file: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
        """The content of a UTF-8 file; "" and a fault if it cannot be read, to report all faults at once."""
        try:
            return read_text(file, max_bytes=max_bytes)
        except (ValueError, OSError) as error:
            self.faults.append(str(error))
            return ""

    def note(self, names: str | Iterable[str], reason: str) -> None:
        """Records that things were skipped or changed, and why; a repetition counts once."""
        if names := [names] if isinstance(names, str) else list(names):
            self._notes.setdefault(reason, {}).update(dict.fromkeys(names))

    @property
    def all_noted(self) -> list[str]:
        """A line for each thing counted in the notes."""
        return [f"{name} {reason}" for reason, names in self._notes.items() for name in names]

    @property
    def notes(self) -> list[str]:
        """A line for each reason, with the first name and how many more; then skipped files, by kind."""
        lines = [
            f"{next(iter(names))} {reason}{f' (and {len(names) - 1:,} more)' if len(names) > 1 else ''}"
            for reason, names in self._notes.items()
        ]
        scanned = [str(folder) for folder, deep in self._listings if deep]
        total = Counter[str]()
        for (folder, deep), listing in self._listings.items():
            if not is_under(str(folder), scanned) and (deep or str(folder) not in scanned):
                # Other files directly in DATA may well describe it.
                total.update(listing.skipped if deep else listing.excluded)
        return [*lines, *([f"skipped: {counted(total, advice={})}"] if total else [])]

    def _listing(self, folder: Path, *, deep: bool) -> Listing:
        if (folder, deep) not in self._listings:
            lister = _Lister(Rules(), deep, every_name=True)  # related files are matched by name
            lister.argument(str(folder))
            listing = self._listings[folder, deep] = lister.finish()
            start = len(os.path.normpath(folder.absolute()))
            for names in (listing.files, listing.folders):
                names[:] = [f"{folder}{name[start:]}" for name in names]
            for path, reason in listing.problems:
                if Path(path).is_dir() and os.access(path, os.R_OK):
                    self.note(path, f"{reason}: skipped")  # its content is listed already, or it would be a cycle
                elif (line := f"{path} {reason}") not in self.broken:
                    self.broken.append(line)
        return self._listings[folder, deep]


_Folder: TypeAlias = tuple[str, os.stat_result, str]
"""A folder to scan: its path, its stat result, and its path below the given folder."""


@dataclass
class _Lister:
    """The state of one listing: recursive if `deep`, with one name per file or with `every_name`."""

    rules: Rules
    deep: bool = True
    every_name: bool = False
    found: Listing = field(default_factory=Listing)
    files: dict[tuple[int, int] | str, tuple[bool, bytes, str]] = field(default_factory=dict)
    """Identity of a file -> the best name so far: links last, then by its bytes."""
    links: list[_Folder] = field(default_factory=list)
    visited: set[tuple[int, int] | str] = field(default_factory=set)

    def argument(self, given: str) -> None:
        path = os.path.normpath(expand_user(given).absolute())
        try:
            about = os.stat(path)  # noqa: PTH116 - a Path would cost more than the call itself over 100,000 names
        except OSError as error:
            if os.path.lexists(path) or error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
                self.problem(path, error)
                return
            # An absolute pattern is left to glob too, whose recursion takes a few stack frames per folder.
            is_pattern = glob.has_magic(given) and given.count("/") < 256
            names = sorted(glob.glob(str(expand_user(given)), recursive=True)) if is_pattern else []  # noqa: PTH207
            for name in names:
                if Path(name).is_dir() or has_suffix(name):
                    self.argument(name)
            if not names:
                self.found.missing.append(given)
            return
        if stat.S_ISDIR(about.st_mode):
            self.found.roots.append(path)
            self.scan((path, about, ""))
        else:
            self.file(path, about, is_link=Path(path).is_symlink())

    def finish(self) -> Listing:
        found = self.found
        while self.links:
            link = self.links.pop(0)
            target, here = os.path.realpath(link[0]), os.path.realpath(Path(link[0]).parent)
            if target == here or is_under(here, [target]):
                found.problems.append((link[0], "is a link back to a folder that contains it"))
            else:
                self.scan(link)
        found.folders.sort(key=os.fsencode)
        found.files = [name for _, _, name in sorted(self.files.values(), key=lambda best: best[1])]
        asked, found.roots = dict.fromkeys(found.roots), []
        for root in asked:
            (found.roots if any(is_under(file, [root]) for file in found.files) else found.empty).append(root)
        return found

    def scan(self, folder: _Folder) -> None:
        pending = [folder]
        while pending:
            folder = path, about, below = pending.pop()
            if (known := identity(path, about)) in self.visited:
                continue
            self.visited.add(known)
            try:
                entries = sorted(os.scandir(path), key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                self.problem(path, error)
                continue
            names = {entry.name for entry in entries}
            is_own = bool(below) and any(names.issuperset(files) for files in OWN_FILES)
            if is_own and not self.rules.includes(below.rstrip("/"), is_folder=True):
                self.found.excluded[OWN] += 1
                continue
            if below and not self.deep:
                self.found.folders.append(path)
                continue
            for entry in entries:
                try:
                    self.entry(entry, folder, pending)
                except OSError as error:
                    if has_suffix(entry.name) or error.errno == errno.ELOOP:
                        self.problem(entry.path, error)

    def entry(self, entry: os.DirEntry[str], folder: _Folder, pending: list[_Folder]) -> None:
        name, below = entry.name, f"{folder[2]}{entry.name}"
        if name.startswith("."):
            if name.endswith(EVICTED) and has_suffix(name[1 : -len(EVICTED)]):
                self.found.evicted.add(str(Path(entry.path).with_name(name[1 : -len(EVICTED)])))
            if not self.rules.includes(below, is_folder=entry.is_dir()):
                return
        is_folder = entry.is_dir()
        if (by := self.rules.excluded_by(below, is_folder=is_folder, parent=folder[0])) is not None:
            self.found.excluded[by] += 1
        elif is_folder:
            (self.links if entry.is_symlink() else pending).append((entry.path, entry.stat(), f"{below}/"))
            if has_suffix(name):
                self.found.problems.append((entry.path, "is a folder, not an image"))
        elif has_suffix(name) or self.rules.includes(below):
            self.file(entry.path, entry.stat(), is_link=entry.is_symlink())
        elif entry.is_file():
            self.found.suffixes[Path(name).suffix.lower() or "no suffix"] += 1

    def file(self, path: str, about: os.stat_result, *, is_link: bool) -> None:
        if not stat.S_ISREG(about.st_mode):
            self.found.problems.append((path, f"is {kind_of(about)}, not an image"))
            return
        # Not the inode in the folder's entry: some network and layered file systems use the same one twice.
        known = path if self.every_name else identity(path, about)
        candidate = (is_link, os.fsencode(path), path)
        self.files[known] = min(self.files.get(known, candidate), candidate)

    def problem(self, path: str, error: OSError) -> None:
        is_dead = error.errno in (errno.ENOENT, errno.ELOOP) and Path(path).is_symlink()
        self.found.problems.append((path, "is a dangling link" if is_dead else reason_of(error)))
