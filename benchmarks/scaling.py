"""How does the cost grow with tokens, with images at once, and with the width of the model?

`python -m benchmarks.scaling [--along tokens batch width] [--blocks N] [--runs N] [--dtype …]`: random weights of the
released sizes, each forward pass in turn with its bare matrix products, as `mlx-aimv2 bench` does it; the tables are
Markdown. With --blocks only that many of the 24 blocks run, for machines on which all of them take too long.
How embedding a folder grows with its images is `benchmarks.folder`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from mlx_aimv2 import bench, device
from mlx_aimv2.config import DTYPES, WIDTHS, released

SIDES = (224, 448, 672, 896)
"""Pixels along a native model's image: 256, 1024, 2304 and 4096 tokens."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def cases(along: str) -> Iterator[tuple[str, str, int, int | None]]:
    """What is measured along an axis: name in the table, released size, images, side."""
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
    print(f"{device.summary()}; mlx {device.mlx_build()}; {arguments.dtype},")
    print(f"{arguments.blocks} blocks, medians of {arguments.runs} runs")
    for along in arguments.along:
        print(f"\n| {along} | ms | ms per image | GFLOP/s | of the bare products | peak above the weights, MB |")
        print("|---|---|---|---|---|---|")
        held: tuple[object, object] = (None, None)
        for name, size, batch, side in cases(along):
            config = replace(released(size).vision, num_hidden_layers=arguments.blocks)
            if held[0] != config:
                held = (None, None)  # the old weights go before the new ones come
                held = (config, bench.random_model(config, getattr(mx, arguments.dtype)))
            pixels = bench.random_pixels(config, batch=batch, side=side)
            speed = bench.measure_speed(held[1], pixels, runs=arguments.runs)
            cells = [name, f"{speed.seconds * 1e3:.1f}", f"{speed.seconds * 1e3 / batch:.1f}"]
            cells += [f"{speed.flops_per_second / 1e9:.0f}", f"{speed.fraction:.2f}", f"{speed.peak_bytes / 1e6:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            mx.clear_cache()


if __name__ == "__main__":
    main()
