"""Runs `mlx-aimv2 fuse`: makes one checkpoint of an encoder and its adapters."""

from __future__ import annotations

import argparse

from mlx_aimv2.cli import show

HELP = "make one checkpoint of an encoder and its adapters"
EXAMPLE = "mlx-aimv2 fuse --adapter-path my-lora --save-path my-encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb, named as mlx-lm's."""
    add = parser.add_argument
    add("--adapter-path", required=True, metavar="HEAD", help="folder that fit has written, or adapters alone")
    add("--save-path", default="fused_model", metavar="DIR", help="folder to write (default: %(default)s)")
    add = parser.add_argument_group("encoder").add_argument
    add("-m", "--model", metavar="MODEL", help="the encoder (default: the one that the head folder names)")
    add("--revision", metavar="R", help="branch, tag or commit of the encoder")


def run(arguments: argparse.Namespace) -> int:
    """Fuses and prints where the result lies."""
    from mlx_aimv2.learn import fuse

    show(str(fuse(arguments.adapter_path, arguments.save_path, model=arguments.model, revision=arguments.revision)))
    return 0
