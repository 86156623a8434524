"""What does `mlx-aimv2 info` do: say what an index, a checkpoint or an MLX folder holds, without loading weights?"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from mlx_aimv2.find_images import shown

HELP = "say what an index or a checkpoint holds"

SQLITE = b"SQLite format 3\0"

Facts = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("target", metavar="X", help="index, MLX folder, checkpoint folder or file, or Hub name")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: Apple's release, pinned)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints one fact a line."""
    path = Path(os.path.expanduser(arguments.target))  # noqa: PTH111
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is an empty file")
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe would wait for ever
        raise ValueError(f"{shown(path)} is neither a file nor a folder: give an index, a checkpoint or a Hub name")
    facts = about_index(path) if _is_database(path) else about_checkpoint(arguments.target, arguments.revision)
    if arguments.json:
        print(json.dumps(facts))
        return 0
    if facts.get("layer", 0) is None:
        facts["layer"] = "last, after the final norm"
        facts.pop("norm", None)
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<{width}}  {_spelled(value)}")
    return 0


def about_index(path: Path) -> Facts:
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


def about_checkpoint(name: str, revision: str | None) -> Facts:
    """What a checkpoint holds, from its config.json and the headers of its weight files."""
    from mlx_aimv2.config import Aimv2Config
    from mlx_aimv2.loading import DTYPES, build, parameter_shapes, read_source

    source = read_source(name, revision=revision)
    config, origin = source.config, source.origin
    vision = config.vision_config if isinstance(config, Aimv2Config) else config
    text = config.text_config if isinstance(config, Aimv2Config) else None
    names = {value: name for name, value in DTYPES.items()}
    dtypes = sorted({names[array.dtype] for array in source.weights.values() if array.dtype in names})
    parameters = sum(math.prod(shape) for shape in parameter_shapes(build(config)).values())
    held = sum(array.nbytes for array in source.weights.values())
    size = vision.image_size
    return {
        "checkpoint": origin.repo or str(origin.folder),
        "commit": origin.commit,
        "layout": source.match.layout.name,
        "encoders": "vision and text" if text is not None else "vision",
        "images": f"{size}x{size} pixels, {vision.num_patches} tokens" if size else "any size (native)",
        "width": vision.hidden_size,
        "blocks": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "intermediate": vision.intermediate_size,
        "patch": vision.patch_size,
        "pooling_head": vision.use_head,
        "projection": config.projection_dim if isinstance(config, Aimv2Config) else None,
        "text": _text(text),
        "parameters": parameters,
        "bytes": held,
        "bits_per_weight": round(8 * held / parameters, 3),
        "dtype": ", ".join(dtypes),
        "quantization": dict(source.quantization) if source.quantization is not None else None,
    }


def _text(text: Any) -> Facts | None:
    if text is None:
        return None
    return {
        "width": text.hidden_size,
        "blocks": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "vocabulary": text.vocab_size,
        "context": text.max_position_embeddings,
    }


def _is_database(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_spelled(part)}" for key, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(_spelled(part) for part in value)
    return "-" if value is None else shown(str(value))
