"""Measures mlx_aimv2 beside other packages on this machine, with the same weights and the same pixels.

`python -m benchmarks.side_by_side [SIZE …] [--beside transformers apple timm] [--batch B …] [--dtype …] [--rounds N]
[--runs N] [--cpu]`, with the extra `parity` installed for transformers; benchmarks/README.md says how to install the
others. The contenders run in alternating processes, `rounds` times, so that other load on the machine affects all of
them. The ratio is the time of mlx_aimv2 over the time of the other, as the median over the rounds; below 1 mlx_aimv2
is faster. The features are compared too. torch runs where MLX does: on MPS on a Mac, on CUDA with an NVIDIA GPU,
otherwise and with --cpu on the CPU. There MLX uses OpenBLAS if it is installed; for mlx_aimv2 it has one thread on up
to eight x86 cores. The table is Markdown.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.contenders import CONTENDERS, TORCH_DEVICES, numbers
from benchmarks.machine import summary
from mlx_aimv2 import Aimv2Processor
from mlx_aimv2.backend import device
from mlx_aimv2.checkpoint.layouts import layout_for
from mlx_aimv2.config import released
from mlx_aimv2.conversion import folder as folders
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.loading import build, parameter_shapes

PACKAGE = "mlx_aimv2"
OTHERS = tuple(name for name in CONTENDERS if name != PACKAGE)
DTYPES = ("float32", "float16", "bfloat16")
ON_MLX = (PACKAGE, "apple")
DISTRIBUTIONS = {"transformers": ("torch", "transformers"), "timm": ("torch", "timm"), "apple": ("aim-v2",)}
HEAD = (
    "| model | dtype | images | compared with | mlx_aimv2, ms | other, ms | ratio | range over rounds "
    "| fastest, ms | other's fastest, ms | ratio of the fastest | difference |\n" + "|---" * 12 + "|"
)
MIN_SECONDS = 1.0
"""Warm-up and measuring each take at least this long: a GPU's first runs are slow, and a run may take milliseconds."""

OPENBLAS = Path(f"/usr/lib/{platform.machine()}-linux-gnu/libopenblas.so.0")


class Failed(Exception):
    """A contender could not encode; the message is the last line that it printed."""


def write_checkpoint(folder: Path, size: str) -> None:
    """Writes random weights of a released size in transformers' layout."""
    config = released(size).config.vision
    weights = ((name, _random(name, shape)) for name, shape in sorted(parameter_shapes(build(config)).items()))
    folders.save_weights(folder, layout_for("transformers", pair=False).to_source(weights), reader=folders.PYTORCH)
    folders.save_config(folder, folders.config_for(config, "transformers") | {"torch_dtype": "float32"})
    Aimv2Processor(published(config.image_size)).save_to(folder)
    mx.clear_cache()


def _random(name: str, shape: tuple[int, ...]) -> mx.array:
    if "norm" in name:
        return mx.random.uniform(0.5, 1.5, shape)
    return mx.random.normal(shape) * (0.02 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5)


def pixels(folder: Path, batch: int) -> np.ndarray:
    """The same random images for all contenders, `(B, 3, H, W)`."""
    side = json.loads((folder / "config.json").read_text())["image_size"]
    return np.random.default_rng(0).normal(size=(batch, 3, side, side)).astype(np.float32)


def measure(
    contender: str, folder: Path, batch: int, dtype: str, runs: int, kind: str
) -> tuple[list[float], np.ndarray]:
    """Seconds of each run after warming up, and the features."""
    encode = CONTENDERS[contender](folder, pixels(folder, batch), dtype, kind)

    def repeated(minimum: int) -> tuple[list[float], Any]:
        seconds: list[float] = []
        while len(seconds) < minimum or sum(seconds) < MIN_SECONDS:
            began = time.perf_counter()
            features = encode()
            seconds.append(time.perf_counter() - began)
        return seconds, features

    repeated(1)
    seconds, features = repeated(runs)
    return seconds, numbers(features)


def environment(contender: str) -> dict[str, str]:
    """This process's environment, with the BLAS and the number of BLAS threads that suit the contender."""
    variables = dict(os.environ)
    for name in ("LD_PRELOAD", "OPENBLAS_NUM_THREADS"):
        variables.pop(name, None)
    if contender in ON_MLX:
        variables["MLX_ENABLE_TF32"] = "0"  # torch, too, multiplies float32 in full
        if OPENBLAS.exists():
            variables["LD_PRELOAD"] = str(OPENBLAS)
        if device.suits_haswell():
            variables.setdefault("OPENBLAS_CORETYPE", "Haswell")
    if contender == PACKAGE and device.is_x86() and device.cpu_count() <= device.MAX_STREAMS:
        variables["OPENBLAS_NUM_THREADS"] = "1"
    return variables


def in_process(contender: str, folder: Path, batch: int, dtype: str, runs: int, kind: str) -> list[float]:
    """Runs one contender in a fresh process: seconds of each run. Raises Failed."""
    command = [sys.executable, "-m", "benchmarks.side_by_side", "--contender", contender, "--folder", str(folder)]
    command += ["--batch", str(batch), "--dtype", dtype, "--runs", str(runs), "--kind", kind]
    finished = subprocess.run(command, env=environment(contender), capture_output=True, text=True, check=False)
    if finished.returncode:
        print(finished.stderr, file=sys.stderr)
        raise Failed((finished.stderr.strip().splitlines() or [f"status {finished.returncode}"])[-1])
    seconds: list[float] = json.loads(finished.stdout.splitlines()[-1])
    return seconds


def print_table(arguments: argparse.Namespace) -> None:
    """Measures every size, dtype and batch on MLX's default device, and prints the table as it grows."""
    print(HEAD, flush=True)
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as place:
            write_checkpoint(Path(place), size)
            for dtype, batch in product(arguments.dtype, arguments.batch):
                for name, cells in compare(
                    Path(place), dtype, batch, arguments.beside, arguments.rounds, arguments.runs
                ):
                    print(f"| {' | '.join([size, dtype, str(batch), name, *cells])} |", flush=True)


def compare(
    folder: Path, dtype: str, batch: int, beside: list[str], rounds: int, runs: int
) -> Iterator[tuple[str, list[str]]]:
    """The name of each other contender with its cells of the table. One that fails does not stop the others."""
    kind = device.machine().kind
    times: dict[str, list[list[float]]] = {name: [] for name in (PACKAGE, *beside)}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for name, so_far in times.items():
            try:
                if name not in failures:
                    so_far.append(in_process(name, folder, batch, dtype, runs, kind))
            except Failed as failure:
                failures[name] = f"{name} failed: {failure}"
        last = {name: f"{min(so_far[-1]):.4f} s" for name, so_far in times.items() if name not in failures}
        print(batch, dtype, last, file=sys.stderr)
    for name in beside:
        if failure := failures.get(PACKAGE) or failures.get(name):
            yield name, [failure.replace("|", "/"), *[""] * 7]
            continue
        features, others = (np.load(folder / f"{contender}.npy") for contender in (PACKAGE, name))
        difference = np.linalg.norm(features - others) / np.linalg.norm(others)
        yield name, [*_cells(times[PACKAGE], times[name]), f"{difference:.1e}"]


def _cells(package: list[list[float]], other: list[list[float]]) -> list[str]:
    """Medians, ratios of the rounds and fastest runs, from the seconds of every run of every round."""
    medians = [[statistics.median(seconds) for seconds in rounds] for rounds in (package, other)]
    ratios = [numerator / denominator for numerator, denominator in zip(*medians, strict=True)]
    fastest = [min(map(min, rounds)) for rounds in (package, other)]
    return [
        *(f"{statistics.median(of_rounds) * 1e3:.1f}" for of_rounds in medians),
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        *(f"{seconds * 1e3:.1f}" for seconds in fastest),
        f"{fastest[0] / fastest[1]:.2f}",
    ]


def machine(beside: list[str]) -> str:
    """Processor, cores and versions, for the line above the table."""
    on = device.machine()
    names = dict.fromkeys(name for contender in beside for name in DISTRIBUTIONS[contender])
    versions = [f"{name} {_version(name)}" for name in names]
    where = f"; torch on {TORCH_DEVICES[on.kind]}" if "torch" in names else ""
    return f"{summary()}; {', '.join([f'mlx {device.mlx_build()}', *versions])}{where}"


def fixed_size(name: str) -> str:
    """The name of a released size whose images have one size, for argparse."""
    try:
        config = released(name).config.vision
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if config.is_native:
        raise argparse.ArgumentTypeError(
            f"{name} takes images of any size; give one of a fixed size, as large-patch14-224"
        )
    return name


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def add_arguments(parser: argparse.ArgumentParser, sizes: list[str], dtypes: list[str], batches: list[int]) -> None:
    """Adds the flags that say what to compare, with these defaults; `report` has the same."""
    parser.add_argument(
        "sizes", nargs="*", type=fixed_size, default=sizes, metavar="SIZE", help=f"released sizes ({' '.join(sizes)})"
    )
    parser.add_argument("--dtype", nargs="+", default=dtypes, choices=DTYPES, help=f"dtypes ({' '.join(dtypes)})")
    parser.add_argument(
        "--batch",
        nargs="+",
        type=int,
        default=batches,
        metavar="B",
        help=f"images at once ({' '.join(map(str, batches))})",
    )
    parser.add_argument("--beside", nargs="+", default=["transformers"], choices=OTHERS, help="others (transformers)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="alternating processes of each (5)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs in a process, for at least a second (5)")


def main() -> None:
    parser = argparse.ArgumentParser(description="mlx_aimv2 beside other packages")
    add_arguments(parser, ["large-patch14-224"], ["float32"], [1, 4])
    parser.add_argument("--cpu", action="store_true", help="run all contenders on the CPU")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=TORCH_DEVICES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contender, folder = arguments.contender, arguments.folder
        batch, dtype = arguments.batch[0], arguments.dtype[0]
        seconds, features = measure(contender, folder, batch, dtype, arguments.runs, arguments.kind)
        np.save(folder / f"{contender}.npy", features)
        print(json.dumps(seconds))
        return
    if arguments.cpu:
        mx.set_default_device(mx.cpu)
    print(machine(arguments.beside) + f"; {arguments.rounds} rounds of {arguments.runs} runs or more\n")
    print_table(arguments)


if __name__ == "__main__":
    main()
