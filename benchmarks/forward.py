"""Times a forward pass beside the machine's own matrix products, and loading beside reading the files.

`python -m benchmarks.forward (-m MODEL | --random SIZE) [--dtype …] [--batch B …] [--runs N] [--keep-quantized]`.
An encoder is matrix products. So each forward pass is timed in turn with the bare products of the same shapes, on the
same weights: the ratio of the two, the fraction of matmul peak, says what is left to gain here, and hardly depends on
what else the machine does. The result is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2 import load
from mlx_aimv2.backend import device, x86
from mlx_aimv2.cli import bench
from mlx_aimv2.config import DTYPES, Aimv2VisionConfig, released
from mlx_aimv2.layers import Block, split_heads
from mlx_aimv2.loading import parse_dtype, read_source
from mlx_aimv2.model import Aimv2VisionModel


def matrix_flops(config: Aimv2VisionConfig, *, batch: int, tokens: int) -> int:
    """Multiplications and additions of all matrix products of a forward pass."""
    width, inner = config.hidden_size, config.intermediate_size
    patches = config.num_channels * config.patch_size**2 * width
    block = width * 3 * width + width * width + 3 * width * inner + 2 * tokens * width
    head = 2 * width * width + 2 * width if config.use_head else 0
    last = width * width if config.use_head else 0
    return 2 * batch * (tokens * (patches + config.num_hidden_layers * block + head) + last)


def measure_speed(vision: Aimv2VisionModel, pixels: mx.array, *, runs: int) -> dict[str, Any]:
    """What `mlx-aimv2 bench` says of images `(B, H, W, 3)`, timed in turn with the bare matrix products.

    `flops` are the multiplications and additions of the matrix products, `bare_seconds` what these take alone.
    """
    found = bench.measure_speed(vision, pixels, runs=1)
    batch, tokens = found["batch"], found["tokens"]
    bare = _bare_products(vision, batch=batch, tokens=tokens)
    bare()
    seconds, bare_seconds = _alternating(lambda: mx.eval(vision(pixels).last_hidden_state), bare, runs=runs)
    flops = matrix_flops(vision.config, batch=batch, tokens=tokens)
    return found | {
        "seconds": seconds,
        "milliseconds_per_image": 1e3 * seconds / batch,
        "images_per_second": batch / seconds,
        "bare_seconds": bare_seconds,
        "flops": flops,
        "flops_per_second": flops / seconds,
        "fraction_of_bare": bare_seconds / seconds,
        "runs": runs,
    }


def measure_loading(load: Callable[[], Any], files: list[Path], *, runs: int) -> dict[str, float]:
    """Times `load()` in turn with reading its weight files, both from the page cache, medians over the runs.

    `ratio` is how many times as long as reading the files.
    """

    def read() -> None:
        for file in files:
            file.read_bytes()

    def load_and_free() -> None:
        load()
        mx.clear_cache()

    read()
    load()
    seconds, reading = _alternating(load_and_free, read, runs=runs)
    size = sum(file.stat().st_size for file in files)
    return {"seconds": seconds, "reading_seconds": reading, "bytes": size, "ratio": seconds / reading}


def _bare_products(vision: Aimv2VisionModel, *, batch: int, tokens: int) -> Callable[[], None]:
    """A function that computes the matrix products of a forward pass and nothing else, block by block.

    Where the cores of a CPU share the pass in shards, so they do the products.
    """
    config, dtype = vision.config, vision.dtype
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    shards = x86.Shards.of((batch, tokens, width))

    def normal(*shape: int) -> list[mx.array]:
        return [
            mx.contiguous(part) for part in shards.split(mx.random.normal(shape, key=mx.random.key(1)).astype(dtype))
        ]

    def one_per_head() -> list[mx.array]:
        whole = split_heads(mx.random.normal((batch, tokens, width), key=mx.random.key(1)).astype(dtype), heads)
        return [mx.contiguous(part) for part in shards.split(whole)]

    x, gated = normal(batch, tokens, width), normal(batch, tokens, inner)
    patches = normal(batch, tokens, config.num_channels * config.patch_size**2)
    queries, keys, values = (one_per_head() for _ in range(3))
    if shards.axis == x86.TOKENS:
        keys, values = ([shards.join(parts)] * len(parts) for parts in (keys, values))
    scores = normal(batch, heads, tokens, tokens)
    conv = vision.patch_embed.proj.weight.reshape(width, -1)
    mx.eval(x, gated, patches, queries, keys, values, scores, conv)

    def products(block: Block, x, gated, q, k, v, scores) -> list[mx.array]:  # type: ignore[no-untyped-def]
        attn, mlp = block.attn, block.mlp
        return [
            *(_product(x, layer) for layer in (attn.qkv, attn.proj, mlp.gate, mlp.up)),
            _product(gated, mlp.down),
            q @ k.swapaxes(-1, -2),
            scores @ v,
        ]

    def run() -> None:
        mx.async_eval(*shards.run(lambda part: part @ conv.T, patches))  # type: ignore[no-untyped-call]
        for block in vision.blocks:
            results = shards.run(partial(products, block), x, gated, queries, keys, values, scores)
            mx.async_eval(*results)  # type: ignore[no-untyped-call]
        for stream in shards.streams:
            mx.synchronize(stream)

    return run


def _product(x: mx.array, layer: nn.Module) -> mx.array:
    return x @ layer.weight.T if isinstance(layer, nn.Linear) else layer(x)


def _alternating(first: Callable[[], None], second: Callable[[], None], *, runs: int) -> tuple[float, float]:
    """Medians of the seconds of both, run in turn, so that whatever disturbs one disturbs the other."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for work, seconds in zip((first, second), times, strict=True):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a forward pass beside bare matrix products, as JSON")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-m", "--model")
    which.add_argument("--random")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--keep-quantized", action="store_true")
    arguments = parser.parse_args(argv)
    found: dict[str, Any] = {"advice": device.advice(device.machine()), "speed": []}
    if arguments.model:
        origin = read_source(arguments.model).origin
        found["loading"] = measure_loading(lambda: load(origin.path), origin.files, runs=arguments.runs)
    for dtype in arguments.dtype:
        if arguments.random:
            vision = bench.random_model(released(arguments.random).config.vision, parse_dtype(dtype))
        else:
            vision = load(arguments.model, dtype=dtype, keep_quantized=arguments.keep_quantized)[0].vision
        for batch in arguments.batch:
            pixels = bench.random_pixels(vision.config, batch=batch)
            found["speed"].append(measure_speed(vision, pixels, runs=arguments.runs))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    main()
