"""Writes the speed benchmarks of this machine as one page.

`python -m benchmarks.report [SIZE …] [--dtype …] [--batch B …] [--beside NAME …] [--rounds N] [--runs N]`: for each
size its fraction of matmul peak, as `forward` measures it, and its time beside other packages, as
`side_by_side` measures it. The defaults depend on the machine: on a GPU large at 224 and 448 and 3B at 448 pixels, in
float16 and bfloat16; on a CPU large in float32. The page is Markdown, for `results/NAME.md`.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks import side_by_side
from mlx_aimv2.backend import device
from mlx_aimv2.cli.bench import DEFAULT_DTYPES

SIZES = ("large-patch14-224", "large-patch14-448", "3B-patch14-448")
SIZES_ON_CPU = SIZES[:2]

HEAD = (
    "| model | dtype | images | tokens each | ms | images a second | peak memory above the weights, MB | GFLOP/s "
    "| fraction of matmul peak |\n" + "|---" * 9 + "|"
)


def forward(size: str, dtypes: list[str], batches: list[int], *, runs: int) -> dict[str, Any]:
    """The JSON of `forward` for a size, in a process with the same BLAS as in `side_by_side`."""
    command = [sys.executable, "-m", "benchmarks.forward", "--random", size, "--runs", str(runs)]
    command += ["--dtype", *dtypes, "--batch", *map(str, batches)]
    environment = side_by_side.environment(side_by_side.PACKAGE)
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)  # it has printed why
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def row(size: str, speed: dict[str, Any]) -> str:
    """One row of the table of forward passes."""
    cells = [size, speed["dtype"], str(speed["batch"]), str(speed["tokens"]), f"{speed['seconds'] * 1e3:.1f}"]
    cells += [f"{speed['images_per_second']:.2f}", f"{speed['peak_bytes'] / 1e6:.0f}"]
    cells += [f"{speed['flops_per_second'] / 1e9:.0f}", f"{speed['fraction_of_bare']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    on = device.machine()
    parser = argparse.ArgumentParser(description="the speed benchmarks of this machine as one page")
    sizes, batches = (SIZES_ON_CPU, [1, 4]) if on.kind == "cpu" else (SIZES, [1, 16])
    side_by_side.add_arguments(parser, list(sizes), list(DEFAULT_DTYPES[on.kind]), batches)
    arguments = parser.parse_args()
    print(f"# {side_by_side.machine(arguments.beside)}\n\nRandom weights of the released sizes.", flush=True)
    for number, size in enumerate(arguments.sizes):
        found = forward(size, arguments.dtype, arguments.batch, runs=arguments.runs)
        if number == 0:
            note = f" Note: {found['advice']}." if found["advice"] else ""
            how = "A forward pass alternates with its matrix products alone"
            print(f"{how}; medians of {arguments.runs} runs.{note}\n\n{HEAD}")
        print(*(row(size, speed) for speed in found["speed"]), sep="\n", flush=True)
    print(f"\nSide by side: {arguments.rounds} rounds of alternating processes of {arguments.runs} runs or more.\n")
    side_by_side.print_table(arguments)


if __name__ == "__main__":
    main()
