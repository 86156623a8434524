"""What do the speed benchmarks say about this machine, as one page?

`python -m benchmarks.report [SIZE …] [--dtype …] [--batch B …] [--beside NAME …] [--rounds N] [--runs N]`: for each
size, how near it comes to the machine's bare matrix products, which is what `mlx-aimv2 bench` measures, and how fast it
is beside others, as `side_by_side` says. Without arguments it takes what suits the kind of machine: on a GPU large at
224 and 448 and 3B at 448 pixels in both half precisions, on a CPU large in float32. The page is Markdown, for
`results/NAME.md`.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks import side_by_side
from mlx_aimv2 import device
from mlx_aimv2.commands.bench import DEFAULT_DTYPES

SIZES = ("large-patch14-224", "large-patch14-448", "3B-patch14-448")
SIZES_ON_CPU = SIZES[:2]

HEAD = (
    "| model | dtype | images | tokens each | ms | images a second | peak above the weights, MB | GFLOP/s "
    "| of the bare products |\n" + "|---" * 9 + "|"
)


def bench(size: str, dtypes: list[str], batches: list[int], *, runs: int) -> dict[str, Any]:
    """What `mlx-aimv2 bench` says of a size, in a process that multiplies as the side by side does."""
    command = [sys.executable, "-m", "mlx_aimv2", "bench", "--random", size, "--json", "--runs", str(runs)]
    command += ["--dtype", *dtypes, "--batch", *map(str, batches)]
    environment = side_by_side.environment(side_by_side.OURS)
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)  # bench has said why
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def row(size: str, speed: dict[str, Any]) -> str:
    """A line of the table of forward passes."""
    cells = [size, speed["dtype"], str(speed["batch"]), str(speed["tokens"]), f"{speed['seconds'] * 1e3:.1f}"]
    cells += [f"{speed['images_per_second']:.2f}", f"{speed['peak_bytes'] / 1e6:.0f}"]
    cells += [f"{speed['flops_per_second'] / 1e9:.0f}", f"{speed['fraction_of_bare']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    on = device.machine()
    parser = argparse.ArgumentParser(description="the speed benchmarks of this machine, as one page")
    sizes, batches = (SIZES_ON_CPU, [1, 4]) if on.kind == "cpu" else (SIZES, [1, 16])
    side_by_side.add_arguments(parser, list(sizes), list(DEFAULT_DTYPES[on.kind]), batches)
    arguments = parser.parse_args()
    print(f"# {side_by_side.machine(arguments.beside)}\n\nRandom weights of the released sizes.", flush=True)
    for number, size in enumerate(arguments.sizes):
        found = bench(size, arguments.dtype, arguments.batch, runs=arguments.runs)
        if number == 0:
            note = f" Remark: {found['note']}." if found["note"] else ""
            print(f"Pass and bare products in turn, medians of {arguments.runs} runs.{note}\n\n{HEAD}")
        print(*(row(size, speed) for speed in found["speed"]), sep="\n", flush=True)
    print(f"\nSide by side, {arguments.rounds} rounds, a process of {arguments.runs} runs or more for each in turn.\n")
    side_by_side.print_table(arguments)


if __name__ == "__main__":
    main()
