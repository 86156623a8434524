"""The files of an MLX folder: weights in one file or in numbered shards, their index, config.json, auxiliary files."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2.checkpoint.read import AUXILIARY_FILES, CONFIG_FILE, INDEX_FILE
from mlx_aimv2.conversion import safetensors_file
from mlx_aimv2.files import check_size, read_bytes, write_json

SHARD_BYTES = 5 << 30
"""A file of weights is closed before it passes this size, as mlx-lm does."""

CARD_FILE = "README.md"

WRITTEN = (CONFIG_FILE, INDEX_FILE, "model*.safetensors", CARD_FILE, "fidelity.json", *AUXILIARY_FILES)
"""Files that a converted folder may hold."""

METADATA = {"format": "mlx"}


def save_weights(
    folder: Path,
    weights: Iterable[tuple[str, mx.array]],
    *,
    metadata: dict[str, str] = METADATA,
    shard_bytes: int = SHARD_BYTES,
    total_parameters: int | None = None,
    index_one_file: bool = True,
) -> int:
    """Writes lazy tensors as one file or as numbered shards, with the index; returns the bytes of all tensors.

    One tensor after another is computed, written and freed. `total_parameters` is for the index where packed tensors
    hold more numbers than they have elements. PyTorch's readers want no index beside one file (`index_one_file`).
    """
    shards: list[dict[str, mx.array]] = [{}]
    held = total_size = elements = 0
    for name, array in weights:
        if shards[-1] and held + array.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = array
        held += array.nbytes
        total_size += array.nbytes
        elements += array.size
    count = len(shards)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        safetensors_file.write(folder / file, shard, metadata=metadata)
    if count == 1 and not index_one_file:
        return total_size
    about = {"total_size": total_size, "total_parameters": total_parameters or elements}
    write_json(folder / INDEX_FILE, {"metadata": about, "weight_map": dict(sorted(weight_map.items()))})
    return total_size


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json with sorted keys."""
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def is_own(folder: Path) -> bool:
    """Whether a conversion wrote this folder: its card says so, and it holds nothing but files of a checkpoint."""
    try:
        card = read_bytes(folder / CARD_FILE)
        names = [entry.name for entry in folder.iterdir() if not entry.is_dir() or entry.is_symlink()]
        is_flat = len(names) == sum(1 for _ in folder.iterdir())
    except (OSError, ValueError):
        return False
    return is_flat and b"by mlx-aimv2 " in card and all(any(map(Path(name).match, WRITTEN)) for name in names)


def copy_auxiliary_files(source: Path, folder: Path) -> None:
    """Copies what belongs to a checkpoint beside its weights (preprocessing, tokenizer, licence).

    Raises FileNotFoundError for a source that is gone.
    """
    for pattern in AUXILIARY_FILES:
        for file in sorted(source.glob(pattern)):
            if not file.is_file() or (folder / file.name).exists():
                continue
            if not _is_inside(file, source):
                warnings.warn(f"{file} is a link that leads out of the checkpoint: it is left out", stacklevel=2)
                continue
            check_size(file)
            shutil.copyfile(file, folder / file.name)
    if not (source / CONFIG_FILE).is_file():  # weights that were open could still be read, the rest could not
        raise FileNotFoundError(f"{source} vanished while it was read; nothing was written")


def _is_inside(file: Path, source: Path) -> bool:
    """Whether a file, or what it is a link to, lies in the checkpoint.

    That is its folder, the one in which its config.json really lies, or the repository in the Hub's cache: a link in a
    stranger's folder could lead to a private file, which would be published with the result.
    """
    roots = {Path(os.path.realpath(source)), Path(os.path.realpath(source / CONFIG_FILE)).parent}
    repository = Path(os.path.realpath(source)).parents[1:2]
    roots |= {place for place in repository if place.name.startswith("models--")}
    return not roots.isdisjoint(Path(os.path.realpath(file)).parents)
