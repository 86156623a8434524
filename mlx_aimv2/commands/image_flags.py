"""The flags about reading images, the same for every verb that reads some."""

from __future__ import annotations

import argparse

from mlx_aimv2.images import DECODE, TRUNCATED, Policy


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --decode, --max-pixels and --truncated."""
    add = parser.add_argument_group("reading images").add_argument
    add(
        "--decode",
        choices=DECODE,
        default="fast",
        help="JPEGs: at the smallest scale with three times the pixels needed, or in full (default: %(default)s)",
    )
    add("--max-pixels", type=int, metavar="N", help="refuse larger images (default: 178956970, Pillow's own limit)")
    add(
        "--truncated",
        choices=TRUNCATED,
        help="JPEGs that end early (default: accepted with a note where at most a tenth is missing)",
    )


def policy_of(arguments: argparse.Namespace) -> Policy:
    """What the flags say, as the library takes it."""
    return Policy(decode=arguments.decode, max_pixels=arguments.max_pixels, truncated=arguments.truncated)
