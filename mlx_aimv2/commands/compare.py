"""`mlx-aimv2 compare`: prints how far apart two models are on the same images."""

from __future__ import annotations

import argparse
import json

from mlx_aimv2.cli import show
from mlx_aimv2.conversion import fidelity

HELP = "measure how far a model is from its reference, on images"
EXAMPLE = "mlx-aimv2 compare apple/aimv2-large-patch14-224 aimv2-large-8bit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("reference", metavar="A", help="the reference, run in float32: Hub name, folder or weight file")
    add("other", metavar="B", help="the model to judge, run in its own dtype")
    add = parser.add_argument_group("comparison").add_argument
    add(
        "--images",
        metavar="DIR",
        help=f"folder of images, of which {fidelity.MOST_IMAGES} are taken (default: four bundled photographs)",
    )
    add("--revision", metavar="R", help="branch, tag or commit of A (default: Apple's release, pinned)")
    add("--json", action="store_true", help="everything as one JSON object, each block's range included")


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
