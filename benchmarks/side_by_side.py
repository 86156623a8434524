"""Are we as fast as others on this machine, with the same weights and the same pixels?

`python -m benchmarks.side_by_side [SIZE …] [--beside transformers apple timm] [--batch B …] [--dtype …] [--rounds N]
[--runs N] [--cpu]`, with the extra `parity` installed for transformers; how the others are installed is in README.md
here. Each contender runs in a process of its own, in turn, `rounds` times: what disturbs one disturbs the other. The
ratio is ours over theirs in each round, its median over the rounds; below 1 we are faster. The features are compared.
On a Mac torch runs on MPS, beside an NVIDIA GPU on CUDA, elsewhere and with --cpu on the CPU; there MLX multiplies with
OpenBLAS where it is installed, in one thread on few cores, as README.md says. The table is Markdown.
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
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.contenders import CONTENDERS, numbers
from mlx_aimv2.cores import MOST_LANES

OURS = "mlx_aimv2"
OTHERS = tuple(name for name in CONTENDERS if name != OURS)
DTYPES = ("float32", "float16", "bfloat16")
ON_MLX = (OURS, "apple")
DISTRIBUTIONS = {"transformers": ("torch", "transformers"), "timm": ("torch", "timm"), "apple": ("aim-v2",)}
HEAD = (
    "| model | dtype | pictures | beside | ours, ms | theirs, ms | ratio | in the rounds "
    "| our least | their least | ratio | difference |\n" + "|---" * 12 + "|"
)
OPENBLAS = Path(f"/usr/lib/{platform.machine()}-linux-gnu/libopenblas.so.0")


def write_checkpoint(folder: Path, size: str) -> None:
    """Random weights of a released size as transformers lays them out, and pixels for the largest batch."""
    import mlx.core as mx

    from mlx_aimv2 import bench, export
    from mlx_aimv2 import folder as folders
    from mlx_aimv2.loading import build, parameter_shapes
    from mlx_aimv2.names import layout_for
    from mlx_aimv2.preprocessing import published
    from mlx_aimv2.processor import Aimv2Processor

    config = bench.released_config(size)
    ours = ((name, _random(name, shape)) for name, shape in sorted(parameter_shapes(build(config)).items()))
    folders.save_weights(folder, layout_for("transformers", pair=False).to_theirs(ours), metadata={"format": "pt"})
    folders.save_config(folder, export.config_for(config, "transformers") | {"torch_dtype": "float32"})
    Aimv2Processor(published(config.image_size)).save_to(folder)
    mx.clear_cache()


def _random(name: str, shape: tuple[int, ...]) -> "object":
    import mlx.core as mx

    if "norm" in name:
        return mx.random.uniform(0.5, 1.5, shape)
    return mx.random.normal(shape) * (0.02 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5)


def pixels(folder: Path, batch: int) -> np.ndarray:
    """The same pictures for both, `(B, 3, H, W)`."""
    side = json.loads((folder / "config.json").read_text())["image_size"]
    return np.random.default_rng(0).normal(size=(batch, 3, side, side)).astype(np.float32)


def measure(
    contender: str, folder: Path, batch: int, dtype: str, runs: int, cpu: bool
) -> tuple[list[float], np.ndarray]:
    """Seconds of each run after the first, and the features."""
    encode = CONTENDERS[contender](folder, pixels(folder, batch), dtype, cpu)
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        features = encode()
        seconds.append(time.perf_counter() - began)
    return seconds[1:], numbers(features)


def environment(contender: str) -> dict[str, str]:
    """This process's, and OpenBLAS for MLX where it is installed, with as many threads as suit the contender best."""
    variables = dict(os.environ)
    if contender in ON_MLX and OPENBLAS.exists():
        variables["LD_PRELOAD"] = str(OPENBLAS)
    if contender == OURS and (os.cpu_count() or 1) <= MOST_LANES:
        variables["OPENBLAS_NUM_THREADS"] = "1"
    return variables


def in_process(contender: str, folder: Path, batch: int, dtype: str, runs: int, cpu: bool) -> list[float]:
    """Runs one contender in a fresh process: seconds of each run."""
    command = [sys.executable, "-m", "benchmarks.side_by_side", "--contender", contender, "--folder", str(folder)]
    command += ["--batch", str(batch), "--dtype", dtype, "--runs", str(runs), *(["--cpu"] if cpu else [])]
    finished = subprocess.run(command, env=environment(contender), capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{contender} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def print_table(
    sizes: list[str], dtypes: list[str], batches: list[int], *, beside: list[str], rounds: int, runs: int, cpu: bool
) -> None:
    """Measures every size, dtype and batch, and prints the table as it grows."""
    print(HEAD, flush=True)
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_checkpoint(folder, size)
            for dtype, batch in product(dtypes, batches):
                times: dict[str, list[list[float]]] = {name: [] for name in (OURS, *beside)}
                for _ in range(rounds):
                    for name, so_far in times.items():
                        so_far.append(in_process(name, folder, batch, dtype, runs, cpu))
                    last = {name: f"{min(so_far[-1]):.3f} s" for name, so_far in times.items()}
                    print(size, batch, dtype, last, file=sys.stderr)
                features = {name: np.load(folder / f"{name}.npy") for name in times}
                for name in beside:
                    cells = [size, dtype, str(batch), name, *_cells(times[OURS], times[name])]
                    far = np.linalg.norm(features[OURS] - features[name]) / np.linalg.norm(features[name])
                    print(f"| {' | '.join([*cells, f'{far:.1e}'])} |", flush=True)


def _cells(ours: list[list[float]], theirs: list[list[float]]) -> list[str]:
    """The seconds of both in every run of every round, as medians, ratios of the rounds, and least times."""
    medians = [[statistics.median(seconds) for seconds in rounds] for rounds in (ours, theirs)]
    ratios = [mine / other for mine, other in zip(*medians, strict=True)]
    least = [min(map(min, rounds)) for rounds in (ours, theirs)]
    return [
        *(f"{statistics.median(of_rounds) * 1e3:.0f}" for of_rounds in medians),
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        *(f"{seconds * 1e3:.0f}" for seconds in least),
        f"{least[0] / least[1]:.2f}",
    ]


def machine(beside: list[str]) -> str:
    """Processor, cores and versions, for the line above the table."""
    from mlx_aimv2 import device

    on = device.machine()
    names = dict.fromkeys(name for contender in beside for name in DISTRIBUTIONS[contender])
    versions = [f"{name} {_version(name)}" for name in names]
    return f"{on.chip} ({on.kind}), {os.cpu_count()} cores; {', '.join([f'mlx {device.mlx_build()}', *versions])}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "from source"


def main() -> None:
    parser = argparse.ArgumentParser(description="mlx_aimv2 and others, side by side")
    parser.add_argument("sizes", nargs="*", default=["large-patch14-224"], metavar="SIZE")
    parser.add_argument("--beside", nargs="+", default=["transformers"], choices=OTHERS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        who, folder = arguments.contender, arguments.folder
        batch, dtype = arguments.batch[0], arguments.dtype[0]
        seconds, features = measure(who, folder, batch, dtype, arguments.runs, arguments.cpu)
        np.save(folder / f"{who}.npy", features)
        print(json.dumps(seconds))
        return
    print(machine(arguments.beside) + f"; {arguments.rounds} rounds of {arguments.runs} runs\n")
    print_table(
        arguments.sizes,
        arguments.dtype,
        arguments.batch,
        beside=arguments.beside,
        rounds=arguments.rounds,
        runs=arguments.runs,
        cpu=arguments.cpu,
    )


if __name__ == "__main__":
    main()
