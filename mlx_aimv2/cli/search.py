"""`mlx-aimv2 search`: prints the images of an index that are nearest to an example image or to words."""

from __future__ import annotations

import argparse
import json
import time
import webbrowser
from pathlib import Path

from mlx_aimv2.cli.flags import MODEL, add_policy_arguments, add_revision, policy_of
from mlx_aimv2.cli.output import say, show, typed


def add_search(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument_group("input").add_argument
    add("index", type=Path, metavar="INDEX", help="index written by mlx-aimv2 embed")
    add("query", metavar="QUERY", help="an image or, where the index was made with LiT, a text")
    add("-k", "--top", type=int, default=12, metavar="N", help="images to find (default: %(default)s)")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="MODEL", help=f"{MODEL} (default: the index's own)")
    add_revision(add)

    add_policy_arguments(parser.add_argument_group("reading images").add_argument)

    add = parser.add_argument_group("output").add_argument
    add("--html", type=Path, metavar="FILE", help="write a page with thumbnails")
    add("--overwrite", action="store_true", help="let --html replace any other file, but no image")
    add("--open", action="store_true", help="show that page in the browser")
    add("--json", action="store_true", help="print the images as JSON")


def run_search(arguments: argparse.Namespace) -> int:
    """Prints the nearest images, best first."""
    from mlx_aimv2.embed.encode import image_path, query_vector
    from mlx_aimv2.index.export import check_page, write_page
    from mlx_aimv2.index.reader import Index

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    with Index.open(arguments.index) as index:
        image = image_path(arguments.query)
        page = None
        if arguments.html is not None:
            page = check_page(arguments.html, index, image, overwrite=arguments.overwrite)
        query = query_vector(
            index,
            image=image,
            text=typed(arguments.query),
            model=arguments.model,
            revision=arguments.revision,
            policy=policy_of(arguments),
        )
        started = time.perf_counter()
        matches = index.search(query, arguments.top)
        seconds = time.perf_counter() - started
        if page is not None or arguments.open:
            text = arguments.query if image is None else None
            written = write_page(page, index, matches, text=text, image=image)
            if page is None:
                say(f"the page is {written}")
            if arguments.open and not webbrowser.open(f"file://{written.absolute()}"):
                say(f"no browser could be opened: open {written} yourself")
        if arguments.json:
            found = [{"path": match.path, "score": match.score} for match in matches]
            print(json.dumps({"query": arguments.query, "images": len(index), "seconds": seconds, "matches": found}))
        else:
            for match in matches:
                show(f"{match.score:7.4f}  {match.path}")
    return 0
