"""`mlx-aimv2 info`: prints what an index, a checkpoint or an MLX folder holds, without reading weights."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mlx_aimv2.cli.flags import MODEL, add_revision
from mlx_aimv2.cli.output import aligned, show
from mlx_aimv2.config import DTYPES, Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig, dtype_name
from mlx_aimv2.files import expand_user, read_start

HELP = "show what an index or a checkpoint contains"

EXAMPLE = "photos.db"

SQLITE = b"SQLite format 3\0"

Facts = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument_group("input").add_argument
    add("target", metavar="INDEX|MODEL", help=f"index written by mlx-aimv2 embed; {MODEL}")
    add_revision(add)

    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints one fact a line."""
    facts = about(arguments.target, revision=arguments.revision)
    if arguments.json:
        print(json.dumps(facts))
        return 0
    if facts.get("layer", 0) is None:
        facts["layer"] = "last, after the final norm"
        facts.pop("norm", None)
    for line in aligned({name.replace("_", " "): _readable(value) for name, value in facts.items()}):
        show(line)
    return 0


def about(target: str, *, revision: str | None = None) -> Facts:
    """Facts by their names: `an index's path, a folder, a weight file or a Hub name -> dictionary for JSON`."""
    path = expand_user(target)
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is an empty file")
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe would wait for ever
        raise ValueError(f"{path} is neither a file nor a folder: give an index, a checkpoint or a Hub name")
    return _about_index(path) if _is_database(path) else _about_checkpoint(target, revision)


def _about_index(path: Path) -> Facts:
    """What an index holds and how it was made."""
    from mlx_aimv2.index.reader import AXES, Index

    with Index.open(path) as index:
        made = index.provenance
        folders = {os.path.dirname(name) for name in index.paths()}  # noqa: PTH120 - a Path each would take longer
        return {
            "index": str(path),
            "images": len(index),
            "folders": len(folders),
            "holds": f"{AXES[index.axes]} for each image, width {index.width}, {index.dtype}",
            "bytes": path.stat().st_size,
            **made,
            "weights": weights.get("digest") if isinstance(weights := made.get("weights"), dict) else None,
        }


def _about_checkpoint(name: str, revision: str | None) -> Facts:
    """What a checkpoint holds, from its config.json and the headers of its weight files."""
    from mlx_aimv2.loading import read_source

    source = read_source(name, revision=revision)
    config, origin = source.config, source.origin
    pair = config if isinstance(config, Aimv2Config) else None
    vision, text = config.vision, pair.text_config if pair else None
    dtypes = sorted({dtype_name(array.dtype) for array in source.weights.values()} & set(DTYPES))
    text_only = {"vocabulary": text.vocab_size, "context": text.max_position_embeddings} if text else {}
    parameters = source.parameters
    size = vision.image_size
    return {
        "checkpoint": origin.repo or str(origin.folder),
        "commit": origin.commit,
        "layout": source.layout,
        "encoders": "vision and text" if pair else "vision",
        "images": f"{size}x{size} pixels, {vision.num_patches} tokens" if size else "any size (native)",
        **_sizes(vision),
        "intermediate": vision.intermediate_size,
        "patch": vision.patch_size,
        "pooling_head": vision.use_head,
        "projection": pair.projection_dim if pair else None,
        "text": _sizes(text) | text_only if text else None,
        "parameters": parameters,
        "bytes": source.stored_bytes,
        "bits_per_weight": round(8 * source.stored_bytes / parameters, 3),
        "dtype": ", ".join(dtypes),
        "quantization": dict(source.quantization) if source.quantization is not None else None,
    }


def _sizes(config: Aimv2VisionConfig | Aimv2TextConfig) -> Facts:
    return {"width": config.hidden_size, "blocks": config.num_hidden_layers, "heads": config.num_attention_heads}


def _is_database(path: Path) -> bool:
    try:
        return read_start(path, max_bytes=len(SQLITE)) == SQLITE
    except (OSError, ValueError):  # a folder, or not there
        return False


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
