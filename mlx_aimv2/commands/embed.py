"""What does `mlx-aimv2 embed` do: bring an index up to date with the images that are there now?"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_aimv2.commands.image_flags import add_policy_arguments, policy_of
from mlx_aimv2.find_images import SUFFIXES, Listing, list_images, read_list, shown
from mlx_aimv2.progress import Progress, say

if TYPE_CHECKING:
    from mlx_aimv2.embed.distributed import Ranks, Result
    from mlx_aimv2.embed.update import Update
    from mlx_aimv2.index.writer import IndexWriter

HELP = "embed folders of images into an index, for search"

DTYPES = ("float32", "float16", "bfloat16", "auto")
POOLS = ("mean", "head", "tokens", "map")
EXPORTS = ("npz", "safetensors", "jsonl")


@dataclass
class Settings:
    """What decides the embeddings, from the flags and, where they say nothing, from the index that is there."""

    model: str
    revision: str | None
    dtype: str | None
    pool: str | None
    layer: int | None
    norm: bool
    max_patches: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="folder, image or pattern; - reads names from stdin, one a line or separated by NUL",
    )
    parser.add_argument("-m", "--model", metavar="X", help="Hub name, folder or weight file (default: the index's own)")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="index to make or to update")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: Apple's release, pinned)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to compute in (default: the checkpoint's)")
    parser.add_argument(
        "--pool",
        choices=POOLS,
        help="what is stored of an image: mean or head one vector, tokens or map all of them "
        "(default: head where the checkpoint has one, else mean)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="take this hidden state, by transformers' numbers, as it is (default: the last one after the final norm)",
    )
    parser.add_argument("--norm", action="store_true", help="with --layer: apply the final norm to it")
    parser.add_argument(
        "--max-patches", type=int, metavar="N", help="native checkpoints: scale larger images down (default: 4096)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads that decode (default: one for each core)")
    parser.add_argument(
        "--store", choices=("float16", "float32"), help="precision of the vectors in the index (default: float16)"
    )
    parser.add_argument(
        "--export",
        choices=EXPORTS,
        help="then write everything beside the index for other tools, replacing an earlier export",
    )
    add_policy_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Embeds what is new or changed and forgets what is gone; returns 1 when some images failed."""
    from mlx_aimv2.embed.distributed import RankLostError, Ranks

    for flag in ("threads", "max_patches"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    arguments.output = Path(os.path.expanduser(arguments.output))  # noqa: PTH111 - ~nobody stays as it is
    ranks = Ranks()
    chief = _Chief(arguments, ranks)
    try:
        return _run(arguments, ranks, chief)
    except RankLostError as error:
        count = len(chief.index) if chief.index is not None else 0
        kept = f"; {shown(arguments.output)} keeps {count:,} images" if count else "; nothing is stored yet"
        say(f"mlx-aimv2: rank {ranks.rank}: {error}{kept if ranks.rank == 0 else ''}; run it again to go on")
        return 1
    finally:
        if chief.index is not None:
            chief.index.close()


def _run(arguments: argparse.Namespace, ranks: Ranks, chief: _Chief) -> int:
    from mlx_aimv2.embed.distributed import RankLostError, Result, my_chunks
    from mlx_aimv2.embed.pipeline import embed_chunks
    from mlx_aimv2.embed.pooling import Pooling
    from mlx_aimv2.embed.prefetch import MAX_PATCHES
    from mlx_aimv2.embed.provenance import describe, load_with_origin
    from mlx_aimv2.embed.update import Plan, Update

    started = time.monotonic()
    policy = policy_of(arguments)
    job = ranks.first(chief.prepare)
    settings, plan = Settings(**job["settings"]), Plan(**job["plan"])
    with Progress(plan.images if ranks.rank == 0 else 0, "images") as progress, progress.warnings_as_lines():
        loaded = load_with_origin(settings.model, revision=settings.revision, dtype=settings.dtype)
        pooling = Pooling.of(loaded.model, settings.pool, layer=settings.layer, norm=settings.norm)
        max_patches = settings.max_patches or MAX_PATCHES
        description = describe(loaded, pooling, max_patches=max_patches, decode=policy.decode)
        theirs = ranks.first(lambda: chief.agree(description))
        if theirs != description["weights"]["digest"]:
            raise ValueError(f"rank {ranks.rank} found other weights at {settings.model} than rank 0: make them equal")
        update = Update(plan, chief.index, lambda: chief.create(description, pooling.axes))
        mine = Result()
        results = embed_chunks(
            my_chunks(plan.chunks, ranks),
            loaded.model,
            loaded.processor,
            pooling=pooling,
            max_patches=max_patches,
            threads=arguments.threads,
            policy=policy,
            on_failure=lambda path, reason: mine.failures.append((path, reason)),
            on_note=lambda path, note: mine.notes.append((path, note)),
            known=plan.known,
        )
        try:
            for embeddings in results:
                mine.embeddings = embeddings
                for result in ranks.gather(mine):
                    if ranks.rank == 0:
                        chief.take(result, update, progress)
                mine.failures.clear()
                mine.notes.clear()
            ranks.first(lambda: chief.finish(update, mine, progress))
        except RankLostError:
            update.commit()
            raise
        except RuntimeError as error:  # MLX's own: no memory on the device, most likely
            update.commit()
            raise OSError(f"MLX could not go on: {error}; what was done is kept") from None
        except KeyboardInterrupt:
            update.commit()
            progress.say("mlx-aimv2: stopped; what was done is kept, run it again to go on")
            return 130
    if ranks.rank > 0:
        return 0  # mlx.launch would end rank 0 if another one failed before it
    return chief.summary(update, time.monotonic() - started)


class _Chief:
    """What only rank 0 does: list, compare, write, print."""

    def __init__(self, arguments: argparse.Namespace, ranks: Ranks) -> None:
        self.arguments = arguments
        self.ranks = ranks
        self.output: Path = arguments.output
        self.index: IndexWriter | None = None
        self.failures = 0
        self.plan: Any = None
        self.export_to: Path | None = None

    def prepare(self) -> dict[str, Any]:
        from mlx_aimv2.embed.update import make_plan

        self._check_output()
        settings = self._settings()
        listing = self._list()
        self.plan = make_plan(listing, self.index)
        return {"settings": asdict(settings), "plan": asdict(self.plan)}

    def _check_output(self) -> None:
        from mlx_aimv2.index.writer import IndexWriter

        folder = self.output.absolute().parent
        if self.output.exists() and (self.output.is_dir() or self.output.stat().st_size):
            self.index = IndexWriter.open(self.output)
            if not os.access(self.output, os.W_OK):
                raise PermissionError(f"{self.output} cannot be written to")
        elif not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: make that folder first, or choose another -o")
        if not os.access(folder, os.W_OK):  # for the journal, even where the index exists
            raise PermissionError(f"{folder} cannot be written to: choose another -o")
        if self.arguments.export is not None:
            from mlx_aimv2.index.export import target

            self.export_to = target(self.output, self.arguments.export)

    def _settings(self) -> Settings:
        given = self.arguments
        if self.index is None:
            if given.model is None:
                raise ValueError(f"{self.output} does not exist yet: say with which model to make it, -m MODEL")
            return Settings(
                given.model, given.revision, given.dtype, given.pool, given.layer, given.norm, given.max_patches
            )
        from mlx_aimv2.embed.provenance import made_by

        stored = made_by(self.index)
        if given.store is not None and given.store != self.index.dtype:
            raise ValueError(f"{self.output} stores {self.index.dtype}: leave --store out, or choose another -o")
        own = given.model is None
        return Settings(
            model=stored["checkpoint"] if own else given.model,
            revision=given.revision or (stored["commit"] if own else None),
            dtype=given.dtype or (stored["dtype"] if own else None),
            pool=given.pool or stored["pool"],
            layer=stored["layer"] if given.layer is None else given.layer,
            norm=given.norm or stored["norm"],
            max_patches=given.max_patches or stored["max_patches"],
        )

    def _list(self) -> Listing:
        paths: list[str] = []
        for path in self.arguments.paths:
            if path != "-":
                paths.append(path)
            elif self.ranks.size > 1:
                raise ValueError("- does not go with mlx.launch, which never ends its stdin: give folders or files")
            else:
                paths += read_list(sys.stdin.buffer.read())
        listing = list_images(paths)
        for path in listing.empty:
            kept = f"; what {shown(self.output)} holds of it stays" if self.index is not None else ""
            say(f"mlx-aimv2: no images in {shown(path)}{kept}")
        self.report([(path, "does not exist") for path in listing.missing], say)
        self.report(listing.problems, say)
        if not listing.files and not listing.problems:
            raise FileNotFoundError(f"no images found: looked for names that end in {' '.join(SUFFIXES)}")
        return listing

    def agree(self, description: dict[str, Any]) -> str:
        """Refuses to mix embeddings that cannot be compared; returns the digest of the weights."""
        from mlx_aimv2.embed.provenance import differences

        refused, notes = differences(self.index.provenance, description) if self.index is not None else ([], [])
        if refused:
            raise ValueError(
                f"{self.output} was made otherwise, so new embeddings could not be compared with it: "
                f"{'; '.join(refused)}. Use the same settings or another -o"
            )
        if notes:
            say(
                f"mlx-aimv2: note: the new images are made a little otherwise than those in {shown(self.output)} "
                f"({'; '.join(notes)}): leave -m and --dtype out to keep to one"
            )
        return str(description["weights"]["digest"])

    def create(self, description: dict[str, Any], axes: int) -> IndexWriter:
        from mlx_aimv2.index.writer import IndexWriter

        dtype = self.arguments.store or "float16"
        width = description["width"]
        try:
            self.index = IndexWriter.create(self.output, provenance=description, width=width, axes=axes, dtype=dtype)
        except FileExistsError:
            raise FileExistsError(f"another mlx-aimv2 embed made {self.output} meanwhile: run it again") from None
        return self.index

    def report(self, failures: list[tuple[str, str]], say: Callable[[str], None]) -> None:
        """Says what failed and why."""
        for path, reason in failures:
            self.failures += 1
            say(f"mlx-aimv2: {shown(path)} {reason}")

    def take(self, result: Result, update: Update, progress: Progress) -> None:
        """Says what deserves it and passes the embeddings on."""
        self.report(result.failures, progress.say)
        for path, _ in result.failures:
            update.fail(path)
        for path, note in result.notes:
            warnings.warn(f"{shown(path)} {note}", stacklevel=1)
        update.take(result.embeddings)
        progress.advance(len(result.embeddings) + len(result.failures))

    def finish(self, update: Update, last: Result, progress: Progress) -> bool:
        """Writes what is left, and the export."""
        last.embeddings = []
        self.take(last, update, progress)
        update.finish()
        if self.export_to is not None and self.index is not None:
            from mlx_aimv2.index.export import export

            export(self.index, self.export_to, kind=self.arguments.export)
        return True

    def summary(self, update: Update, seconds: float) -> int:
        """Prints the result; returns the exit code."""
        total = len(self.index) if self.index is not None else 0
        counts = {
            "images": total,
            "embedded": update.embedded,
            "recognised": update.copied,
            "unchanged": update.plan.unchanged,
            "dropped": update.dropped,
            "failed": self.failures,
        }
        if self.arguments.json:
            print(json.dumps({"index": str(self.output), **counts, "seconds": round(seconds, 3)}))
        elif self.index is not None:
            parts = [f"{count:,} {name}" for name, count in counts.items() if name != "images" and count]
            print(f"{shown(self.output)}: {total:,} images ({', '.join(parts) or 'nothing to do'})")
        if self.index is None:
            say(f"mlx-aimv2: no image could be embedded; {shown(self.output)} was not made")
        return 1 if self.failures else 0
