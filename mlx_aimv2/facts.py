"""Says what an index, a checkpoint or an MLX folder holds, without reading weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlx_aimv2.config import DTYPES, Aimv2Config, dtype_name
from mlx_aimv2.files import expand_user
from mlx_aimv2.index.reader import AXES, Index
from mlx_aimv2.loading import read_source

SQLITE = b"SQLite format 3\0"

Facts = dict[str, Any]


def about(target: str, *, revision: str | None = None) -> Facts:
    """Facts by their names: `an index's path, a folder, a weight file or a Hub name -> dictionary for JSON`."""
    path = expand_user(target)
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is an empty file")
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe would wait for ever
        raise ValueError(f"{path} is neither a file nor a folder: give an index, a checkpoint or a Hub name")
    return about_index(path) if _is_database(path) else about_checkpoint(target, revision)


def about_index(path: Path) -> Facts:
    """What an index holds and how it was made."""
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
    source = read_source(name, revision=revision)
    config, origin = source.config, source.origin
    vision = config.vision_config if isinstance(config, Aimv2Config) else config
    text = config.text_config if isinstance(config, Aimv2Config) else None
    dtypes = sorted({dtype_name(array.dtype) for array in source.weights.values()} & set(DTYPES))
    parameters = source.parameters
    held = sum(array.nbytes for array in source.weights.values())
    size = vision.image_size
    return {
        "checkpoint": origin.repo or str(origin.folder),
        "commit": origin.commit,
        "layout": source.layout,
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
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False
