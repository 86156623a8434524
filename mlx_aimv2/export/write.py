"""Exports a model, or a head with its encoder, to one file that an app loads, with its description beside it.

MLX's exported functions, .mlxfn, are loaded in Swift by `importFunction` and in C++ by `mx::import_function`.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2.backend.device import machine
from mlx_aimv2.conversion.folder import copy_beside
from mlx_aimv2.export import coreml
from mlx_aimv2.export.encoder import INPUTS, OUTPUTS, Exported, prepare
from mlx_aimv2.files import check_target, expand_user, read_bytes, temporary_folder, write_json

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "ACKNOWLEDGEMENTS*")

TOLERANCE = 1e-3
"""How far a written function's outputs may be from the model's: the operations are the same."""


def export(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    output: str | None = None,
    batch: Sequence[int] = (1,),
    image_size: int | None = None,
    grid: tuple[int, ...] | None = None,
    input: str | None = None,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
) -> Path:
    """Writes an encoder for programs without Python: `Hub name, checkpoint or HEAD -> file`, whose path is returned.

    A `path` ending in .mlxfn becomes a function for MLX in Swift and C++, for the device of this machine (for Metal,
    make it on a Mac); one ending in .mlpackage a Core ML model in float16 or float32, which takes one image or text and
    keeps 4 and 8 bits. `output` is image (None: one vector per image, from a pair too), tokens, both or text; a folder
    written by `fit` gives class probabilities. `batch` lists the numbers of images or texts per call. `image_size` is
    `load`'s, `grid` the rows and columns of patches for a native checkpoint, which otherwise takes 224 pixels a side.
    `input` is float (None), the processor's pixels, or uint8, normalised inside; a Core ML model takes an image.
    `dtype` None keeps the checkpoint's, float16 for Core ML. Next to the file are its description (same name, .json),
    the licence, and for text tokenizer.json.

    Raises FileExistsError if one of these exists with other content, and ValueError, FileNotFoundError, OSError or
    ConnectionError, each with one line. The file is written completely or not at all.
    """
    target = expand_user(path)
    _check_flags(target, output=output, batch=batch, image_size=image_size, grid=grid, input=input, dtype=dtype)
    for_core_ml = target.suffix == ".mlpackage"
    check_target(target)
    exported = prepare(
        model,
        output,
        "uint8" if for_core_ml else input or "float",
        grid if image_size is None else image_size,
        dtype=dtype or ("float16" if for_core_ml else None),
        revision=revision,
        keep_quantized=for_core_ml,
    )
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as place:
        described = WRITERS[target.suffix](exported, place / target.name, batch)
        write_json(place / f"{target.stem}.json", described)
        copy_beside(place, exported.loaded.source, LICENCES)
        if exported.text is not None and (tokenizer := exported.processor.tokenizer) is not None:
            (place / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
        elif exported.text is not None:
            warnings.warn(f"{model} has no tokenizer: you have to make the ids yourself", stacklevel=2)
        _move(place, target)
    return target


def _check_flags(
    target: Path,
    *,
    output: str | None,
    batch: Sequence[int],
    image_size: int | None,
    grid: tuple[int, ...] | None,
    input: str | None,
    dtype: str | mx.Dtype | None,
) -> None:
    """Raises ValueError for flags that contradict each other or the kind of file, before anything is read."""
    counts, for_core_ml = ",".join(map(str, batch)), target.suffix == ".mlpackage"
    of_core_ml = (None, "float16", "float32", mx.float16, mx.float32)
    faults = {
        f"-o must end in {' or '.join(WRITERS)}, got {target.name}": target.suffix not in WRITERS,
        f"--batch must be different numbers above 0, such as 1,4,16; got {counts}": (
            not batch or min(batch) < 1 or len(set(batch)) < len(batch)
        ),
        f"-o {target} is not UTF-8, which MLX cannot write: choose another name": (
            str(target).encode(errors="ignore").decode() != str(target)
        ),
        f"--output must be {', '.join(OUTPUTS)}, got {output}": output not in (None, *OUTPUTS),
        f"--input must be {' or '.join(INPUTS)}, got {input}": input not in (None, *INPUTS),
        "--input is for .mlxfn, a .mlpackage takes an image: leave it out": for_core_ml and input is not None,
        ".mlpackage takes float16 or float32: choose one with --dtype": for_core_ml and dtype not in of_core_ml,
        "choose one of --image-size and --grid": image_size is not None and grid is not None,
        "--image-size, --grid and --input are for images: leave them out of --output text": (
            output == "text" and (image_size is not None or grid is not None or input is not None)
        ),
    }
    for message, is_met in faults.items():
        if is_met:
            raise ValueError(message)


def _move(place: Path, target: Path) -> None:
    """Moves the files in `place` next to `target`, the target last; an identical existing file stays."""
    files = {target.parent / file.name: file for file in sorted(place.iterdir()) if file.name != target.name}
    new = {path: file for path, file in files.items() if not path.is_file() or read_bytes(path) != read_bytes(file)}
    for path in (*new, target):
        check_target(path)
    for path, file in (new | {target: place / target.name}).items():
        for one in filter(Path.is_file, (file, *file.rglob("*"))):
            with one.open("rb") as stream:
                os.fsync(stream.fileno())
        file.rename(path)


def _write_function(exported: Exported, path: Path, batches: Sequence[int]) -> dict[str, Any]:
    """Writes a function for each batch and runs the smallest: `-> its description`.

    The weights must be contiguous, as `load` makes them: MLX writes the bytes of a view without its strides.

    Raises OSError for a full disk, RuntimeError if MLX reads back other values.
    """
    for module in filter(None, (exported.loaded.model, exported.vision, exported.head)):
        mx.eval(module.parameters())
    # Noise, or empty texts.
    examples = [mx.random.uniform(0, 255, (batch, *exported.shape), key=mx.random.key(0)) for batch in sorted(batches)]
    if exported.text is not None:
        examples = [mx.full(x.shape, exported.text.config.eos_token_id) for x in examples]
    examples = [x.astype(getattr(mx, exported.dtype)) for x in examples]
    exporter: Any = mx.exporter
    try:
        with exporter(str(path), exported) as write:
            for x in examples:
                write(x)
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, f"{path.name} cannot be written") from error
    imported: Any = mx.import_function(str(path))
    outputs: list[mx.array] = imported(examples[0])
    for one, other in zip(outputs, exported(examples[0]), strict=True):
        if not mx.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE):
            raise RuntimeError(f"MLX reads other values from {path.name} than the model's")
    return exported.describe(batches, dict(zip(exported.outputs, outputs, strict=True)), device=machine().kind)


WRITERS: dict[str, Callable[[Exported, Path, Sequence[int]], dict[str, Any]]] = {
    ".mlxfn": _write_function,
    ".mlpackage": coreml.write,
}
"""Suffix of the file -> its writer: `exported, its path, batches -> what a caller must know`."""
