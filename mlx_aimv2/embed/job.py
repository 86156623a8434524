"""Brings an index up to date with the images that are there now: list, compare, embed, write, export."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_aimv2.backend.device import is_slow_here
from mlx_aimv2.config import dtype_name
from mlx_aimv2.embed.distributed import RankLostError, Ranks, my_chunks
from mlx_aimv2.embed.encode import FAST, Embedder, Result, Settings
from mlx_aimv2.embed.provenance import differences, made_by
from mlx_aimv2.embed.update import Plan, Update, make_plan
from mlx_aimv2.images import Policy
from mlx_aimv2.images.find import SUFFIXES, Listing, is_under, list_images, read_list
from mlx_aimv2.index.export import export, target
from mlx_aimv2.index.reader import is_empty
from mlx_aimv2.index.writer import IndexWriter

Report = Callable[[str], None]
"""Takes a sentence about an image that failed or a folder without images."""

OnProgress = Callable[[int, int], None]
"""Takes how many images are done and how many there are to do."""


@dataclass(frozen=True)
class Summary:
    """What an update did, in images.

    `recognised` have the content of an entry of the index, and `moved` took over one whose file is gone; `kept`
    are in the index while their files are not there but may come back, `gone` were forgotten. `passed_over` counts, by
    suffix or by the pattern or name that excluded them, files and folders that were not looked at. `is_made` is False
    where there is no index, as nothing could be embedded.
    """

    images: int
    embedded: int
    recognised: int
    moved: int
    unchanged: int
    kept: int
    gone: int
    failed: int
    passed_over: dict[str, int]
    is_made: bool


@dataclass(frozen=True)
class Options:
    """How an index is brought up to date.

    `threads` decode, by default one for each core; `policy` says how images are read. `store` is the dtype of the
    vectors in a new index, float16 or float32; `export` writes everything beside the index too (npz, safetensors or
    jsonl), where `overwrite` lets it replace what is no export. `exclude` and `include` are glob patterns
    (`exclude.Rules`). Images whose files may come back, on a drive that is not plugged in, stay in the index unless
    `prune` is set.
    """

    threads: int | None = None
    policy: Policy = FAST
    store: str | None = None
    export: str | None = None
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    prune: bool = False
    overwrite: bool = False


def update_index(
    paths: Iterable[str],
    output: Path,
    settings: Settings,
    options: Options,
    *,
    report: Report = warnings.warn,
    on_progress: OnProgress = lambda done, total: None,
) -> Summary | None:
    """Embeds what is new or changed and forgets what was deleted: `files, folders, patterns -> Summary`.

    A file is one file, however its name is spelled, and keeps its vector when it is renamed or moved. `-` among the
    paths reads names from stdin. Where the settings say nothing, an index that exists keeps its own.

    Under mlx.launch all ranks share the work and rank 0 alone returns a summary. Images that fail go to `report`, notes
    are warnings. Raises ValueError or OSError for what cannot be done, ConnectionError where another rank is gone; what
    was done until then is kept.
    """
    for name, count in (("--threads", options.threads), ("--max-patches", settings.max_patches)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    ranks = Ranks()
    job = _Job(output, ranks, options, report, on_progress)
    try:
        return _run(job, ranks, paths, settings)
    except RankLostError as error:
        kept = f"; {job.kept()}" if ranks.rank == 0 else ""
        raise RankLostError(f"rank {ranks.rank}: {error}{kept}; run it again to go on") from None
    except KeyboardInterrupt as stop:
        stop.args = (*(stop.args or ("stopped",)), f"{job.kept()}; run it again to go on")
        raise
    finally:
        if job.index is not None:
            job.index.close()


def _run(job: _Job, ranks: Ranks, paths: Iterable[str], given: Settings) -> Summary | None:
    prepared = ranks.first(lambda: job.prepare(paths, given))
    settings, plan = Settings(**prepared["settings"]), Plan(**prepared["plan"])
    embedder = Embedder.load(settings, job.options.policy)
    if plan.chunks and ranks.rank == 0 and is_slow_here(embedder.loaded.model.dtype):
        job.report(
            f"note: MLX computes {dtype_name(embedder.loaded.model.dtype)} slowly on a CPU; --dtype auto takes float32"
        )
    digest = ranks.first(lambda: job.agree(embedder.description))
    if digest != embedder.description["weights"]["digest"]:
        raise ValueError(f"rank {ranks.rank} found other weights at {settings.model} than rank 0: make them equal")
    update = Update(plan, job.index, lambda: job.create(embedder.description, embedder.pooling.axes))
    try:
        for mine in embedder(my_chunks(plan.chunks, ranks), known=plan.known, threads=job.options.threads):
            for result in ranks.gather(mine):
                if ranks.rank == 0:
                    job.take(result, update)
        ranks.first(lambda: job.finish(update))
    except RankLostError:
        update.commit()
        raise
    except RuntimeError as error:  # MLX's own: no memory on the device, most likely
        update.commit()
        raise OSError(f"MLX could not go on: {error}; what was done is kept") from None
    except KeyboardInterrupt:
        update.commit()
        raise
    return job.summary(update) if ranks.rank == 0 else None


@dataclass
class _Job:
    """What rank 0 does alone: list, compare, write, report."""

    output: Path
    ranks: Ranks
    options: Options
    report: Report
    on_progress: OnProgress
    index: IndexWriter | None = None
    failed: int = 0
    done: int = 0
    export_to: Path | None = None
    passed_over: dict[str, int] = field(default_factory=dict)

    def kept(self) -> str:
        """What a run that ends too early leaves."""
        count = len(self.index) if self.index is not None else 0
        return f"{self.output} keeps {count:,} images" if count else "nothing is stored yet"

    def prepare(self, paths: Iterable[str], given: Settings) -> dict[str, Any]:
        """The settings and the plan, for all ranks."""
        self._check_output()
        settings = self._settings(given)
        listing = self._list(paths)
        self._check_export(listing.files)  # once more, now that the images are known
        plan = make_plan(listing, self.index, prune=self.options.prune)
        self.passed_over = listing.passed_over
        return {"settings": asdict(settings), "plan": asdict(plan)}

    def _check_output(self) -> None:
        folder = self.output.absolute().parent
        if self.output.exists() and (self.output.is_dir() or not is_empty(self.output)):
            self.index = IndexWriter.open(self.output)
            if not os.access(self.output, os.W_OK):
                raise PermissionError(f"{self.output} cannot be written to")
        elif not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: make that folder first, or choose another -o")
        if not os.access(folder, os.W_OK):  # for the journal, even where the index exists
            raise PermissionError(f"{folder} cannot be written to: choose another -o")
        self._check_export(self.index.paths() if self.index is not None else ())

    def _check_export(self, inputs: Iterable[str]) -> None:
        """Notes where the export goes, if one is wanted; none of the inputs is replaced."""
        if (kind := self.options.export) is not None:
            self.export_to = target(self.output, kind, overwrite=self.options.overwrite, inputs=inputs)

    def _settings(self, given: Settings) -> Settings:
        """The given settings and, where they say nothing, those of the index."""
        if self.index is None:
            if given.model is None:
                raise ValueError(f"{self.output} does not exist yet: say with which model to make it, -m MODEL")
            return given
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
                raise ValueError("- does not go with mlx.launch, which never ends its stdin: give folders or files")
            else:
                names += read_list(sys.stdin.buffer.read())
        listing = list_images(names, exclude=self.options.exclude, include=self.options.include)
        for path in listing.empty:
            kept = f"; what {self.output} holds of it stays" if self.index is not None else ""
            self.report(f"no images in {path}{kept}")
        missing = [path for path in listing.missing if not (self.options.prune and self._holds(path))]
        self._fail([(path, "does not exist") for path in missing])
        self._fail(listing.problems)
        if not listing.files and not listing.problems and not self.options.prune:
            raise FileNotFoundError(f"no images found: looked for names that end in {' '.join(SUFFIXES)}")
        return listing

    def _holds(self, given: str) -> bool:
        """Whether the index has anything at a path or below it."""
        path = os.path.normpath(Path(given).absolute())
        return self.index is not None and any(known == path or is_under(known, [path]) for known in self.index.paths())

    def agree(self, description: dict[str, Any]) -> str:
        """Refuses to mix embeddings that cannot be compared; returns the digest of the weights."""
        refused, notes = differences(self.index.provenance, description) if self.index is not None else ([], [])
        if refused:
            raise ValueError(
                f"{self.output} was made with other settings, so new embeddings could not be compared with it: "
                f"{'; '.join(refused)}. Use the same settings or another -o"
            )
        if notes:
            warnings.warn(
                f"the new images are embedded a little differently from those in {self.output} "
                f"({'; '.join(notes)}): leave -m and --dtype out to keep its settings",
                stacklevel=1,
            )
        return str(description["weights"]["digest"])

    def create(self, description: dict[str, Any], axes: int) -> IndexWriter:
        """Makes the index, when the first embeddings are there."""
        dtype, width = self.options.store or "float16", description["width"]
        try:
            self.index = IndexWriter.create(self.output, provenance=description, width=width, axes=axes, dtype=dtype)
        except FileExistsError:
            raise FileExistsError(f"another mlx-aimv2 embed made {self.output} meanwhile: run it again") from None
        return self.index

    def take(self, result: Result, update: Update) -> None:
        """Reports failures and notes, and passes the embeddings on."""
        self._fail(result.failures)
        for path, _ in result.failures:
            update.fail(path)
        for path, note in result.notes:
            warnings.warn(f"{path} {note}", stacklevel=1)
        update.take(result.embeddings)
        self.done += len(result.embeddings) + len(result.failures)
        self.on_progress(self.done, update.plan.images)

    def finish(self, update: Update) -> bool:
        """Writes what is left and the export, and says which images have no file."""
        update.finish()
        if kept := update.kept:
            self.report(
                f"{len(kept):,} of the images in {self.output} {'has' if len(kept) == 1 else 'have'} no file now, such "
                f"as {kept[0]}: kept, as a drive may be unplugged or iCloud may hold the file; --prune forgets what is "
                "not there"
            )
        if self.export_to is not None and self.index is not None:
            export(self.index, self.export_to, kind=self.export_to.suffix[1:])
        return True

    def summary(self, update: Update) -> Summary:
        """What was done."""
        return Summary(
            images=len(self.index) if self.index is not None else 0,
            embedded=update.embedded,
            recognised=update.copied,
            moved=update.moved,
            unchanged=update.plan.unchanged,
            kept=len(update.kept),
            gone=update.gone,
            failed=self.failed,
            passed_over=self.passed_over,
            is_made=self.index is not None,
        )

    def _fail(self, failures: list[tuple[str, str]]) -> None:
        for path, reason in failures:
            self.failed += 1
            self.report(f"{path} {reason}")
