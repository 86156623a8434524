"""Plans what is to be embedded, and puts embeddings into the index so that an interrupted run loses little.

Plan: what is new or changed, what is gone. Update: chunks of embeddings go into the index whole, a few times a second.
A file whose content the index has under its own or under a vanished name keeps its vector and is not decoded: where the
old name is gone, wherever it was, the entry moves to the new one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_aimv2.embed.loader import split_into_chunks
from mlx_aimv2.files import stat_of
from mlx_aimv2.images.find import Listing, identity, is_gone, is_under
from mlx_aimv2.index.reader import Embedding, Index, Stamp
from mlx_aimv2.index.writer import Copy, IndexWriter

COMMIT_SECONDS = 0.5
COMMIT_IMAGES = 1024
"""Work is put on disk when it is this old or this much, at the end of a chunk."""


@dataclass
class Plan:
    """What there is to do, in types that JSON holds.

    `chunks` of the whole list, each without the images that are up to date, empty ones left out; `changed` the digests
    (hexadecimal) that the index has for names that must be read again; `vanished` the names in the index that no file
    has any more, by digest, for every digest that a file to be read may have; `gone` the names to forget; `kept` those
    whose files are not there and may come back.
    """

    chunks: list[list[str]] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    vanished: dict[str, list[str]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unchanged: int = 0

    def known(self, path: str, sha256: bytes) -> bool:
        """Whether the index has the embedding of this content under this name or under a vanished one."""
        digest = sha256.hex()
        return self.changed.get(path) == digest or digest in self.vanished

    @property
    def images(self) -> int:
        """How many images must be read."""
        return sum(len(chunk) for chunk in self.chunks)


def make_plan(listing: Listing, index: Index | None, *, prune: bool = False) -> Plan:
    """Compares the files with the index by size and time of change; with `prune` all that is not there is forgotten.

    A file that the index has under another name (a link, another letter case) keeps that name.
    """
    plan = Plan()
    stamps = dict(index.stamps()) if index is not None else {}
    files = _by_known_names(listing.files, stamps)
    sizes: set[int] = set()
    for chunk in split_into_chunks(files):  # cut before anything is left out: a batch is the same in every run
        if todo := [path for path in chunk if not _is_current(path, stamps.get(path), plan, sizes)]:
            plan.chunks.append(todo)
    present = set(files)
    missing = [path for path in stamps if path not in present and is_gone(path)]
    for path in missing:
        if stamps[path].size in sizes:
            plan.vanished.setdefault(stamps[path].sha256.hex(), []).append(path)
    _forget(missing, listing, plan, prune=prune)
    return plan


def _by_known_names(files: list[str], stamps: Mapping[str, Stamp]) -> list[str]:
    """The same files, those that the index has under another name by that name."""
    new = [path for path in files if path not in stamps]
    if not new or not stamps:
        return files
    present = set(files)
    known = {identity(path, about): path for path in stamps if path not in present and (about := stat_of(path))}
    found = {path: identity(path, about) for path in new if (about := stat_of(path))}
    same = {path: known[one] for path, one in found.items() if one in known}
    return sorted({same.get(path, path) for path in files}, key=os.fsencode) if same else files


def _is_current(path: str, stamp: Stamp | None, plan: Plan, sizes: set[int]) -> bool:
    if (about := stat_of(path)) is None:
        return False  # decoding will say why
    if stamp is not None and (about.st_size, about.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
        plan.unchanged += 1
        return True
    if stamp is not None:
        plan.changed[path] = stamp.sha256.hex()
    sizes.add(about.st_size)
    return False


def _forget(missing: list[str], listing: Listing, plan: Plan, *, prune: bool) -> None:
    """Divides the names whose files are not there, among what was asked for, into those to forget and those to keep.

    A file is taken for deleted if the folder that it was in is there and holds anything else. An empty folder may be
    the mount point of a drive that is not plugged in, and a missing one may come back with its drive.
    """
    asked = [os.path.normpath(Path(path).absolute()) for path in listing.missing]
    folders = [*listing.roots, *listing.empty, *asked]
    holds_something: dict[str, bool] = {}
    for path in missing:
        if not is_under(path, folders) and path not in asked:
            continue
        folder = os.path.dirname(path)  # noqa: PTH120 - a Path would cost more
        if folder not in holds_something:
            holds_something[folder] = _holds_something(folder)
        if prune or (holds_something[folder] and path not in listing.evicted):
            plan.gone.append(path)
        else:
            plan.kept.append(path)


def _holds_something(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(not entry.name.startswith(".") for entry in entries)
    except OSError:
        return False


class Update:
    """Embeddings on their way into the index, which is made when the first of them comes."""

    def __init__(self, plan: Plan, index: IndexWriter | None, create: Callable[[], IndexWriter]) -> None:
        self.plan = plan
        self.index = index
        self.create = create
        self.embedded = self.copied = self.moved = self.gone = 0
        self._pending: list[Embedding | Copy] = []
        self._stale: list[str] = []
        self._moved: dict[str, str] = {}
        self._committed = time.monotonic()

    def take(self, chunk: Sequence[Embedding]) -> None:
        """Takes the embeddings of one chunk."""
        for item in chunk:
            if item.vector.size:
                self._pending.append(item)
                self.embedded += 1
            else:
                self._pending.append(self._known(item))
        age = time.monotonic() - self._committed
        if age > COMMIT_SECONDS or len(self._pending) >= COMMIT_IMAGES:
            self.commit()

    def fail(self, path: str) -> None:
        """An image that is in the index and can no longer be read as it is now does not stay there."""
        if path in self.plan.changed:
            self._stale.append(path)

    def commit(self) -> None:
        """Puts on disk what was taken so far."""
        if self._pending and self.index is None:
            self.index = self.create()
        if self.index is not None and self._pending:
            self.index.add(self._pending)
        if self.index is not None and self._stale:
            self.gone += self.index.remove(self._stale)
        self._pending, self._stale = [], []
        self._committed = time.monotonic()

    def finish(self) -> None:
        """The last commit, after which the images that are gone are gone from the index too."""
        self.commit()
        if self.index is not None and self.plan.gone:
            self.gone += self.index.remove(path for path in self.plan.gone if path not in self._moved)

    @property
    def kept(self) -> list[str]:
        """Images in the index whose files are neither there nor moved, and may come back."""
        return [path for path in self.plan.kept if path not in self._moved]

    def _known(self, item: Embedding) -> Copy:
        """How a file whose content is in the index gets its vector: from its own entry, or from a vanished one."""
        digest = item.sha256.hex()
        if self.plan.changed.get(item.path) == digest:
            self.copied += 1
            return Copy(item.path, item.size, item.mtime_ns, item.path)
        names = self.plan.vanished[digest]
        if (old := next((name for name in names if name not in self._moved), None)) is not None:
            self._moved[old] = item.path
            self.moved += 1
            return Copy(item.path, item.size, item.mtime_ns, old, is_move=True)
        self.copied += 1
        return Copy(item.path, item.size, item.mtime_ns, self._moved[names[0]])
