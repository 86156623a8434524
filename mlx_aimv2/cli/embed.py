"""`mlx-aimv2 embed`: brings an index up to date with the images that are there now."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlx_aimv2.backend.device import AUTO
from mlx_aimv2.cli.flags import OF_INDEX, PATCHES, add_dtype, add_policy_arguments, add_revision, add_rules, policy_of
from mlx_aimv2.cli.output import begin, note, progress, say, show
from mlx_aimv2.files import expand_user

PIXEL_BLOCKS = 4
"""Blocks of 16 MB that Pillow keeps: without, Linux hands out every page of every image anew, a fifth of the time of
decoding 12 megapixels exactly; eight are no faster."""


def add_embed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("paths", nargs="+", metavar="PATH", help="folder, image or pattern; - reads names from stdin, by line or NUL")
    add_rules(add)
    add("--prune", action="store_true", help="drop images from the index whose files under PATH are gone")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="MODEL", help=OF_INDEX)
    add_revision(add)
    add_dtype(add, f"the index's own, else {AUTO}")

    add = parser.add_argument_group("what is stored of an image").add_argument
    words = "mean or head, or all: tokens, map (default: head if there is one, else mean)"
    add("--pool", choices=("mean", "head", "tokens", "map"), metavar="NAME", help=words)
    words = "hidden state, as in transformers (default: the last, after the final norm)"
    add("--layer", type=int, metavar="N", help=words)
    add("--norm", action="store_true", help="with --layer: apply the final norm to it")
    words = "float16 or float32, of the vectors (default: float16)"
    add("--store", choices=("float16", "float32"), metavar="NAME", help=words)

    add = parser.add_argument_group("reading images").add_argument
    add("--max-patches", type=int, metavar="N", help=f"{PATCHES} (default: 4096)")
    add("--threads", type=int, metavar="N", help="threads that decode (default: one for each core)")
    add_policy_arguments(add)

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", required=True, type=Path, metavar="FILE", help="index to make or to update")
    words = "npz, safetensors or jsonl: write the vectors beside the index, too"
    add("--export", choices=("npz", "safetensors", "jsonl"), metavar="NAME", help=words)
    add("--overwrite", action="store_true", help="let --export replace any other file, but no image")
    add("--json", action="store_true", help="print the summary as JSON")


def run_embed(arguments: argparse.Namespace) -> int:
    """Embeds, and prints the summary; returns 1 when some images failed."""
    begin("scanning")
    from PIL import Image

    from mlx_aimv2.embed.encode import Settings
    from mlx_aimv2.embed.job import Options, update_index
    from mlx_aimv2.images.find import counted

    if "PILLOW_BLOCKS_MAX" not in os.environ:
        core: Any = Image.core  # type: ignore[attr-defined]
        core.set_blocks_max(PIXEL_BLOCKS)
    started = time.monotonic()
    output = expand_user(arguments.output)
    given = vars(arguments) | {"policy": policy_of(arguments)}
    settings = Settings(**{one.name: given[one.name] for one in fields(Settings)})
    options = Options(**{one.name: given[one.name] for one in fields(Options)})
    with progress() as on_progress:
        summary = update_index(arguments.paths, output, settings, options, report=say, on_progress=on_progress)
    if summary is None:
        return 0  # mlx.launch would end rank 0 if another one failed before it
    counts = asdict(summary)
    is_made, passed_over = counts.pop("is_made"), counts.pop("passed_over")
    if passed_over:
        note(f"skipped: {counted(passed_over)}")
    if arguments.json:
        seconds = round(time.monotonic() - started, 3)
        print(json.dumps({"index": str(output), **counts, "passed_over": passed_over, "seconds": seconds}))
    elif is_made:
        parts = [f"{count:,} {name}" for name, count in counts.items() if name != "images" and count]
        show(f"{output}: {summary.images:,} images ({', '.join(parts) or 'nothing to do'})")
    if not is_made:
        say(f"no image could be embedded; {output} was not made")
    return 1 if summary.failed else 0
