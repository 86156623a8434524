"""Writes an index's embeddings to files that other tools read.

`vectors` in float32 as the model gave them, sorted by path: (P, D) for one vector per image; for tokens and maps all
tokens of all images one after another (T, D), with the counts per image in `shapes` (P, 1) or (P, 2). npz and
safetensors contain these arrays, the paths and the description of the index; jsonl has a line for each image. All
vectors are in memory, as for a search; for jsonl one image at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_aimv2.files import atomic_file, check_file
from mlx_aimv2.index.reader import Index


def export(index: Index, path: Path, *, kind: str) -> None:
    """Writes a whole index to a file: kind `npz`, `safetensors` or `jsonl`; a file of that name is replaced."""
    with atomic_file(path) as file:
        if kind == "jsonl":
            for entry in index.embeddings():
                line = {"path": entry.path, "sha256": entry.sha256.hex(), "vector": entry.vector.tolist()}
                file.write(json.dumps(line).encode() + b"\n")
            return
        arrays, paths = _arrays(index)
        provenance = json.dumps(index.provenance)
        if kind == "npz":
            np.savez(file, **arrays, paths=np.array(paths), provenance=np.array(provenance))
        else:
            save_file(arrays, file.name, {"paths": json.dumps(paths), "provenance": provenance})


def target(output: Path, kind: str, *, overwrite: bool = False, inputs: Iterable[str] = ()) -> Path:
    """Where the export of the index at `output` goes. Raises ValueError or OSError if it would do harm.

    The index and the `inputs` are never replaced; another file that is not an export only with `overwrite`.
    """
    path = output.with_suffix(f".{kind}")
    if output.suffix.lower() == f".{kind}" or (path.exists() and output.exists() and path.samefile(output)):
        raise ValueError(f"-o {output} is the name of its export: give the index another one, {output.stem}.db")
    start, signatures = SIGNATURES[kind]
    check_file(
        path,
        option="the export",
        is_own=lambda head: head[start:].startswith(signatures),
        overwrite=overwrite,
        inputs=[output, *inputs],
    )
    return path


SIGNATURES = {
    "npz": (30, (b"vectors.npy",)),
    # The second is that of releases which wrote the format themselves.
    "safetensors": (8, (b'{"__metadata__":{"p', b'{"__metadata__": {"paths": ')),
    "jsonl": (0, (b'{"path": ',)),
}
"""Kind -> by which bytes, one or the other, and where, a file is known as an export."""


def _arrays(index: Index) -> tuple[dict[str, Any], list[str]]:
    """`vectors` of all images one after another, `shapes` of tokens and maps, and the paths."""
    paths = list(index.paths())
    shapes = np.empty((len(paths), 0), np.int64)
    if index.axes > 1:
        shapes = np.array([index.vector(path).shape[:-1] for path in paths], np.int64).reshape(len(paths), -1)
    vectors = np.empty((int(shapes.prod(axis=1).sum()), index.width), np.float32)
    done = 0
    for entry in index.embeddings():
        part = entry.vector.reshape(-1, index.width)
        vectors[done : done + len(part)] = part
        done += len(part)
    return {"vectors": vectors} | ({"shapes": shapes} if index.axes > 1 else {}), paths
