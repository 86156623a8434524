"""Decides what a walk through a folder passes over: a list of folders that hold no photographs, and glob patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath

EXCLUDED_FOLDERS = {
    "@eaDir": "thumbnails and metadata of a Synology NAS",
    "@tmp": "temporary files of a Synology NAS",
    "#recycle": "recycle bin of a Synology NAS",
    "#snapshot": "snapshots of a Synology NAS",
    "@Recycle": "recycle bin of a QNAP NAS",
    "@Recently-Snapshot": "snapshots of a QNAP NAS",
    "@__thumb": "thumbnails of a QNAP NAS",
    "$RECYCLE.BIN": "recycle bin of Windows",
    "RECYCLER": "recycle bin of Windows XP",
    "System Volume Information": "Windows' own",
    "__MACOSX": "resource forks in a zip archive from a Mac",
    "lost+found": "fragments that a file system check found",
}
"""Folders that are passed over wherever they lie -> what they hold. Hidden names, such as .Trashes, always are."""

LIBRARIES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary", ".lrlibrary", "iphoto library")
"""How the name of a photo library ends, in lower case."""

EXCLUDED_IN_LIBRARIES = ("resources", "Thumbnails", "Previews", "Caches", "database", "Database", "private", "scopes")
"""Folders directly inside a photo library that hold smaller copies of its images."""

EXCLUDED_SUFFIXES = (".lrdata", ".cocatalogdb")
"""How the name of a folder with a photo program's previews ends."""

_NAMES = {name.lower(): name for name in EXCLUDED_FOLDERS}


@dataclass(frozen=True)
class Rules:
    """What is passed over (`exclude`) and what is taken all the same (`include`), as glob patterns.

    A pattern without a slash is compared with the name of a file or folder at any depth; one with a slash with the path
    below the folder that was asked for; a slash at the end stands for folders alone. `*` and `?` stop at a slash, `**`
    does not, and letter case does not count. An included file needs no image's suffix.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    _exclude: _Patterns = field(init=False, repr=False, compare=False)
    _include: _Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_exclude", _Patterns(self.exclude, "--exclude"))
        object.__setattr__(self, "_include", _Patterns(self.include, "--include"))

    def includes(self, path: str, *, is_folder: bool = False) -> bool:
        """Whether --include names this path, which is relative to the folder that was asked for."""
        return self._include.match(path, is_folder=is_folder)

    def excluded_by(self, path: str, *, is_folder: bool, parent: str) -> str | None:
        """The pattern or the name on the list because of which a relative path is passed over; None if it is not.

        `parent` is the name of the folder that it lies in.
        """
        if self._include and self.includes(path, is_folder=is_folder):
            return None
        if self._exclude and (pattern := self._exclude.first(path, is_folder=is_folder)) is not None:
            return pattern
        return _on_list(PurePath(path).name, parent) if is_folder else None


def _on_list(name: str, parent: str) -> str | None:
    if (known := _NAMES.get(name.lower())) is not None:
        return known
    if name in EXCLUDED_IN_LIBRARIES and parent.lower().endswith(LIBRARIES):
        return f"{name} of a photo library"
    return next((f"*{suffix}" for suffix in EXCLUDED_SUFFIXES if name.lower().endswith(suffix)), None)


class _Patterns:
    """Several glob patterns as regular expressions."""

    def __init__(self, patterns: Iterable[str], flag: str) -> None:
        self._each = []
        for pattern in patterns:
            if not pattern.strip("/"):
                raise ValueError(f"{flag} {pattern!r} is an empty pattern: give one such as '*.png' or 'Trash/'")
            bare = pattern.rstrip("/")
            expression = re.compile(_translated(bare.lstrip("/")), re.IGNORECASE | re.DOTALL)
            self._each.append((pattern, expression, "/" in bare, pattern.endswith("/")))

    def __bool__(self) -> bool:
        return bool(self._each)

    def match(self, path: str, *, is_folder: bool) -> bool:
        return self.first(path, is_folder=is_folder) is not None

    def first(self, path: str, *, is_folder: bool) -> str | None:
        name = path.rpartition("/")[2]
        for pattern, expression, has_slash, folders_only in self._each:
            if (is_folder or not folders_only) and expression.fullmatch(path if has_slash else name):
                return pattern
        return None


_TOKEN = re.compile(
    r"(?P<deep>\*\*/)|(?P<all>\*\*)|(?P<star>\*)|(?P<one>\?)|\[(?P<not>[!^]?)(?P<set>\]?[^\]]*)\]|\\(?P<plain>.)"
)


def _translated(pattern: str) -> str:
    """A glob pattern as a regular expression."""

    def one(found: re.Match[str]) -> str:
        if found["set"] is not None:
            escaped = found["set"].replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
            return f"[{'^/' if found['not'] else ''}{escaped}]"
        if found["plain"] is not None:
            return re.escape(found["plain"])
        return {"deep": "(?:.*/)?", "all": ".*", "star": "[^/]*", "one": "[^/]"}[str(found.lastgroup)]

    parts, end = [], 0
    for found in _TOKEN.finditer(pattern):
        parts += [re.escape(pattern[end : found.start()]), one(found)]
        end = found.end()
    return "".join([*parts, re.escape(pattern[end:])])
