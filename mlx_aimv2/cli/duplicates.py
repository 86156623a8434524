"""`mlx-aimv2 duplicates`: lists the images of an index that are there more than once. It deletes nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlx_aimv2.cli.flags import add_chosen, add_found, chosen
from mlx_aimv2.cli.output import progress, say, show, show_page, show_paths


def add_duplicates(parser: argparse.ArgumentParser) -> None:
    from mlx_aimv2.index.duplicates import SIMILAR

    add = parser.add_argument_group("input").add_argument
    add("index", type=Path, metavar="INDEX", help="index written by mlx-aimv2 embed")
    add_chosen(add)
    similar = f"also images that are not the same but similar, from this cosine on (X left out: {SIMILAR})"
    add("--similar", type=float, nargs="?", const=SIMILAR, metavar="X", help=similar)

    output = parser.add_argument_group("output")
    add_found(
        output, paths="the paths of all but the one to keep", objects="the groups as JSON, the image to keep first"
    )


def run_duplicates(arguments: argparse.Namespace) -> int:
    """Prints the groups, the image to keep first; returns 1 where images could not be read any more."""
    from mlx_aimv2.index.duplicates import KINDS, find_duplicates
    from mlx_aimv2.index.page import Card, check_page, made_with, result_page, write_page
    from mlx_aimv2.index.reader import Index

    if arguments.similar is not None and not -1 <= arguments.similar <= 1:
        raise ValueError(f"--similar is a cosine, at most 1, got {arguments.similar:g}")
    with Index.open(arguments.index) as index:
        page = None
        if arguments.html is not None:
            page = check_page(arguments.html, index, overwrite=arguments.overwrite)
        with progress() as on_progress:
            options = {"similar": arguments.similar, **chosen(arguments)}
            groups, unreadable = find_duplicates(index, on_progress=on_progress, **options)
        for path in unreadable:
            say(f"{path} cannot be read any more")
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
        show(f"{count}; all but the first of each, the similar ones aside, take {freed:,.1f} MB")
    return 1 if unreadable else 0
