"""What is an MLX folder: the files of a converted checkpoint, written whole or not at all?

`config.json`, `model.safetensors` (or numbered shards), `model.safetensors.index.json`, and whatever the source carried
beside its weights. Everything is written into a hidden folder beside the target, which is renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2.checkpoint import COMPANIONS, CONFIG_FILE, INDEX_FILE

SHARD_BYTES = 5 << 30
"""A file of weights is closed before it passes this size, as mlx-lm does."""

METADATA = {"format": "mlx"}


def check_target(path: Path) -> None:
    """Raises FileExistsError if something stands at the target, OSError if nothing can be written there."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"Cannot save to the path {path} as it already exists. Remove it or choose another.")
    parent = path.absolute().parent
    existing = next(place for place in (parent, *parent.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"Cannot save to the path {path}: {existing} cannot be written to. Choose another place.")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `path` only if the block ends well, and vanishes otherwise."""
    check_target(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        yield beside
        beside.chmod(0o777 & ~_umask())  # mkdtemp's folders are private, a result is as public as its neighbours
        for file in beside.iterdir():
            _flush_to_disk(file)
        check_target(path)
        beside.rename(path)
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        raise type(error)(f"Cannot save to the path {path}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save_weights(
    folder: Path,
    weights: Iterable[tuple[str, mx.array]],
    *,
    metadata: dict[str, str] = METADATA,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors as one file or as numbered shards, with the index, holding one shard in memory.

    `weights` gives `(name, array)` one after another; each array is evaluated when it comes and freed with its shard.
    """
    shards: list[list[str]] = []
    shard: dict[str, mx.array] = {}
    held = total_size = total_parameters = 0

    def close_shard() -> None:
        # The count of shards is known at the end, so the files get their final names then.
        mx.save_safetensors(str(folder / f"shard-{len(shards)}.safetensors"), shard, metadata=metadata)
        shards.append(list(shard))
        shard.clear()

    for name, array in weights:
        mx.eval(array)
        if shard and held + array.nbytes > shard_bytes:
            close_shard()
            held = 0
        shard[name] = array
        held += array.nbytes
        total_size += array.nbytes
        total_parameters += array.size
    close_shard()
    count = len(shards)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        final = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        (folder / f"shard-{i}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    metadata_of_index = {"total_size": total_size, "total_parameters": total_parameters}
    write_json(folder / INDEX_FILE, {"metadata": metadata_of_index, "weight_map": dict(sorted(weight_map.items()))})


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json with sorted keys."""
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as the ecosystem does: four spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies what belongs to a checkpoint beside its weights (preprocessing, tokenizer, licence); returns the names."""
    copied = []
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
                copied.append(file.name)
    return copied


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
