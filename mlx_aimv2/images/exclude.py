"""Knows what a scan of folders passes over: what file servers and photo programs add, and what the user excludes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath, PurePosixPath
from typing import Any

from pathspec import GitIgnoreSpec

EXCLUDED_FOLDERS = (
    *("@eaDir", "@tmp", "#recycle", "#snapshot"),  # thumbnails, temporary files, bin and snapshots of a Synology NAS
    *("@__thumb", "@Recycle", "@Recently-Snapshot"),  # those of a QNAP NAS
    *("$RECYCLE.BIN", "RECYCLER", "System Volume Information"),  # Windows' own
    "__MACOSX",  # resource forks in a zip archive from a Mac
    "lost+found",  # fragments that a file system check found
)
"""Folders that are passed over wherever they lie. Hidden names, such as .Trashes, always are."""

OWN_FILES = (
    ("head.json",),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
    ("state.safetensors",),
)
"""What a folder holds that this package wrote, a head, a model or the state of a run: its pictures are no data."""

OWN = "of mlx-aimv2's own folders"
"""What they are called where they are counted."""

LIBRARIES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary", ".lrlibrary", "iphoto library")
"""How the name of a photo library ends, in lower case."""

EXCLUDED_IN_LIBRARIES = ("resources", "Thumbnails", "Previews", "Caches", "database", "Database", "private", "scopes")
"""Folders directly inside a photo library that hold smaller copies of its images."""

EXCLUDED_SUFFIXES = (".lrdata", ".cocatalogdb")
"""How the name of a folder with a photo program's previews ends."""

_NAMES = {name.lower(): name for name in EXCLUDED_FOLDERS}


class Rules:
    """What is passed over (`exclude`) and what is taken all the same (`include`), as patterns of .gitignore.

    A pattern without a slash is compared with the name of a file or folder at any depth; one with a slash with the path
    below the folder that was asked for; a slash at the end stands for folders alone. Of several patterns the last that
    matches decides, and `!` before one takes back what those before it said. Letter case does not count. An included
    file needs no image's suffix. Raises ValueError for what is no pattern.
    """

    def __init__(self, exclude: Iterable[str] = (), include: Iterable[str] = ()) -> None:
        self._exclude, self._include = _compiled(exclude, "--exclude"), _compiled(include, "--include")

    def includes(self, path: str, *, is_folder: bool = False) -> bool:
        """Whether --include names this path, which is relative to the folder that was asked for."""
        return _last_match(self._include, path, is_folder=is_folder) is not None

    def excluded_by(self, path: str, *, is_folder: bool, parent: str) -> str | None:
        """The pattern or the name on the list because of which a relative path is passed over; None if it is not.

        `parent` is the folder that it lies in.
        """
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
    """Each pattern with pathspec's reading of it, in lower case."""
    found = []
    for pattern in patterns:
        # "#recycle" is a name here: a line of .gitignore would be a comment.
        line = f"\\{pattern}" if pattern.startswith("#") else pattern
        try:
            rules = GitIgnoreSpec.from_lines([line.lower()]).patterns if pattern.strip("/! ") else []
        except (ValueError, re.error):
            rules = []
        if not rules or rules[0].include is None:
            raise ValueError(f"{flag} {pattern!r} is no pattern: give one such as '*.png' or 'Trash/'")
        found.append((pattern, rules[0]))
    return found


def _last_match(rules: list[tuple[str, Any]], path: str, *, is_folder: bool) -> str | None:
    """The pattern that decides about a path; None where none does or it begins with `!`."""
    name = f"{path.lower()}/" if is_folder else path.lower()
    for pattern, rule in reversed(rules):
        found = rule.match_file(name)
        # pathspec marks with this group what is matched because it lies in a folder of that name.
        if found is None or (found.match.groupdict().get("ps_d") and found.match.end("ps_d") < len(name)):
            continue
        return pattern if rule.include else None
    return None


def is_junk(name: str) -> bool:
    """Whether a path in an archive is one that a scan passes over: hidden, as a Mac's `._` files, or on the list."""
    return any(part.startswith(".") or part.lower() in _NAMES for part in PurePosixPath(name).parts)
