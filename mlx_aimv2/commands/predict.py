"""Runs `mlx-aimv2 predict`: what a head of yours says of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlx_aimv2.cli import say, show
from mlx_aimv2.commands.flags import MODEL, add_dtype

HELP = "say what a trained head sees in images"

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
    add("-o", "--output", type=Path, metavar="DIR", help="write predictions as files, too")
    add("--json", action="store_true", help="print a JSON object for each image, one a line")


def run(arguments: argparse.Namespace) -> int:
    """Prints a prediction for each image; returns 1 when some could not be read."""
    from mlx_aimv2.learn import prediction
    from mlx_aimv2.learn.head_folder import load_head

    head = load_head(arguments.head, model=arguments.model, dtype=arguments.dtype)
    failures: list[str] = []

    def fail(path: str, reason: str) -> None:
        failures.append(path)
        say(reason)

    done = []
    for path, found in prediction.predict(head, arguments.images, on_failure=fail):
        if arguments.json:
            print(json.dumps({"path": path, **head.task.as_json(found, head.classes)}), flush=True)
        else:
            show(path)
            for line in head.task.as_text(found, head.classes).split("\n"):
                show(line)
        if arguments.output is not None:
            done.append((path, found))
    if arguments.output is not None:
        prediction.save(done, head, arguments.output)
    return 1 if failures else 0
