"""Runs `mlx-aimv2 predict`: what a head of yours says of images."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext

from mlx_aimv2.cli.flags import MODEL, add_dtype
from mlx_aimv2.cli.output import say, show
from mlx_aimv2.files import check_target, expand_user

HELP = "predict labels, masks or boxes for images"

EXAMPLE = "my-labels new.jpg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument_group("input").add_argument
    add("head", metavar="HEAD", help="folder that fit has written")
    add("images", nargs="+", metavar="IMAGE", help="image file, folder or pattern")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="MODEL", help=f"encoder: {MODEL} (default: the one that HEAD names)")
    add_dtype(add, "the one that HEAD names")

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=expand_user, metavar="DIR", help="write predictions as files, too, into a new folder")
    add("--json", action="store_true", help="print a JSON object for each image, one a line")


def run(arguments: argparse.Namespace) -> int:
    """Prints a prediction for each image; returns 1 when some could not be read."""
    from mlx_aimv2.embed.encode import listed_files
    from mlx_aimv2.learn.evaluation import predict, saving
    from mlx_aimv2.learn.head_folder import load_head

    failures: list[str] = []

    def fail(path: str, reason: str) -> None:
        failures.append(path)
        say(f"{path} {reason}")

    if (output := arguments.output) is not None:
        check_target(output)  # before the model is loaded, which takes longer
    head = load_head(arguments.head, model=arguments.model, dtype=arguments.dtype)
    files = listed_files(arguments.images, fail)
    with nullcontext() if output is None else saving(head, arguments.images, files, output) as save:
        for path, found in predict(head, files, on_failure=fail):
            if arguments.json:
                print(json.dumps({"path": path, **head.task.results.as_json(found, head.classes)}), flush=True)
            else:
                for line in (path, *head.task.results.as_text(found, head.classes).split("\n")):
                    show(line)
            if save is not None:
                save(path, found)
    return 1 if failures else 0
