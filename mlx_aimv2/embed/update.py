"""Plans what is to be embedded, and puts embeddings into the index so that an interrupted run loses little.

Plan: what is new or changed, what is gone. Update: chunks of embeddings go into the index whole, a few times a second.
A file whose content the index has under its own or under a vanished name keeps its vector and is not decoded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_aimv2.embed.pipeline import split_into_chunks
from mlx_aimv2.find_images import Listing, is_gone, is_under
from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.index.writer import Copy, IndexWriter

COMMIT_SECONDS = 0.5
COMMIT_IMAGES = 1024
"""Work is put on disk when it is this old or this much, at the end of a chunk."""


@dataclass
class Plan:
    """What there is to do, in types that JSON holds.

    `chunks` of the whole list, each without the images that are up to date, empty ones left out; `changed` the
    digests (hexadecimal) that the index has for names that must be read again; `gone` the names that nothing has any
    more, by digest.
    """

    chunks: list[list[str]] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    gone: dict[str, list[str]] = field(default_factory=dict)
    unchanged: int = 0

    def known(self, path: str, sha256: bytes) -> bool:
        """Whether the index has the embedding of this content."""
        digest = sha256.hex()
        return self.changed.get(path) == digest or digest in self.gone

    @property
    def images(self) -> int:
        """How many images must be read."""
        return sum(len(chunk) for chunk in self.chunks)


def make_plan(listing: Listing, index: Index | None) -> Plan:
    """Compares the files with the index by size and time of change."""
    plan = Plan()
    for chunk in split_into_chunks(listing.files):  # cut before anything is left out: a batch is the same in every run
        if todo := [path for path in chunk if not _is_current(path, index, plan)]:
            plan.chunks.append(todo)
    if index is not None:
        present = set(listing.files)
        named = {os.path.normpath(Path(path).absolute()) for path in listing.missing}
        for path in index.paths():
            asked_for = is_under(path, listing.roots) or (path in named and Path(path).parent.is_dir())
            if path not in present and asked_for and is_gone(path) and (stamp := index.stamp(path)) is not None:
                plan.gone.setdefault(stamp.sha256.hex(), []).append(path)
    return plan


def _is_current(path: str, index: Index | None, plan: Plan) -> bool:
    stamp = index.stamp(path) if index is not None else None
    if stamp is None:
        return False
    try:
        about = os.stat(path)  # noqa: PTH116 - a Path would cost more than the call itself
    except OSError:
        return False  # decoding will say why
    if (about.st_size, about.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
        plan.unchanged += 1
        return True
    plan.changed[path] = stamp.sha256.hex()
    return False


class Update:
    """Embeddings on their way into the index, which is made when the first of them comes."""

    def __init__(self, plan: Plan, index: IndexWriter | None, create: Callable[[], IndexWriter]) -> None:
        self.plan = plan
        self.index = index
        self.create = create
        self.embedded = self.copied = self.dropped = 0
        self._pending: list[Embedding | Copy] = []
        self._stale: list[str] = []
        self._committed = time.monotonic()

    def take(self, chunk: Sequence[Embedding]) -> None:
        """Takes the embeddings of one chunk."""
        for item in chunk:
            if item.vector.size:
                self._pending.append(item)
                self.embedded += 1
            else:
                self._pending.append(Copy(item.path, item.size, item.mtime_ns, self._source(item)))
                self.copied += 1
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
            self.dropped += self.index.remove(self._stale)
        self._pending, self._stale = [], []
        self._committed = time.monotonic()

    def finish(self) -> None:
        """The last commit, after which the images that are gone are gone from the index too."""
        self.commit()
        if self.index is not None and self.plan.gone:
            self.dropped += self.index.remove(path for paths in self.plan.gone.values() for path in paths)

    def _source(self, item: Embedding) -> str:
        digest = item.sha256.hex()
        return item.path if self.plan.changed.get(item.path) == digest else self.plan.gone[digest][0]
