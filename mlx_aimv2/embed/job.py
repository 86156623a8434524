"""Brings an index up to date with the images on disk: list, compare, embed, write, export.

What is new, changed or gone is planned first. Then complete chunks of embeddings go into the index, a few times a
second, so an interrupted run loses little. A file whose content the index has under its own or a vanished name keeps
its vector and is read but not decoded: if the old name is gone, wherever it was, the entry moves to the new one.
"""

from __future__ import annotations

import glob
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from mlx_aimv2.backend.device import AUTO, slow_here
from mlx_aimv2.config import LIT_CHECKPOINT
from mlx_aimv2.embed.cache import differences
from mlx_aimv2.embed.distributed import RankLostError, Ranks, my_chunks
from mlx_aimv2.embed.encode import POOLS, Embedder, Result, Settings, made_by
from mlx_aimv2.embed.loader import split_into_chunks
from mlx_aimv2.files import expand_user, stat_of
from mlx_aimv2.images import FAST, Policy
from mlx_aimv2.images.find import Listing, identity, is_gone, is_under, list_images, read_list
from mlx_aimv2.index.export import export, target
from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.index.schema import is_free
from mlx_aimv2.index.writer import Copy, IndexWriter

COMMIT_SECONDS = 0.5
COMMIT_IMAGES = 1024
"""Work is written to disk when it is this old or this much, at the end of a chunk."""


@dataclass(frozen=True)
class Options:
    """How an index is brought up to date.

    `threads` decode, by default one per core. `store` is the dtype of the vectors in a new index, float16 or float32;
    `export` (npz, safetensors or jsonl) goes next to the index and replaces a file that is not an export only with
    `overwrite`. `exclude` and `include` are `find.Rules`. Images whose files may come back, on an unplugged drive,
    stay in the index unless `prune` is set.
    """

    threads: int | None = None
    policy: Policy = FAST
    store: str | None = None
    export: str | None = None
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    prune: bool = False
    overwrite: bool = False


@dataclass
class Summary:
    """What an update did, in images.

    `recognised` have the content of an existing entry, and `moved` took over one whose file is gone; `kept` are in the
    index although their files are missing, since they may come back; `gone` were dropped. `passed_over` counts what was
    skipped (`Listing.skipped`). `is_made` is False if there is no index, because nothing could be embedded.
    """

    images: int = 0
    embedded: int = 0
    recognised: int = 0
    moved: int = 0
    unchanged: int = 0
    kept: int = 0
    gone: int = 0
    failed: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    is_made: bool = False


@dataclass
class Plan:
    """The work to do, in JSON types.

    `chunks` of the list without what is up to date; `changed` names to be read again, with the index's digest of each
    in hexadecimal; `vanished` names in the index without a file, by digest, if a file to be read may have that
    content; `gone` names to drop; `kept` those whose files may come back; `undated` unchanged ones that are read again
    because an earlier release recorded too little about them, with their digests.
    """

    chunks: list[list[str]] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    vanished: dict[str, list[str]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unchanged: int = 0
    undated: dict[str, str] = field(default_factory=dict)

    def known(self, path: str, sha256: bytes) -> bool:
        """Whether the index has the embedding of this content under this or a vanished name."""
        digest = sha256.hex()
        return digest in (self.changed.get(path), self.undated.get(path)) or digest in self.vanished


def make_plan(listing: Listing, index: Index | None, *, prune: bool = False) -> Plan:
    """Compares the files with the index by their recorded state; with `prune` everything missing is dropped.

    A file that the index has under another name (a link, another letter case) keeps that name, and an entry whose name
    has become a link to that file is dropped. A requested file that is missing counts as deleted if its folder exists
    and contains anything else. An empty folder may be the mount point of an unplugged drive, and a missing one may
    come back with it.
    """
    plan = Plan()
    stamps = index.stamps() if index is not None else {}
    files = _by_known_names(listing.files, stamps)
    sizes: set[int] = set()
    for chunk in split_into_chunks(files):  # split before anything is left out: batches are the same in every run
        todo = []
        for path in chunk:
            stamp, about = stamps.get(path), stat_of(path)
            if about is not None:  # otherwise decoding will say why
                if stamp is not None and stamp.fits(about):
                    plan.unchanged += 1
                    if None not in (stamp.ctime_ns, stamp.taken):
                        continue
                    plan.undated[path] = stamp.sha256.hex()
                elif stamp is not None:
                    plan.changed[path] = stamp.sha256.hex()
                sizes.add(about.st_size)
            todo.append(path)
        if todo:
            plan.chunks.append(todo)
    present, reached = set(files), cache(lambda: _identities(files))
    asked = [_absolute(path) for path in listing.missing]
    folders = [*listing.roots, *listing.empty, *asked]
    holds_something = cache(_holds_something)
    for path in stamps:
        if path in present:
            continue
        about, stamp = stat_of(path), stamps[path]
        is_other = (
            about is not None
            and (stamp.ctime_ns is None or not stamp.fits(about))
            and identity(path, about) in reached()
        )
        if not is_other and not is_gone(path):
            continue
        if stamp.size in sizes:
            plan.vanished.setdefault(stamp.sha256.hex(), []).append(path)
        if not is_under(path, folders) and path not in asked and not is_other:
            continue
        folder = os.path.dirname(path)  # noqa: PTH120 - a Path would cost more
        is_deleted = is_other or (path not in listing.evicted and holds_something(folder))
        (plan.gone if prune or is_deleted else plan.kept).append(path)
    return plan


def _by_known_names(files: list[str], stamps: Mapping[str, Embedding]) -> list[str]:
    """The same files, under the index's name where it differs."""
    new = [path for path in files if path not in stamps]
    if not new or not stamps:
        return files
    known = _identities(stamps.keys() - set(files))
    same = {path: known[one] for one, path in _identities(new).items() if one in known}
    return sorted({same.get(path, path) for path in files}, key=os.fsencode) if same else files


def _identities(paths: Iterable[str]) -> dict[tuple[int, int] | str, str]:
    return {identity(path, about): path for path in paths if (about := stat_of(path))}


def _holds_something(folder: str) -> bool:
    with suppress(OSError), os.scandir(folder) as entries:
        return any(not entry.name.startswith(".") for entry in entries)
    return False


def _absolute(path: str) -> str:
    return os.path.normpath(expand_user(path).absolute())


def update_index(
    paths: Iterable[str],
    output: Path,
    settings: Settings,
    options: Options,
    *,
    report: Callable[[str], None] = warnings.warn,
    on_progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
) -> Summary | None:
    """Embeds new and changed images and drops deleted ones: `files, folders, patterns -> Summary`.

    `-` among the paths reads names from stdin. Settings that are None stay as an existing index has them. Under
    mlx.launch all ranks share the work and only rank 0 returns a summary. Sentences about images that fail and folders
    without images go to `report`, notes are warnings; `on_progress` takes the images done, their total, and the unit.
    Raises ValueError or OSError for what cannot be done, ConnectionError if another rank is gone; finished work is
    kept.
    """
    for name, count in (("--threads", options.threads), ("--max-patches", settings.max_patches)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    ranks = Ranks()
    job = _Job(output, options, ranks, report, on_progress)
    try:
        prepared = ranks.first(lambda: job.prepare(paths, settings))
        is_default = settings == Settings()
        settings, plan = Settings(**prepared["settings"]), Plan(**prepared["plan"])
        if plan.chunks or not is_default:  # otherwise there is nothing for a model to do or refuse
            embedder = Embedder.load(settings, options.policy)
            if ranks.first(lambda: job.agree(embedder)) != embedder.description["weights"]["digest"]:
                raise ValueError(f"rank {ranks.rank} found different weights at {settings.model} than rank 0")
            for mine in embedder(my_chunks(plan.chunks, ranks), known=plan.known, threads=options.threads):
                several = map(Result.unpacked, ranks.gather(mine.packed())) if ranks.size > 1 else [mine]
                for result in several if ranks.rank == 0 else ():
                    job.take(result)
        ranks.first(job.finish)
        return job.summary if ranks.rank == 0 else None
    except RankLostError as error:
        kept = f"; {job.kept()}" if ranks.rank == 0 else ""
        raise RankLostError(f"rank {ranks.rank}: {error}{kept}; run it again to continue") from None
    except RuntimeError as error:  # MLX's own: no memory on the device, most likely
        job.commit()
        raise OSError(f"MLX could not continue: {error}; finished work is kept") from None
    except KeyboardInterrupt as stop:
        stop.args = (*(stop.args or ("stopped",)), f"{job.kept()}; run it again to continue")
        raise
    finally:
        if job.index is not None:
            job.index.close()


@dataclass
class _Job:
    """Rank 0's part: list, compare, write, report. The index is created when the first embeddings arrive."""

    output: Path
    options: Options
    ranks: Ranks
    report: Callable[[str], None]
    on_progress: Callable[[int, int, str], None]
    index: IndexWriter | None = None
    plan: Plan = field(default_factory=Plan)
    summary: Summary = field(default_factory=Summary)
    made: dict[str, Any] = field(default_factory=dict)
    """What the index records about the model."""
    sources: dict[str, Any] = field(default_factory=dict)
    """What to remember: folders and patterns, which may get new images, and their flags; None to drop one."""
    done: int = 0
    pending: list[Embedding | Copy] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    """Images in the index that can no longer be read as they are now."""
    moved: dict[str, str] = field(default_factory=dict)
    """Vanished name -> the one that has taken over its entry."""
    committed: float = field(default_factory=time.monotonic)

    def prepare(self, paths: Iterable[str], given: Settings) -> dict[str, Any]:
        """The settings and the plan, for all ranks."""
        self._check_output()
        settings = self._settings(given)
        listing = self._list(paths)
        self._export_to(listing.files)  # once more, now that the images are known
        self.plan = make_plan(listing, self.index, prune=self.options.prune)
        self.summary.passed_over, self.summary.unchanged = listing.skipped, self.plan.unchanged
        return {"settings": asdict(settings), "plan": asdict(self.plan)}

    def _check_output(self) -> None:
        folder = self.output.absolute().parent
        if not is_free(self.output):
            self.index = IndexWriter.open(self.output)
            if not os.access(self.output, os.W_OK):
                raise PermissionError(f"{self.output} is not writable")
        elif not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: create it first, or choose another -o")
        if not os.access(folder, os.W_OK):  # for the journal, even where the index exists
            raise PermissionError(f"{folder} is not writable: choose another -o")
        self._export_to(self.index.paths() if self.index is not None else ())

    def _export_to(self, inputs: Iterable[str] = ()) -> Path | None:
        """Where the export goes, if requested; the inputs are never replaced."""
        kind = self.options.export
        return target(self.output, kind, overwrite=self.options.overwrite, inputs=inputs) if kind else None

    def _settings(self, given: Settings) -> Settings:
        """The given settings, with those of the index where they are None."""
        if self.index is None:
            if given.model is None:
                raise ValueError(f"{self.output} does not exist yet: choose a model, for example -m {LIT_CHECKPOINT}")
            return replace(given, dtype=given.dtype or AUTO)
        stored = made_by(self.index)
        if self.options.store not in (None, self.index.dtype):
            raise ValueError(f"{self.output} stores {self.index.dtype}: leave --store out, or choose another -o")
        return given.filled(stored)

    def _list(self, paths: Iterable[str]) -> Listing:
        names: list[str] = []
        for path in paths:
            if path != "-":
                names.append(path)
            elif self.ranks.size > 1:
                raise ValueError("- does not work with mlx.launch, whose stdin never ends: give folders or files")
            else:
                names += read_list(sys.stdin.buffer.read())
        options = self.options
        flags = {"exclude": [*options.exclude], "include": [*options.include], "policy": asdict(options.policy)}
        # A Path would raise for a name that no file can have.
        may_grow = [name for name in names if glob.has_magic(name) or os.path.isdir(expand_user(name))]  # noqa: PTH112
        self.sources = dict.fromkeys(map(_absolute, may_grow), flags)
        listing = list_images(names, exclude=options.exclude, include=options.include)
        if not self.options.prune:
            listing.check_any()
        for path in listing.empty:
            is_kept = self.index is not None and not self.options.prune
            self.report(f"no images in {path}{f'; its images in {self.output} are kept' if is_kept else ''}")
        gone = [path for path in listing.missing if self.options.prune and self._holds(path)]
        self.sources |= dict.fromkeys(map(_absolute, gone))
        self._fail([(path, "does not exist") for path in listing.missing if path not in gone])
        self._fail(listing.problems)
        return listing

    def _holds(self, given: str) -> bool:
        """Whether the index has anything at or below a path, or was made from it."""
        path, index = _absolute(given), self.index
        known = (*index.sources, *index.paths()) if index is not None else ()
        return any(one == path or is_under(one, [path]) for one in known)

    def agree(self, embedder: Embedder) -> str:
        """Refuses to mix embeddings that cannot be compared; returns the digest of the weights."""
        self.made = description = embedder.description
        refused, notes = differences(self.index.provenance if self.index is not None else description, description)
        if refused:
            raise ValueError(
                f"{self.output} was made with other settings, so new embeddings could not be compared with it: "
                f"{'; '.join(refused)}. Use the same settings or another -o"
            )
        if notes:
            warnings.warn(
                f"the new images are embedded a little differently from those in {self.output} "
                f"({'; '.join(notes)}): leave out -m and --dtype to keep its settings",
                stacklevel=1,
            )
        if self.plan.chunks and (slow := slow_here(embedder.loaded.model.dtype)) is not None:
            warnings.warn(slow, stacklevel=1)
        self.on_progress(0, sum(len(chunk) for chunk in self.plan.chunks), "images")
        return str(description["weights"]["digest"])

    def take(self, result: Result) -> None:
        """Reports failures and notes, and takes the embeddings of one chunk."""
        self._fail(result.failures)
        self.stale += [path for path, _ in result.failures if path in self.plan.changed]
        for path, note in result.notes:
            warnings.warn(f"{path} {note}", stacklevel=1)
        for item in result.embeddings:
            self.pending.append(item if item.vector.size else self._known(item))
            self.summary.embedded += item.vector.size > 0
        if time.monotonic() - self.committed > COMMIT_SECONDS or len(self.pending) >= COMMIT_IMAGES:
            self.commit()
        self.done += len(result.embeddings) + len(result.failures)
        self.on_progress(self.done, sum(len(chunk) for chunk in self.plan.chunks), "images")

    def _known(self, item: Embedding) -> Copy:
        """How a file with known content gets its vector: from its own entry, or from a vanished one."""
        digest, source = item.sha256.hex(), item.path
        if self.plan.undated.get(source) == digest:
            return Copy(item, source, is_move=True)
        if self.plan.changed.get(item.path) != digest:
            names = self.plan.vanished[digest]
            if (old := next((name for name in names if name not in self.moved), None)) is not None:
                self.moved[old] = item.path
                self.summary.moved += 1
                return Copy(item, old, is_move=True)
            source = self.moved[names[0]]
        self.summary.recognised += 1
        return Copy(item, source)

    def commit(self) -> None:
        """Writes everything taken so far to disk."""
        if self.pending and self.index is None:
            made, dtype = self.made, self.options.store or "float16"
            shape = {"width": made["width"], "axes": POOLS[made["pool"]]}
            try:
                self.index = IndexWriter.create(self.output, provenance=made, dtype=dtype, **shape)
            except FileExistsError:
                raise FileExistsError(f"another mlx-aimv2 embed created {self.output}: run it again") from None
        if self.index is not None and self.pending:
            self.index.add(self.pending)
        if self.index is not None and self.stale:
            self.summary.gone += self.index.remove(self.stale)
        if self.index is not None and not self.sources.items() <= self.index.sources.items():
            self.index.remember(self.sources)
        self.pending, self.stale = [], []
        self.committed = time.monotonic()

    def kept(self) -> str:
        """Writes everything taken so far to disk, and says what an interrupted run leaves."""
        self.commit()
        count = len(self.index) if self.index is not None else 0
        return f"{self.output} keeps {count:,} images" if count else "nothing is stored yet"

    def finish(self) -> bool:
        """Writes the rest and the export, drops what is gone, and says which images have no file."""
        self.commit()
        if kept := [path for path in self.plan.kept if path not in self.moved]:
            self.report(
                f"{len(kept):,} of the images in {self.output} {'has' if len(kept) == 1 else 'have'} no file now, such "
                f"as {kept[0]}: kept, as a drive may be unplugged or iCloud may hold the file; --prune drops them"
            )
        self.summary.kept = len(kept)
        if self.index is not None:
            if self.plan.gone:
                self.summary.gone += self.index.remove(path for path in self.plan.gone if path not in self.moved)
            if (to := self._export_to()) is not None:
                export(self.index, to, kind=to.suffix[1:])
            self.summary.images, self.summary.is_made = len(self.index), True
        return True

    def _fail(self, failures: list[tuple[str, str]]) -> None:
        for path, reason in failures:
            self.summary.failed += 1
            self.report(f"{path} {reason}")
