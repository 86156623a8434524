"""Attention and a block of large's width on many tokens, forward and gradient, with and without `long_attention`.

Each runs in processes of its own, in turn; the table has the fastest by the clock and by the processor, and the peak of
MLX's memory beyond what went in.

    python -m benchmarks.long_attention [--tokens 4096] [--rounds 2]

For an x86 CPU with OpenBLAS, as benchmarks/README.md says; elsewhere MLX's own operations run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import mlx.core as mx

from mlx_aimv2 import backend, layers
from mlx_aimv2.backend import x86

WIDTH, INTERMEDIATE, HEADS = 1024, 2816, 8
WHAT, WAYS = ("call", "block"), ("all scores kept", "none kept")


@x86.prepared()
def measured(what: str, way: str, tokens: int) -> dict[str, float]:
    """In this process: the fastest of three after a first one, and the peak of memory in MB."""
    never = 1 << 30
    layers.LONG = x86.LONG = 1 if way == WAYS[1] else never
    keys = mx.random.split(mx.random.key(0), 4)
    if what == "call":
        q, k, v, slope = (mx.random.normal((1, tokens, HEADS, 128), key=key).transpose(0, 2, 1, 3) for key in keys)
        is_x86 = x86.on_x86_cpu()
        kept, unkept = (x86.attention, x86.trained_attention) if is_x86 else (layers.attention, layers.long_attention)
        attend = unkept if way == WAYS[1] else kept
        function = mx.value_and_grad(lambda q, k, v: (attend(q, k, v) * slope).sum(), argnums=(0, 1, 2))
        arguments = (q, k, v)
        mx.eval(slope)
    else:
        block = layers.Block(WIDTH, INTERMEDIATE, HEADS, 1e-5)

        def run(weights: dict, x: mx.array) -> mx.array:
            block.update(weights)
            return next(backend.run_blocks([block], x)).sum()

        function = mx.value_and_grad(run, argnums=(0, 1))
        arguments = (block.trainable_parameters(), mx.random.normal((1, tokens, WIDTH), key=keys[0]))
    mx.eval(arguments)
    seconds, processor = [], []
    for _ in range(4):
        mx.reset_peak_memory()
        before, began, used = mx.get_active_memory(), time.perf_counter(), time.process_time()
        mx.eval(function(*arguments))
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
        peak = (mx.get_peak_memory() - before) / 1e6
    return {"seconds": min(seconds[1:]), "processor": min(processor[1:]), "megabytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention on many tokens in training.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each, in turn")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(*arguments.one, arguments.tokens)))
        return
    print("| | step | processor seconds | peak memory |\n| --- | ---: | ---: | ---: |")
    for what in WHAT:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.long_attention", "--one", what, way]
                run = subprocess.run(
                    [*command, f"--tokens={arguments.tokens}"], capture_output=True, text=True, check=True
                )
                found[way].append(json.loads(run.stdout.splitlines()[-1]))
        best = {way: {key: min(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
        for way, row in best.items():
            shares = [f" ({row[key] / best[WAYS[0]][key]:.2f})" if way == WAYS[1] else "" for key in row]
            numbers = (f"{row['seconds']:.2f} s", f"{row['processor']:.2f} s", f"{row['megabytes']:,.0f} MB")
            print(f"| {what}, {way} | {' | '.join(a + b for a, b in zip(numbers, shares, strict=True))} |", flush=True)


if __name__ == "__main__":
    main()
