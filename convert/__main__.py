"""Converts all released checkpoints, in every precision that is published.

    python -m convert                                    every row, every variant, into mlx_models/
    python -m convert aimv2-large-patch14-224 --variants fp16 8bit
    python -m convert --upload somebody                  and each folder to somebody/NAME-VARIANT

A folder that exists is left as it is and only uploaded, so the run can be stopped and started again. A failure is named
and the rest goes on; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert.published import FILE, Row, choose, read
from mlx_aimv2.checkpoint import hub
from mlx_aimv2.cli.dispatch import one_line_errors
from mlx_aimv2.conversion.folder import WRITTEN
from mlx_aimv2.convert import convert

VARIANTS: dict[str, Mapping[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "8bit": {"quantize": True, "q_bits": 8, "dtype": "bfloat16"},
    "6bit": {"quantize": True, "q_bits": 6, "dtype": "bfloat16"},
    "4bit": {"quantize": True, "q_bits": 4, "dtype": "bfloat16"},
}
"""What is published of each checkpoint: the end of the folder's name -> keywords of `convert`."""


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convert", description="Convert every released checkpoint.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="checkpoints (default: all in the list)")
    parser.add_argument("--list", type=Path, default=FILE, metavar="TOML", help="the list (default: published.toml)")
    parser.add_argument("--out", type=Path, default=Path("mlx_models"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["bf16", "fp16", "8bit", "4bit"])
    parser.add_argument("--calibration", metavar="DIR", help="images for the fidelity report (default: four bundled)")
    parser.add_argument("--upload", metavar="OWNER", help="upload each folder to OWNER/NAME-VARIANT")
    arguments = parser.parse_args(argv)
    return one_line_errors(lambda: run(arguments))


def run(
    arguments: argparse.Namespace, *, log: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> int:
    """Converts as asked, prints one line for each folder, and returns the exit code."""
    rows, _ = read(arguments.list)
    failed = 0
    for row in choose(rows, arguments.names):
        for variant in arguments.variants:
            target = arguments.out / f"{row.name}-{variant}"
            log(f"[INFO] {target}")
            try:
                print(f"{target}: {_make(row, variant, target, arguments, log)}")
            except (ValueError, OSError) as error:
                failed += 1
                print(f"{target}: failed: {' '.join(str(error).split())}")
    return 1 if failed else 0


def _make(row: Row, variant: str, target: Path, arguments: argparse.Namespace, log: Callable[[str], None]) -> str:
    """Converts and uploads one variant as far as that has not been done; returns what was done."""
    repo = f"{arguments.upload}/{target.name}" if arguments.upload else None
    if target.exists():
        to = f", uploaded to {hub.upload(target, repo, patterns=WRITTEN)}" if repo else ""
        return f"is there already{to}"
    target.parent.mkdir(parents=True, exist_ok=True)
    convert(
        row.repo,
        target,
        revision=row.commit,
        calibration=arguments.calibration,
        upload_repo=repo,
        log=log,
        **VARIANTS[variant],
    )
    return "written"


if __name__ == "__main__":
    sys.exit(main())
