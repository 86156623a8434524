"""What is an MLX folder: the files of a converted checkpoint, written whole or not at all?

`config.json`, `model.safetensors` (or numbered shards), `model.safetensors.index.json`, and whatever the source carried
beside its weights. Everything is written into a hidden folder beside the target, which is renamed when it is complete.
A process that is killed leaves its hidden folder behind; the next one that writes to the same target removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2.checkpoint.read import AUXILIARY_FILES, CONFIG_FILE, INDEX_FILE
from mlx_aimv2.conversion import safetensors_file

SHARD_BYTES = 5 << 30
"""A file of weights is closed before it passes this size, as mlx-lm does."""

METADATA = {"format": "mlx"}

UNFINISHED = ".unfinished"
"""How the name of a hidden folder ends while it is being written."""


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
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, path.name)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=parent))
    lock = _locked(beside)
    try:
        yield beside
        beside.chmod(0o777 & ~_umask())  # mkdtemp's folders are private, a result is as public as its neighbours
        for file in beside.iterdir():
            _flush_to_disk(file)
        check_target(path)
        beside.rename(path)
    except OSError as error:
        if error.strerror is None:
            raise
        elsewhere = error.filename is not None and not str(error.filename).startswith(str(beside))
        what = error.filename if elsewhere else f"Cannot save to the path {path}"
        raise type(error)(f"{what}: {error.strerror}.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def save_weights(
    folder: Path,
    weights: Iterable[tuple[str, mx.array]],
    *,
    metadata: dict[str, str] = METADATA,
    shard_bytes: int = SHARD_BYTES,
    total_parameters: int | None = None,
) -> int:
    """Writes lazy tensors as one file or as numbered shards, with the index; returns the bytes of all tensors.

    One tensor after another is computed, written and freed. `total_parameters` is for the index where packed tensors
    hold more numbers than they have elements.
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
    about = {"total_size": total_size, "total_parameters": total_parameters or elements}
    write_json(folder / INDEX_FILE, {"metadata": about, "weight_map": dict(sorted(weight_map.items()))})
    return total_size


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json with sorted keys."""
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as the ecosystem does: four spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_auxiliary_files(source: Path, folder: Path) -> list[str]:
    """Copies what belongs to a checkpoint beside its weights (preprocessing, tokenizer, licence); returns the names."""
    copied = []
    for pattern in AUXILIARY_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
                copied.append(file.name)
    return copied


def _remove_abandoned(parent: Path, name: str) -> None:
    """Removes the hidden folders of processes that were killed: the lock of a folder ends with the process."""
    for folder in parent.glob(f".{glob.escape(name)}.*{UNFINISHED}"):
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, which ends with the process; None if another process holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
