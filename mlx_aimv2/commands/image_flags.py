"""The flags about reading images, the same for every verb that reads some."""

from __future__ import annotations

import argparse

from mlx_aimv2.images import DECODE, TRUNCATED, Policy


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --decode, --max-pixels and --truncated."""
    parser.add_argument(
        "--decode",
        choices=DECODE,
        default="fast",
        help="JPEGs: fast decodes at the smallest scale that keeps three times the pixels needed along each side, "
        "exact in full (default: %(default)s)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="refuse images of more pixels (default: 178956970, where Pillow itself refuses)",
    )
    parser.add_argument(
        "--truncated",
        choices=TRUNCATED,
        help="JPEGs that end early: refuse them, or accept what is there, with a note "
        "(default: accept where at most a tenth is missing)",
    )


def policy_of(arguments: argparse.Namespace) -> Policy:
    """What the flags say, as the library takes it."""
    return Policy(decode=arguments.decode, max_pixels=arguments.max_pixels, truncated=arguments.truncated)
