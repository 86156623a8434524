"""`mlx-aimv2 info`: prints what an index, a checkpoint or an MLX folder holds."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mlx_aimv2.cli import show
from mlx_aimv2.commands.flags import MODEL, add_revision

HELP = "say what an index or a checkpoint holds"

EXAMPLE = "photos.db"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument_group("input").add_argument
    add("target", metavar="INDEX|MODEL", help=f"index that mlx-aimv2 embed wrote; {MODEL}")
    add_revision(add)

    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints one fact a line."""
    from mlx_aimv2.facts import about

    facts = about(arguments.target, revision=arguments.revision)
    if arguments.json:
        print(json.dumps(facts))
        return 0
    if facts.get("layer", 0) is None:
        facts["layer"] = "last, after the final norm"
        facts.pop("norm", None)
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        show(f"{name.replace('_', ' '):<{width}}  {_readable(value)}")
    return 0


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(part)}" for key, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(_readable(part) for part in value)
    return "-" if value is None else str(value)
