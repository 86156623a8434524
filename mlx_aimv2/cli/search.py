"""`mlx-aimv2 search`: prints the images of an index that are nearest to example images, to words or to both."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from shutil import copy2
from typing import TYPE_CHECKING

from mlx_aimv2.cli.flags import (
    OF_INDEX,
    REPEATED,
    add_chosen,
    add_found,
    add_policy_arguments,
    add_revision,
    chosen,
    policy_of,
)
from mlx_aimv2.cli.output import progress, say, show, show_page, show_paths, typed
from mlx_aimv2.files import atomic_folder, check_target, expand_user, stat_of

if TYPE_CHECKING:
    from mlx_aimv2.index.reader import Match


def add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("index", type=Path, metavar="INDEX", help="index written by mlx-aimv2 embed")
    query = "an image or, where the index was made with LiT, a text; 2:QUERY counts twice"
    add("query", metavar="QUERY", help=query)
    add("-a", "--add", action="append", default=[], metavar="QUERY", help=f"and like this; {REPEATED}")
    add("-s", "--subtract", action="append", default=[], metavar="QUERY", help=f"but not like this; {REPEATED}")

    add = parser.add_argument_group("which images").add_argument
    add("-k", "--top", type=int, default=12, metavar="N", help="images to find (default: %(default)s)")
    add("--min-score", type=float, metavar="X", help="only images with at least this cosine")
    add_chosen(add)
    add("--update", action="store_true", help="first embed what is new in the folders that the index was made of")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="MODEL", help=OF_INDEX)
    add_revision(add)

    add_policy_arguments(parser.add_argument_group("reading images").add_argument)

    output = parser.add_argument_group("output")
    add_found(output, paths="the paths alone", objects="the images as JSON")
    add = output.add_mutually_exclusive_group().add_argument
    add("--copy-to", type=Path, metavar="DIR", help="copy the images into a new folder, the best first by name")
    add("--link-to", type=Path, metavar="DIR", help="link to the images in a new folder instead")


def run_search(arguments: argparse.Namespace) -> int:
    """Prints the nearest images, best first; returns 1 where some could not be copied."""
    from mlx_aimv2.embed.query import parse_query, query_vectors, title
    from mlx_aimv2.index.page import Card, check_page, made_with, result_page, write_page
    from mlx_aimv2.index.reader import Index

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    if target := arguments.copy_to or arguments.link_to:
        target = expand_user(target)
        check_target(target)
    queries = [parse_query(typed(words)) for words in (arguments.query, *arguments.add)]
    queries += [query._replace(weight=-query.weight) for query in map(parse_query, map(typed, arguments.subtract))]
    failed = _update(arguments) if arguments.update else 0
    with Index.open(arguments.index) as index:
        page = None
        images = [query.image for query in queries if query.image is not None]
        if arguments.html is not None:
            page = check_page(arguments.html, index, images, overwrite=arguments.overwrite)
        vectors = query_vectors(
            index, queries, model=arguments.model, revision=arguments.revision, policy=policy_of(arguments)
        )
        started = time.perf_counter()
        matches = index.search(vectors, arguments.top, min_score=arguments.min_score, **chosen(arguments))
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
    if target is not None:
        failed += _put(matches, target, as_links=arguments.link_to is not None)
    return 1 if failed else 0


def _update(arguments: argparse.Namespace) -> int:
    """Embeds what is new in the folders that the index remembers; returns how many images failed."""
    from mlx_aimv2.embed.encode import Settings
    from mlx_aimv2.embed.job import Options, update_index
    from mlx_aimv2.images import Policy
    from mlx_aimv2.index.reader import Index
    from mlx_aimv2.index.schema import damaged

    path, failed = arguments.index, 0
    with Index.open(path) as index:
        sources = index.sources
    if not sources:
        raise ValueError(f"{path} does not know its folders: run mlx-aimv2 embed FOLDER -o {path} once")
    for name, flags in sources.items():
        try:
            exclude, include = ([*map(str, flags[rule])] for rule in ("exclude", "include"))
            options = Options(policy=Policy(**flags["policy"]), exclude=exclude, include=include)
        except (LookupError, TypeError, ValueError) as error:
            raise damaged(path, f"what it says of {name}: {error}") from None
        settings = Settings(arguments.model, arguments.revision)
        try:
            with progress() as on_progress:
                summary = update_index([name], path, settings, options, report=say, on_progress=on_progress)
        except FileNotFoundError as error:  # a drive that is not plugged in: what the index has of it is searched
            forget = f"mlx-aimv2 embed {quote(name)} -o {path} --prune"
            say(f"{error}; {forget} forgets what is gone for good" if stat_of(name) is None else error)
            failed += 1
            continue
        if summary is not None:
            say(f"{path}: {summary.embedded:,} embedded from {name}, {summary.images:,} in all")
            failed += summary.failed
    return failed


def _put(matches: Sequence[Match], target: Path, *, as_links: bool) -> int:
    """Copies images into a folder, or links to them, as `001-name.jpg`; returns how many could not be read."""
    failures = 0
    digits = len(str(len(matches)))
    with atomic_folder(target) as folder:
        for rank, match in enumerate(matches, 1):
            place = folder / f"{rank:0{digits}}-{Path(match.path).name}"
            try:
                if as_links:
                    place.symlink_to(match.path)
                else:
                    copy2(match.path, place)
            except FileNotFoundError:
                say(f"{match.path} does not exist any more")
                failures += 1
    return failures
