"""Runs `mlx-aimv2 fit`: learns your labels from a folder of images."""

from __future__ import annotations

import argparse
import json

from mlx_aimv2.cli.flags import MODEL, add_dtype, add_resume, add_revision, add_settings, groups
from mlx_aimv2.cli.output import progress, say, show
from mlx_aimv2.learn.task import ADAPTERS, Options

HELP = "learn your labels from a folder of images"

EXAMPLE = "photos/ -m apple/aimv2-large-patch14-224 -o my-labels"

OWN = {"verb", "data", "model", "output", "json", "labels"}
"""Arguments that are no keyword of `learn.fit` of the same kind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb, which are the keywords of `learn.fit`."""
    add = groups(parser, "data", "model", "what is trained", "optimisation", "augmentation", ADAPTERS, "run", "output")
    add["data"]("data", metavar="DATA", help="folder of images with labels, masks or boxes")
    add["data"]("--labels", metavar="A,B,…", help="allowed labels; any other label in DATA is an error")
    add["model"]("-m", "--model", required=True, metavar="MODEL", help=f"encoder: {MODEL}")
    add_revision(add["model"])
    add_dtype(add["model"], "the checkpoint's, for full float32")
    types = "linear, attentive, knn, decoder, lora, dora, full (default: by task)"
    add["what is trained"]("--task", metavar="NAME", help="classify, segment or detect (default: guessed from DATA)")
    add["what is trained"]("--fine-tune-type", metavar="NAME", help=types)
    add_settings(add, Options)
    add_resume(add["run"])
    add["run"]("--cache", metavar="DIR", help="where features are kept (default: in ~/.cache/mlx-aimv2)")
    add["output"]("-o", "--output", required=True, metavar="HEAD", help="folder to write")
    add["output"]("--json", action="store_true", help="print the scores as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Trains and prints the result."""
    from mlx_aimv2.learn import fit

    keywords = {name: value for name, value in vars(arguments).items() if name not in OWN}
    labels = None if arguments.labels is None else [label.strip() for label in arguments.labels.split(",")]
    with progress("steps") as bar:
        fitted = fit(
            arguments.data,
            arguments.model,
            arguments.output,
            labels=labels,
            say=say,
            progress=bar.begin,
            **keywords,
        )
    if not fitted.line:  # another rank prints
        return 0
    if arguments.json:
        print(json.dumps({"head": str(fitted.folder), "metrics": fitted.scores, "images": fitted.images}))
    else:
        show(fitted.line)
        show(str(fitted.folder))
    return 0
