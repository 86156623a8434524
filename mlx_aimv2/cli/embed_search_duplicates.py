"""Verbs of an index: `embed` brings one up to date with the images on disk, `search` finds images in it by example
images, words or both, `duplicates` lists those that occur more than once and deletes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from shlex import quote
from shutil import copy2
from typing import TYPE_CHECKING, Any

from mlx_aimv2.backend.device import AUTO
from mlx_aimv2.cli import flags
from mlx_aimv2.cli.output import begin, note, progress, say, show, show_page, show_paths
from mlx_aimv2.files import atomic_folder, check_target, expand_user, stat_of
from mlx_aimv2.images.find import FOUND

if TYPE_CHECKING:
    from mlx_aimv2.index.reader import Match

PIXEL_BLOCKS = 4
"""Blocks of 16 MB that Pillow keeps: without them Linux maps every page of every image anew, a fifth of the time of
decoding 12 megapixels exactly; eight are no faster."""


def add_embed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("paths", nargs="+", metavar="PATH", help="folder, image or pattern; - reads names from stdin, by line or NUL")
    flags.add_rules(add)
    add("--prune", action="store_true", help="drop images from the index whose files under PATH are gone")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="MODEL", help=flags.OF_INDEX)
    flags.add_revision(add)
    flags.add_dtype(add, f"the index's own, else {AUTO}")
    flags.add_image_size(add, "the index's own, else the checkpoint's")

    add = parser.add_argument_group("what is stored for each image").add_argument
    words = "one vector (mean or head) or all of them (tokens or map) (default: head if there is one, else mean)"
    add("--pool", choices=("mean", "head", "tokens", "map"), metavar="NAME", help=words)
    words = "hidden state, numbered as in transformers (default: the last, after the final norm)"
    add("--layer", type=int, metavar="N", help=words)
    add("--norm", action="store_true", help="with --layer: apply the final norm to it")
    words = "dtype of the stored vectors: float16 or float32 (default: float16)"
    add("--store", choices=("float16", "float32"), metavar="NAME", help=words)

    add = parser.add_argument_group("reading images").add_argument
    add("--max-patches", type=int, metavar="N", help=f"{flags.PATCHES} (default: 4096)")
    add("--threads", type=int, metavar="N", help="decoding threads (default: one per core)")
    flags.add_policy_arguments(add)

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", required=True, type=Path, metavar="FILE", help="index to create or update")
    words = "npz, safetensors or jsonl: also write the vectors to a file next to the index"
    add("--export", choices=("npz", "safetensors", "jsonl"), metavar="NAME", help=words)
    add("--overwrite", action="store_true", help="let --export replace any file except an image")
    add("--json", action="store_true", help="print the summary as JSON")


def run_embed(arguments: argparse.Namespace) -> int:
    """Embeds and prints the summary; returns 1 if some images failed."""
    begin("scanning")
    from PIL import Image

    from mlx_aimv2.embed.encode import Settings
    from mlx_aimv2.embed.job import Options, update_index
    from mlx_aimv2.images.find import counted

    if "PILLOW_BLOCKS_MAX" not in os.environ:
        core: Any = Image.core  # type: ignore[attr-defined]
        core.set_blocks_max(PIXEL_BLOCKS)
    started = time.monotonic()
    output = expand_user(arguments.output)
    given = vars(arguments) | {"policy": flags.policy_of(arguments)}
    settings = Settings(**{one.name: given[one.name] for one in fields(Settings)})
    options = Options(**{one.name: given[one.name] for one in fields(Options)})
    with progress() as on_progress:
        summary = update_index(arguments.paths, output, settings, options, report=say, on_progress=on_progress)
    if summary is None:
        return 0  # mlx.launch would end rank 0 if another one failed before it
    counts = asdict(summary)
    is_made, passed_over = counts.pop("is_made"), counts.pop("passed_over")
    if passed_over:
        note(f"skipped: {counted(passed_over)}")
    if arguments.json:
        seconds = round(time.monotonic() - started, 3)
        print(json.dumps({"index": str(output), **counts, "passed_over": passed_over, "seconds": seconds}))
    elif is_made:
        parts = [f"{count:,} {name}" for name, count in counts.items() if name != "images" and count]
        show(f"{output}: {summary.images:,} images ({', '.join(parts) or 'nothing to do'})")
    if not is_made:
        say(f"no image could be embedded; {output} was not created")
    return 1 if summary.failed else 0


def add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("index", type=Path, metavar="INDEX", help="index written by mlx-aimv2 embed")
    query = "an image, or text if the index was made with LiT (locked-image tuning: -lit); 2:QUERY counts twice"
    add("query", metavar="QUERY", help=query)
    add("-a", "--add", action="append", default=[], metavar="QUERY", help=f"and like this; {flags.REPEATED}")
    add("-s", "--subtract", action="append", default=[], metavar="QUERY", help=f"but not like this; {flags.REPEATED}")

    add = parser.add_argument_group("which images").add_argument
    add("-k", "--top", type=int, default=12, metavar="N", help="number of images (default: %(default)s)")
    add("--min-score", type=float, metavar="X", help="only images with at least this cosine similarity")
    flags.add_chosen(add)
    add("--update", action="store_true", help="first embed new images in the folders of the index")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="MODEL", help=flags.OF_INDEX)
    flags.add_revision(add)

    flags.add_policy_arguments(parser.add_argument_group("reading images").add_argument)

    output = parser.add_argument_group("output")
    flags.add_found(output, paths="only the paths", objects="the images as JSON")
    add = output.add_mutually_exclusive_group().add_argument
    add("--copy-to", type=expand_user, metavar="DIR", help="copy the images into a new folder, numbered from the best")
    add("--link-to", type=expand_user, metavar="DIR", help="put links to the images in a new folder instead")


def run_search(arguments: argparse.Namespace) -> int:
    """Prints the nearest images, best first; returns 1 if some could not be copied."""
    from mlx_aimv2.embed.query import parse_query, query_vectors, title
    from mlx_aimv2.index.page import Card, check_page, made_with, result_page, write_page
    from mlx_aimv2.index.reader import Index

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    if target := arguments.copy_to or arguments.link_to:
        check_target(target)
    queries = [parse_query(words) for words in (arguments.query, *arguments.add)]
    queries += [query._replace(weight=-query.weight) for query in map(parse_query, arguments.subtract)]
    failed = _update(arguments) if arguments.update else 0
    with Index.open(arguments.index) as index:
        page = None
        images = [query.image for query in queries if query.image is not None]
        if arguments.html is not None:
            page = check_page(arguments.html, index, images, overwrite=arguments.overwrite)
        vectors = query_vectors(
            index, queries, model=arguments.model, revision=arguments.revision, policy=flags.policy_of(arguments)
        )
        started = time.perf_counter()
        matches = index.search(vectors, arguments.top, min_score=arguments.min_score, **flags.chosen(arguments))
        seconds = time.perf_counter() - started
        if page is not None or arguments.open:
            cards = [Card(match.path, f"{match.score:.3f}", match.score) for match in matches]
            about = f"{len(matches):,} nearest of {made_with(index)}"
            content = result_page([("", cards)], title=title(queries), about=about, images=images)
            written = write_page(page, content)
            show_page(written, is_named=page is not None, in_browser=arguments.open)
        if arguments.json:
            found = [{"path": match.path, "score": match.score} for match in matches]
            asked = {"query": arguments.query, "add": arguments.add, "subtract": arguments.subtract}
            print(json.dumps({**asked, "images": len(index), "seconds": seconds, "matches": found}))
        elif arguments.paths_only or arguments.null:
            show_paths((match.path for match in matches), null=arguments.null)
        else:
            for match in matches:
                show(f"{match.score:7.4f}  {match.path}")
        if not (matches or arguments.json):
            say(f"no image in {arguments.index} matches")
    if target is not None:
        failed += _put(matches, target, as_links=arguments.link_to is not None)
    return 1 if failed else 0


def _update(arguments: argparse.Namespace) -> int:
    """Embeds new images in the folders that the index remembers; returns how many failed."""
    from mlx_aimv2.embed.encode import Settings
    from mlx_aimv2.embed.job import Options, update_index
    from mlx_aimv2.images import Policy
    from mlx_aimv2.index.reader import Index
    from mlx_aimv2.index.schema import damaged

    path, failed = arguments.index, 0
    with Index.open(path) as index:
        sources = index.sources
    if not sources:
        raise ValueError(f"{path} does not record its folders: run mlx-aimv2 embed FOLDER -o {path} once")
    for name, rules in sources.items():
        try:
            exclude, include = ([*map(str, rules[rule])] for rule in ("exclude", "include"))
            options = Options(policy=Policy(**rules["policy"]), exclude=exclude, include=include)
        except (LookupError, TypeError, ValueError) as error:
            raise damaged(path, f"what it records about {name}: {error}") from None
        settings = Settings(arguments.model, arguments.revision)
        try:
            with progress() as on_progress:
                summary = update_index([name], path, settings, options, report=say, on_progress=on_progress)
        except FileNotFoundError as error:  # an unplugged drive: its images in the index are searched all the same
            prune = f"mlx-aimv2 embed {quote(name)} -o {path} --prune"
            say(f"{error}; if it is gone for good, run {prune}" if stat_of(name) is None else error)
            failed += 1
            continue
        if summary is not None:
            say(f"{path}: {summary.embedded:,} embedded from {name}, {summary.images:,} in all")
            failed += summary.failed
    return failed


def _put(matches: Sequence[Match], target: Path, *, as_links: bool) -> int:
    """Copies or links images into a folder as `001-name.jpg`; returns how many are gone."""
    there: list[Match] = []
    for match in matches:
        if stat_of(match.path) is not None:
            there.append(match)
        else:
            say(f"{match.path} no longer exists")
    digits = len(str(len(there)))
    if there:
        with atomic_folder(target) as folder:
            (folder / FOUND).touch()
            for rank, match in enumerate(there, 1):
                (os.symlink if as_links else copy2)(match.path, folder / f"{rank:0{digits}}-{Path(match.path).name}")
    return len(matches) - len(there)


def add_duplicates(parser: argparse.ArgumentParser) -> None:
    from mlx_aimv2.index.duplicates import SIMILAR

    add = parser.add_argument_group("input").add_argument
    add("index", type=Path, metavar="INDEX", help="index written by mlx-aimv2 embed")
    flags.add_chosen(add)
    similar = f"also similar images, from this cosine similarity up (without X: {SIMILAR})"
    add("--similar", type=float, nargs="?", const=SIMILAR, metavar="X", help=similar)

    output = parser.add_argument_group("output")
    flags.add_found(
        output, paths="the paths of all but the one to keep", objects="the groups as JSON, the image to keep first"
    )


def run_duplicates(arguments: argparse.Namespace) -> int:
    """Prints the groups, the image to keep first; returns 1 if images could no longer be read."""
    from mlx_aimv2.index.duplicates import KINDS, find_duplicates
    from mlx_aimv2.index.page import Card, check_page, made_with, result_page, write_page
    from mlx_aimv2.index.reader import Index

    if arguments.similar is not None and not -1 <= arguments.similar <= 1:
        raise ValueError(f"--similar must be a cosine from -1 to 1, got {arguments.similar:g}")
    with Index.open(arguments.index) as index:
        page = None
        if arguments.html is not None:
            page = check_page(arguments.html, index, overwrite=arguments.overwrite)
        with progress() as on_progress:
            options = {"similar": arguments.similar, **flags.chosen(arguments)}
            groups, unreadable = find_duplicates(index, on_progress=on_progress, **options)
        for path in unreadable:
            say(f"{path} is missing or unreadable")
        extra = [member for group in groups if group.kind != "similar" for member in group.members[1:]]
        if page is not None or arguments.open:
            pages = [
                (
                    f"{KINDS[group.kind].capitalize()}, {len(group.members):,} files",
                    [Card(one.path, f"{one.width:,} × {one.height:,}") for one in group.members],
                )
                for group in groups
            ]
            about = f"{len(groups):,} groups among {made_with(index)}; the first of each is the one to keep"
            written = write_page(page, result_page(pages, title="Duplicates", about=about))
            show_page(written, is_named=page is not None, in_browser=arguments.open)
    if arguments.json:
        rows = [{"kind": group.kind, "images": [vars(one) for one in group.members]} for group in groups]
        print(json.dumps({"groups": rows}))
    elif arguments.null or arguments.paths_only:
        show_paths((one.path for one in extra), null=arguments.null)
    else:
        for group in groups:
            show(f"{KINDS[group.kind]}, {len(group.members):,} files")
            for number, one in enumerate(group.members):
                pixels = f"{one.width:,} x {one.height:,}"
                show(f"  {'keep' if number == 0 else '':4}  {pixels:>15}  {one.bytes:>12,}  {one.path}")
        freed = sum(one.bytes for one in extra) / 1e6
        count = f"{len(groups):,} group{'' if len(groups) == 1 else 's'}"
        show(f"{count}; all but the first of each, not counting the similar ones, take {freed:,.1f} MB")
    return 1 if unreadable else 0
