"""Runs `mlx-aimv2 fuse`: makes one checkpoint of an encoder and its adapters."""

from __future__ import annotations

import argparse

from mlx_aimv2.cli.flags import MODEL, add_revision
from mlx_aimv2.cli.output import show

HELP = "merge adapters into the encoder"

EXAMPLE = "--adapter-path my-labels --save-path my-encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb, named as mlx-lm's."""
    add = parser.add_argument_group("input").add_argument
    add("--adapter-path", required=True, metavar="HEAD", help="folder that fit has written, or adapters alone")
    add("-m", "--model", metavar="MODEL", help=f"encoder: {MODEL} (default: the one that HEAD names)")
    add_revision(add, "the one that HEAD names")

    add = parser.add_argument_group("output").add_argument
    add("--save-path", default="fused_model", metavar="DIR", help="folder to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Fuses and prints where the result lies."""
    from mlx_aimv2.learn import fuse

    show(str(fuse(arguments.adapter_path, arguments.save_path, model=arguments.model, revision=arguments.revision)))
    return 0
