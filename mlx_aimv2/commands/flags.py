"""The flags that several verbs share, in the same words everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

from mlx_aimv2.config import DTYPES
from mlx_aimv2.images import DECODE, TRUNCATED, Policy

Add: TypeAlias = Callable[..., Any]
"""`add_argument` of a parser or of a group of flags."""

MODEL = "Hub name, folder or weight file"

REVISION = "branch, tag or commit"

MAX_PATCHES = "native checkpoints: scale larger images down"

REPEATED = "may be repeated"

RESUME = "go on with a run that was stopped"

DTYPE = "float32, float16, bfloat16 or auto"


def add_revision(add: Add, default: str = "Apple's release, pinned") -> None:
    """Adds --revision; `default` says what None means."""
    add("--revision", metavar="NAME", help=f"{REVISION} (default: {default})")


def add_dtype(add: Add, default: str = "the checkpoint's") -> None:
    """Adds --dtype for computing; `default` says what None means."""
    add("--dtype", choices=(*DTYPES, "auto"), metavar="NAME", help=f"{DTYPE} (default: {default})")


def add_seed(add: Add) -> None:
    """Adds --seed."""
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")


def add_policy_arguments(add: Add) -> None:
    """Adds --decode, --max-pixels and --truncated."""
    add(
        "--decode",
        choices=DECODE,
        default="fast",
        metavar="NAME",
        help="JPEGs: fast, at a smaller scale, or exact, in full (default: %(default)s)",
    )
    add("--max-pixels", type=int, metavar="N", help="refuse larger images (default: 178956970, Pillow's limit)")
    add(
        "--truncated",
        choices=TRUNCATED,
        metavar="NAME",
        help="accept or refuse JPEGs cut short (default: accept up to a tenth missing)",
    )


def policy_of(arguments: argparse.Namespace) -> Policy:
    """What the flags say, as the library takes it."""
    return Policy(decode=arguments.decode, max_pixels=arguments.max_pixels, truncated=arguments.truncated)
