"""The flags that several verbs share, worded the same everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args, get_type_hints

from mlx_aimv2.backend.device import AUTO
from mlx_aimv2.config import DTYPES
from mlx_aimv2.images import DECODE, TRUNCATED, Policy
from mlx_aimv2.train.settings import flag, flagged

Add: TypeAlias = Callable[..., Any]
"""`add_argument` of a parser or of a group of flags."""

Settings = TypeVar("Settings")

MODEL = "Hub name, folder or weight file"

OF_INDEX = f"{MODEL} (default: the index's own)"

REVISION = "branch, tag or commit"

PATCHES = "native checkpoints: scale larger images down"

REPEATED = "may be repeated"


def add_revision(add: Add, default: str = "Apple's release, pinned") -> None:
    """Adds --revision; `default` says what None means."""
    add("--revision", metavar="NAME", help=f"{REVISION} (default: {default})")


def add_dtype(add: Add, own: str | None = None) -> None:
    """Adds --dtype for computing; without `own`, which says what None means, the default is `auto`."""
    words = f"{', '.join(DTYPES)} or {AUTO} (default: {own or AUTO})"
    add("--dtype", choices=(*DTYPES, AUTO), default=None if own else AUTO, metavar="NAME", help=words)


def add_image_size(add: Add, default: str = "the checkpoint's") -> None:
    """Adds --image-size; `default` says what None means."""
    words = f"image side in pixels; positions are resampled (default: {default})"
    add("--image-size", type=int, metavar="N", help=words)


def add_resume(add: Add) -> None:
    """Adds --resume."""
    add("--resume", action="store_true", help="resume a run that was stopped")


def add_skip_broken(add: Add, *, default: bool = False) -> None:
    """Adds --skip-broken and --no-skip-broken."""
    words = f"skip images that cannot be read, or refuse them (default: {'skip' if default else 'refuse'})"
    add("--skip-broken", action=argparse.BooleanOptionalAction, default=default, help=words)


def add_rules(add: Add) -> None:
    """Adds --exclude and --include."""
    for name, words in (
        ("--exclude", "skip what matches: *.png, Trash/"),
        ("--include", "include matching files even if excluded, hidden or with another suffix"),
    ):
        add(name, action="append", default=[], metavar="PATTERN", help=f"{words}; {REPEATED}")


def add_policy_arguments(add: Add) -> None:
    """Adds --decode, --max-pixels and --truncated."""
    words = "decode JPEGs fast (reduced size) or exact (full size) (default: %(default)s)"
    add("--decode", choices=DECODE, default="fast", metavar="NAME", help=words)
    add("--max-pixels", type=int, metavar="N", help="refuse larger images (default: 178956970, Pillow's limit)")
    words = "accept or refuse truncated JPEGs (default: %(default)s)"
    add("--truncated", choices=TRUNCATED, default="accept", metavar="NAME", help=words)


def add_found(group: argparse._ArgumentGroup, *, paths: str, objects: str) -> None:
    """Adds the output flags for images found: --paths-only, --null or --json, and --html, --overwrite, --open."""
    add = group.add_mutually_exclusive_group().add_argument
    add("-f", "--paths-only", action="store_true", help=f"print {paths}, one per line")
    add("--null", action="store_true", help=f"or -0: print {paths}, each followed by a NUL, for xargs -0")
    add("--json", action="store_true", help=f"print {objects}")
    add = group.add_argument
    add("--html", type=Path, metavar="FILE", help="write a page with thumbnails")
    add("--overwrite", action="store_true", help="let --html replace any file except an image")
    add("--open", action="store_true", help="open that page in the browser")


def add_chosen(add: Add) -> None:
    """Adds the flags that choose images of an index: --under, --after and --before."""
    add("--under", type=Path, metavar="DIR", help="only images in this folder and below it")
    words = "only images taken from this day, month or year on: 2024-05-17, 2024-05, 2024"
    add("--after", metavar="DATE", help=f"{words} (by EXIF, else the file's time)")
    add("--before", metavar="DATE", help="only images taken before this day, month or year")


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same flags as keywords of `Index.search` and `find_duplicates`."""
    return {name: getattr(arguments, name) for name in ("under", "after", "before")}


def policy_of(arguments: argparse.Namespace) -> Policy:
    """The flags as the library's `Policy`."""
    return Policy(decode=arguments.decode, max_pixels=arguments.max_pixels, truncated=arguments.truncated)


def whole_numbers(text: str) -> tuple[int, ...]:
    """`1,4,16` as numbers."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted whole numbers such as 3,5, got {text!r}") from None


def groups(parser: argparse.ArgumentParser, *titles: str) -> dict[str, Add]:
    """Groups of flags in the order of the help, `{title: its add_argument}`."""
    return {title: parser.add_argument_group(title).add_argument for title in titles}


def add_settings(add: Mapping[str, Add], *kinds: type) -> None:
    """Adds a flag for each field of these dataclasses that has one, in its group, with the type of its annotation."""
    for kind in kinds:
        hints = get_type_hints(kind)
        for one in flagged(kind):
            about, words = one.metadata, one.metadata["help"]
            default: Any = one.default
            type_, *_ = get_args(hints[one.name]) or (hints[one.name],)  # first of int | None and tuple[int, int]
            if type_ is bool:
                action = "store_false" if default else "store_true"
                add[about["group"]](flag(one), dest=one.name, action=action, help=words)
                continue
            count = len(default) if isinstance(default, tuple) else None
            if default is not None and "(default" not in words:
                shown = " ".join(map(str, default)) if count else f"{default:g}" if type_ is float else default
                words += f" (default: {shown})"
            add[about["group"]](
                flag(one),
                type=type_,
                nargs=count,
                default=default,
                choices=about["choices"],
                metavar=about["metavar"] or {int: "N", float: "X"}.get(type_, "NAME"),
                help=words,
            )


def settings_of(kind: type[Settings], arguments: argparse.Namespace, **others: Any) -> Settings:
    """The dataclass filled from the flags; `others` are the fields without a flag."""
    given = {one.name: getattr(arguments, one.name) for one in flagged(kind)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return kind(**given, **others)
