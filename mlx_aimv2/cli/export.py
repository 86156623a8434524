"""`mlx-aimv2 export` writes an encoder for programs in Swift and C++, or for Core ML."""

from __future__ import annotations

import argparse

from mlx_aimv2.cli.flags import MODEL, add_dtype, add_revision, groups, whole_numbers
from mlx_aimv2.cli.output import show
from mlx_aimv2.files import expand_user


def add_export(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "model", "input", "output")
    words = f"{MODEL}, or a folder that fit has written: class probabilities"
    add["model"]("-m", "--model", required=True, metavar="MODEL", help=words)
    add_revision(add["model"])
    add_dtype(add["model"])
    words = "of .mlxfn, float: normalised pixels; uint8: bytes, normalised inside (default: float)"
    add["input"]("--input", choices=("float", "uint8"), metavar="NAME", help=words)
    words = "images or texts at once, several in one file (default: 1)"
    add["input"]("--batch", type=whole_numbers, default=(1,), metavar="N,N,…", help=words)
    add["input"]("--image-size", type=int, metavar="N", help="pixels a side (default: the checkpoint's, native 224)")
    words = "native checkpoints: rows and columns of patches"
    add["input"]("--grid", type=whole_numbers, metavar="R,C", help=words)
    words = "file to write, NAME.mlpackage for Core ML, or NAME.mlxfn for this machine's device (for Metal: on a Mac)"
    add["output"]("-o", dest="path", type=expand_user, required=True, metavar="FILE", help=words)
    words = "image: one vector each; tokens, both or text (default: image)"
    add["output"]("--output", choices=("image", "tokens", "both", "text"), metavar="NAME", help=words)


def run_export(arguments: argparse.Namespace) -> int:
    """Exports and prints the path of the file."""
    from mlx_aimv2.export import export

    show(str(export(**{name: value for name, value in vars(arguments).items() if name != "verb"})))
    return 0
