"""Runs `mlx-aimv2 evaluate`: how good a head of yours is on labelled images."""

from __future__ import annotations

import argparse
import json

from mlx_aimv2.cli.flags import MODEL, add_dtype
from mlx_aimv2.cli.output import say, show

HELP = "score a trained head on labelled images"

EXAMPLE = "my-labels held-out/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument_group("input").add_argument
    add("head", metavar="HEAD", help="folder that fit has written")
    add("data", metavar="DATA", help="labelled images, as for fit; of parts test, else val, counts")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="MODEL", help=f"encoder: {MODEL} (default: the one that HEAD names)")
    add_dtype(add, "the one that HEAD names")

    add = parser.add_argument_group("output").add_argument
    add("--card", metavar="DIR", help="write the model card's images for this data there")
    add("--json", action="store_true", help="print the scores as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the scores and the table by class."""
    from mlx_aimv2.learn import evaluate

    found = evaluate(arguments.head, arguments.data, model=arguments.model, dtype=arguments.dtype, card=arguments.card)
    for note in found.notes:
        say(f"note: {note}")
    if arguments.json:
        print(json.dumps({"part": found.part, "images": found.images, **found.scores}))
        return 0
    widths = [max(len(row[column]) for row in found.table) for column in range(len(found.table[0]))]
    for first, *rest in found.table:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        show("  ".join([first.ljust(widths[0]), *cells]))
    scores = ", ".join(f"{name} {100 * score:.2f} %" for name, score in found.scores.items())
    show(f"{scores} on {found.images:,} images")
    return 0
