"""Measures how the cost of a forward pass grows with the tokens, the batch and the width of the model.

`python -m benchmarks.scaling [--along tokens batch width] [--blocks N] [--runs N] [--dtype …]`: random weights of the
released sizes, each forward pass alternating with its matrix products alone, as in `benchmarks.forward`. The tables are
Markdown. `--blocks N` runs N of the 24 blocks, for machines on which all of them take too long. `benchmarks.folder`
measures how the cost of embedding a folder grows with its images.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx

from benchmarks import forward
from benchmarks.machine import summary
from mlx_aimv2.backend import device
from mlx_aimv2.cli import bench
from mlx_aimv2.config import DTYPES, WIDTHS, released

SIDES = (224, 448, 672, 896)
"""Sides of a native model's images in pixels: 256, 1024, 2304 and 4096 tokens."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)

HEAD = (
    "| ms | ms per image | GFLOP/s | fraction of matmul peak | peak memory above the weights, MB |\n" + "|---" * 6 + "|"
)


def cases(along: str) -> Iterator[tuple[str, str, int, int | None]]:
    """What is measured along an axis: name in the table, released size, batch, side in pixels."""
    if along == "tokens":
        yield from ((f"{(side // 14) ** 2} tokens", "large-patch14-native", 1, side) for side in SIDES)
    elif along == "batch":
        yield from ((f"{batch} images", "large-patch14-224", batch, None) for batch in BATCHES)
    else:
        yield from ((size, f"{size}-patch14-224", 1, None) for size in WIDTHS)


def main() -> None:
    parser = argparse.ArgumentParser(description="how cost grows with tokens, batch and width")
    parser.add_argument(
        "--along", nargs="+", default=["tokens", "batch", "width"], choices=["tokens", "batch", "width"]
    )
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    print(f"{summary()}; mlx {device.mlx_build()}; {arguments.dtype},")
    print(f"{arguments.blocks} blocks, medians of {arguments.runs} runs")
    for along in arguments.along:
        print(f"\n| {along} {HEAD}")
        held: tuple[Any, Any] = (None, None)
        for name, size, batch, side in cases(along):
            config = replace(released(size).config.vision, num_hidden_layers=arguments.blocks)
            if held[0] != config:
                held = (None, None)  # the old weights go before the new ones come
                held = (config, bench.random_model(config, getattr(mx, arguments.dtype)))
            pixels = bench.random_pixels(config, batch=batch, side=side)
            speed = forward.measure_speed(held[1].vision, pixels, runs=arguments.runs)
            cells = [name, f"{speed['seconds'] * 1e3:.1f}", f"{speed['milliseconds_per_image']:.1f}"]
            cells += [f"{speed['flops_per_second'] / 1e9:.0f}", f"{speed['fraction_of_bare']:.2f}"]
            cells += [f"{speed['peak_bytes'] / 1e6:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            mx.clear_cache()


if __name__ == "__main__":
    main()
