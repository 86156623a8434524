"""Are we as fast as others on this machine, with the same weights and the same pixels?

`python -m benchmarks.side_by_side [SIZE …] [--beside transformers apple timm] [--batch B …] [--dtype …] [--rounds N]
[--runs N] [--cpu]`, with the extra `parity` installed for transformers; how the others are installed is in README.md
here. Each contender runs in a process of its own, in turn, `rounds` times: what disturbs one disturbs the other. The
ratio is ours over theirs in each round, its median over the rounds; below 1 we are faster. The features are compared.
torch runs where MLX does: on a Mac on MPS, beside an NVIDIA GPU on CUDA, elsewhere and with --cpu on the CPU; there MLX
multiplies with OpenBLAS where it is installed, ours in one thread on few cores, as README.md says. The table is
Markdown.
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
from mlx_aimv2 import Aimv2Processor, device
from mlx_aimv2.checkpoint.layouts import layout_for
from mlx_aimv2.config import released
from mlx_aimv2.conversion import folder as folders
from mlx_aimv2.conversion import pytorch_folder
from mlx_aimv2.loading import build, parameter_shapes
from mlx_aimv2.preprocessing import published

OURS = "mlx_aimv2"
OTHERS = tuple(name for name in CONTENDERS if name != OURS)
DTYPES = ("float32", "float16", "bfloat16")
ON_MLX = (OURS, "apple")
DISTRIBUTIONS = {"transformers": ("torch", "transformers"), "timm": ("torch", "timm"), "apple": ("aim-v2",)}
HEAD = (
    "| model | dtype | images | beside | ours, ms | theirs, ms | ratio | in the rounds "
    "| our least | their least | ratio | difference |\n" + "|---" * 12 + "|"
)
LEAST_SECONDS = 1.0
"""Of warming up, and of measuring, in each process: a GPU's first runs are slower, and a run may take milliseconds."""

OPENBLAS = Path(f"/usr/lib/{platform.machine()}-linux-gnu/libopenblas.so.0")


class Failed(Exception):
    """A contender could not encode; the message is the last that it said."""


def write_checkpoint(folder: Path, size: str) -> None:
    """Random weights of a released size as transformers lays them out."""
    config = released(size).vision
    ours = ((name, _random(name, shape)) for name, shape in sorted(parameter_shapes(build(config)).items()))
    folders.save_weights(folder, layout_for("transformers", pair=False).to_source(ours), metadata={"format": "pt"})
    folders.save_config(folder, pytorch_folder.config_for(config, "transformers") | {"torch_dtype": "float32"})
    Aimv2Processor(published(config.image_size)).save_to(folder)
    mx.clear_cache()


def _random(name: str, shape: tuple[int, ...]) -> mx.array:
    if "norm" in name:
        return mx.random.uniform(0.5, 1.5, shape)
    return mx.random.normal(shape) * (0.02 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5)


def pixels(folder: Path, batch: int) -> np.ndarray:
    """The same images for all, `(B, 3, H, W)`."""
    side = json.loads((folder / "config.json").read_text())["image_size"]
    return np.random.default_rng(0).normal(size=(batch, 3, side, side)).astype(np.float32)


def measure(
    contender: str, folder: Path, batch: int, dtype: str, runs: int, kind: str
) -> tuple[list[float], np.ndarray]:
    """Seconds of each run once it is warm, and the features."""
    encode = CONTENDERS[contender](folder, pixels(folder, batch), dtype, kind)

    def repeated(least: int) -> tuple[list[float], Any]:
        seconds: list[float] = []
        while len(seconds) < least or sum(seconds) < LEAST_SECONDS:
            began = time.perf_counter()
            features = encode()
            seconds.append(time.perf_counter() - began)
        return seconds, features

    repeated(1)
    seconds, features = repeated(runs)
    return seconds, numbers(features)


def environment(contender: str) -> dict[str, str]:
    """This process's, with the BLAS and the number of its threads that suit the contender, whatever suits us here."""
    variables = dict(os.environ)
    for name in ("LD_PRELOAD", "OPENBLAS_NUM_THREADS"):
        variables.pop(name, None)
    if contender in ON_MLX:
        variables["MLX_ENABLE_TF32"] = "0"  # torch, too, multiplies float32 in full
        if OPENBLAS.exists():
            variables["LD_PRELOAD"] = str(OPENBLAS)
    if contender == OURS and device.prefers_one_blas_thread():
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
    """The names that we stand beside, each with what the table says of it. One that fails does not stop the others."""
    kind = device.machine().kind
    times: dict[str, list[list[float]]] = {name: [] for name in (OURS, *beside)}
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
        if failure := failures.get(OURS) or failures.get(name):
            yield name, [failure.replace("|", "/"), *[""] * 7]
            continue
        ours, theirs = (np.load(folder / f"{who}.npy") for who in (OURS, name))
        far = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        yield name, [*_cells(times[OURS], times[name]), f"{far:.1e}"]


def _cells(ours: list[list[float]], theirs: list[list[float]]) -> list[str]:
    """The seconds of both in every run of every round, as medians, ratios of the rounds, and least times."""
    medians = [[statistics.median(seconds) for seconds in rounds] for rounds in (ours, theirs)]
    ratios = [mine / other for mine, other in zip(*medians, strict=True)]
    least = [min(map(min, rounds)) for rounds in (ours, theirs)]
    return [
        *(f"{statistics.median(of_rounds) * 1e3:.1f}" for of_rounds in medians),
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        *(f"{seconds * 1e3:.1f}" for seconds in least),
        f"{least[0] / least[1]:.2f}",
    ]


def machine(beside: list[str]) -> str:
    """Processor, cores and versions, for the line above the table."""
    on = device.machine()
    names = dict.fromkeys(name for contender in beside for name in DISTRIBUTIONS[contender])
    versions = [f"{name} {_version(name)}" for name in names]
    where = f"; torch on {TORCH_DEVICES[on.kind]}" if "torch" in names else ""
    return f"{device.summary()}; {', '.join([f'mlx {device.mlx_build()}', *versions])}{where}"


def fixed_size(name: str) -> str:
    """The name of a released size whose images have one size, for argparse."""
    try:
        config = released(name).vision
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if config.is_native:
        raise argparse.ArgumentTypeError(f"images of one size are wanted, {name} takes any; give large-patch14-224")
    return name


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def add_arguments(parser: argparse.ArgumentParser, sizes: list[str], dtypes: list[str], batches: list[int]) -> None:
    """What to compare, with these defaults; `report` has the same flags."""
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
    parser.add_argument("--beside", nargs="+", default=["transformers"], choices=OTHERS, help="whom (transformers)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="processes for each of them, in turn (5)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs in a process, and a second of them (5)")


def main() -> None:
    parser = argparse.ArgumentParser(description="mlx_aimv2 and others, side by side")
    add_arguments(parser, ["large-patch14-224"], ["float32"], [1, 4])
    parser.add_argument("--cpu", action="store_true", help="all of them on the CPU")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=TORCH_DEVICES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        who, folder = arguments.contender, arguments.folder
        batch, dtype = arguments.batch[0], arguments.dtype[0]
        seconds, features = measure(who, folder, batch, dtype, arguments.runs, arguments.kind)
        np.save(folder / f"{who}.npy", features)
        print(json.dumps(seconds))
        return
    if arguments.cpu:
        mx.set_default_device(mx.cpu)
    print(machine(arguments.beside) + f"; {arguments.rounds} rounds of {arguments.runs} runs or more\n")
    print_table(arguments)


if __name__ == "__main__":
    main()
