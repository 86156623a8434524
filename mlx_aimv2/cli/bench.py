"""`mlx-aimv2 bench`: measures the time and the memory of a model on this machine."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_aimv2 import __version__
from mlx_aimv2.backend.device import advice, cpu_count, machine, mlx_build
from mlx_aimv2.cli.flags import MODEL, add_image_size, add_revision
from mlx_aimv2.cli.output import aligned, log
from mlx_aimv2.config import DTYPES, Aimv2VisionConfig, dtype_name, released
from mlx_aimv2.loading import NATIVE, parse_dtype, pixels_for, read_source
from mlx_aimv2.model import Aimv2VisionModel

MAX_COUNT = 4096
"""The most images, pixels a side or runs to ask for: more would not fit in any machine's memory, or in a day."""

DEFAULT_DTYPES = {"cpu": ("float32",), "metal": ("float16", "bfloat16"), "cuda": ("float16", "bfloat16")}
"""A CPU's half-precision products are so slow in MLX that they are measured only when asked for."""

NOTE = (
    "ms, images/s: one forward pass of the vision encoder on pixels in memory, median of {runs} runs. "
    "peak MB: memory above the weights and the pixels."
)

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "dtype": lambda speed: speed["dtype"],
    "weights": lambda speed: speed["weights"],
    "MB": lambda speed: f"{speed['weight_bytes'] / 1e6:,.0f}",
    "batch": lambda speed: f"{speed['batch']:,}",
    "tokens": lambda speed: f"{speed['tokens']:,}",
    "ms": lambda speed: f"{speed['seconds'] * 1e3:,.1f}",
    "ms/image": lambda speed: f"{speed['milliseconds_per_image']:,.1f}",
    "images/s": lambda speed: f"{speed['images_per_second']:,.2f}",
    "peak MB": lambda speed: f"{speed['peak_bytes'] / 1e6:,.0f}",
}
"""The columns of the table."""

WARM_UP_SECONDS = 1.0
"""Before a GPU is timed: its clock rises with work, and a pass may take milliseconds."""


def add_bench(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True).add_argument
    which("-m", "--model", metavar="MODEL", help=MODEL)
    which("--random", metavar="SIZE", help="random weights of a released size, such as large-patch14-224")
    add = group.add_argument
    add_revision(add)

    add = parser.add_argument_group("what is timed").add_argument
    dtypes = f"{', '.join(DTYPES)} (default: float32 on a CPU, else float16 and bfloat16)"
    add("--dtype", nargs="+", choices=DTYPES, metavar="NAME", help=dtypes)
    add("--batch", nargs="+", type=_count, default=[1, 4], metavar="N", help="images per batch (default: 1 4)")
    add_image_size(add, f"the checkpoint's, native {NATIVE}")
    add("--runs", type=_count, default=7, metavar="N", help="runs per measurement (default: %(default)s)")
    add("--keep-quantized", action="store_true", help="also time quantized weights as packed, not only dequantized")

    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print the measurements as JSON")


def run_bench(arguments: argparse.Namespace) -> int:
    """Measures as the flags say, reports each step on stderr, and prints the table or JSON."""
    size = released(arguments.random) if arguments.random else None
    side = arguments.image_size
    source = None if size else read_source(arguments.model, revision=arguments.revision, image_size=side)
    config = size.config.vision if size else Aimv2VisionConfig()
    if size and side is not None:
        side = pixels_for(config, side)
        config = replace(config, image_size=config.image_size and side)
    name = arguments.model or f"random {arguments.random}"
    if arguments.keep_quantized and (source is None or source.quantization is None):
        raise ValueError(f"--keep-quantized needs quantized weights, but {name} has dense ones; leave it out")
    on = machine()
    found: dict[str, Any] = {"device": on.kind, "chip": on.chip, "cores": cpu_count(), "advice": advice(on)}
    found |= {"mlx": mlx_build(), "mlx-aimv2": __version__, "model": name, "runs": arguments.runs, "speed": []}
    kinds = ("dense", "packed") if arguments.keep_quantized else ("dense",)
    for dtype, weights in itertools.product(arguments.dtype or DEFAULT_DTYPES[on.kind], kinds):
        if source is not None:
            model = source.reopened().load(dtype=dtype, keep_quantized=weights == "packed").model.vision
        else:
            model = random_model(config, parse_dtype(dtype))
        for batch in arguments.batch:
            log(f"measuring: {dtype} {weights}, batch {batch}")
            pixels = random_pixels(model.config, batch=batch, side=side)
            found["speed"].append({"weights": weights} | measure_speed(model, pixels, runs=arguments.runs))
    print(json.dumps(found) if arguments.json else table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """The measurements as lines for the terminal."""
    lines = {
        "machine": f"{found['chip']}, {found['device']}, {found['cores']} cores",
        "versions": f"mlx {found['mlx']}, mlx-aimv2 {found['mlx-aimv2']}",
        "model": found["model"],
    }
    if found["advice"]:
        lines["advice"] = found["advice"]
    rows = [list(COLUMNS), *([cell(speed) for cell in COLUMNS.values()] for speed in found["speed"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    body = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*aligned(lines), "", *body, "", NOTE.format(runs=found["runs"])])


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 1 <= number <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1 to {MAX_COUNT:,}, got {text:.20}")
    return number


def random_model(config: Aimv2VisionConfig, dtype: mx.Dtype) -> Aimv2VisionModel:
    """A model of these sizes with random weights: as fast as a trained one, but its features are meaningless."""
    model = Aimv2VisionModel(config)
    model.set_dtype(dtype)
    for _, layer in model.named_modules():
        mx.eval([array for array in layer.values() if isinstance(array, mx.array)])  # one layer's float32 at a time
    model.eval()
    return model


def random_pixels(config: Aimv2VisionConfig, *, batch: int, side: int | None = None) -> mx.array:
    """Images of the size the model takes, `(B, H, W, 3)`; `side` is for native models."""
    side = config.image_size or side or NATIVE
    pixels = mx.random.normal((batch, side, side, config.num_channels), key=mx.random.key(0))
    mx.eval(pixels)
    return pixels


def measure_speed(vision: Aimv2VisionModel, pixels: mx.array, *, runs: int) -> dict[str, Any]:
    """Times the vision encoder on images `(B, H, W, 3)`: the median of the runs, and figures derived from it.

    `weight_bytes` is the size of the weights, `peak_bytes` the peak memory above them and the pixels.
    """
    rows, columns = vision.grid(pixels)
    parameters: Any = tree_flatten(vision.parameters())

    def forward() -> float:
        began = time.perf_counter()
        mx.eval(vision(pixels).last_hidden_state)
        return time.perf_counter() - began

    warm = time.perf_counter() + (0 if mx.default_device() == mx.cpu else WARM_UP_SECONDS)
    forward()
    while time.perf_counter() < warm:
        forward()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    forward()
    peak = mx.get_peak_memory() - before
    seconds, batch = statistics.median(forward() for _ in range(runs)), len(pixels)
    return {
        "dtype": dtype_name(vision.dtype),
        "weight_bytes": sum(array.nbytes for _, array in parameters),
        "batch": batch,
        "tokens": rows * columns,
        "seconds": seconds,
        "milliseconds_per_image": 1e3 * seconds / batch,
        "images_per_second": batch / seconds,
        "peak_bytes": peak,
        "runs": runs,
    }
