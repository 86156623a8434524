"""`mlx-aimv2 compare`: prints how far apart two models are on the same images."""

from __future__ import annotations

import argparse
import json

from mlx_aimv2.cli.flags import MODEL, REVISION
from mlx_aimv2.cli.output import show
from mlx_aimv2.conversion import fidelity

HELP = "measure how far a model is from its reference, on images"

EXAMPLE = "apple/aimv2-large-patch14-224 large-4bit --images ~/Pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument_group("input").add_argument
    add("reference", metavar="REFERENCE", help=f"run in float32: {MODEL}")
    add("other", metavar="MODEL", help="the model to judge, run in its own dtype")
    add(
        "--images",
        metavar="DIR",
        help=f"take {fidelity.MAX_IMAGES} images of this folder (default: four bundled photographs)",
    )
    add("--revision", metavar="NAME", help=f"of REFERENCE: {REVISION} (default: Apple's release, pinned)")

    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print everything as JSON, with the range of each block")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table."""
    images = fidelity.choose_images(arguments.images)
    found = fidelity.compare(arguments.reference, arguments.other, images=images, revision=arguments.revision)
    if arguments.json:
        print(json.dumps(found, indent=4))
    else:
        for line in fidelity.table(found).split("\n"):
            show(line)
    return 0
