"""How does a PyTorch checkpoint become an MLX folder: names, dtype, folder?

checkpoint -> names -> dtype -> folder; arrays stay lazy until they are written, so memory holds one shard.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2 import folder
from mlx_aimv2.loading import DTYPES, Source, parse_dtype, read_source

HELP = "convert a checkpoint to an MLX folder"
DEFAULT_PATH = "mlx_model"


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = DEFAULT_PATH,
    *,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Converts a checkpoint: `Hub name, folder or weight file -> MLX folder`, whose path is returned.

    `dtype` None keeps the checkpoint's. `log` receives progress lines. Raises FileExistsError when `mlx_path` exists,
    and ValueError, FileNotFoundError or ConnectionError, each with one line, for a source that cannot be used. Nothing
    stands at `mlx_path` unless the conversion was complete.
    """
    wanted, target = parse_dtype(dtype), Path(mlx_path)
    folder.check_target(target)
    log("[INFO] Loading")
    source = read_source(hf_path, revision=revision)
    with folder.appearing(target) as place:
        config = source.config.to_dict() | _torch_dtype(source, wanted)
        folder.save_weights(place, _in_dtype(source, wanted))
        folder.save_config(place, config)
        folder.copy_companions(source.origin.folder, place)
    return target


def _in_dtype(source: Source, dtype: mx.Dtype | None) -> Iterator[tuple[str, mx.array]]:
    """Each tensor in turn, taken out of the source so that it can be freed."""
    for name in sorted(source.weights):
        array = source.weights.pop(name)
        yield name, array.astype(dtype) if dtype is not None else array


def _torch_dtype(source: Source, dtype: mx.Dtype | None) -> dict[str, Any]:
    found = dtype or next(iter(source.weights.values())).dtype
    return {"torch_dtype": next(name for name, known in DTYPES.items() if known == found)}


def main(argv: list[str] | None = None) -> int:
    """The command line of the converter; returns the exit code."""
    from mlx_aimv2.cli import one_line_errors

    parser = argparse.ArgumentParser(prog="mlx_aimv2.convert", description="Convert an AIMv2 checkpoint to MLX.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return one_line_errors(lambda: run(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The converter's flags, which are the keywords of `convert`."""
    parser.add_argument(
        "--hf-path", "--model", required=True, metavar="X", help="Hub name, checkpoint folder or weight file"
    )
    parser.add_argument("--mlx-path", default=DEFAULT_PATH, metavar="Y", help="folder to write (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: Apple's release, pinned)")


def run(arguments: argparse.Namespace) -> int:
    """Converts as the flags say and prints where the result lies."""
    target = convert(
        arguments.hf_path,
        arguments.mlx_path,
        dtype=arguments.dtype,
        revision=arguments.revision,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
