"""`mlx-aimv2 bench`: times a model beside the machine's own matrix products.

An encoder is matrix products. So each forward pass is timed in turn with the bare products of the same shapes, on the
same weights: the ratio of the two says what is left to gain here, and hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_aimv2 import bundled, device, x86
from mlx_aimv2.cli import log
from mlx_aimv2.commands.flags import MODEL, add_revision
from mlx_aimv2.config import DTYPES, Aimv2VisionConfig, dtype_name, released
from mlx_aimv2.layers import Block, split_heads
from mlx_aimv2.loading import AnyModel, Source, load, parse_dtype, read_source
from mlx_aimv2.model import Aimv2VisionModel

HELP = "time a model beside bare matrix products"

EXAMPLE = "-m apple/aimv2-large-patch14-224 --batch 1 4 16"

MAX_BATCH, MAX_SIDE, MAX_RUNS = 4096, 3584, 100_000
"""What may be asked for: more fits no machine's memory or no day."""

DEFAULT_DTYPES = {"cpu": ("float32",), "metal": ("float16", "bfloat16"), "cuda": ("float16", "bfloat16")}
"""A CPU's half-precision products are so slow in MLX that they are measured only when asked for."""

NOTE = (
    "ms, images/s: one forward pass of the vision encoder on pixels in memory, median of {runs} runs. "
    "peak MB: memory above the weights and the pixels. GFLOP/s: matrix products over the time of the whole pass. "
    "of bare: time of these products alone, run in turn with the pass, over the time of the pass."
)

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "dtype": lambda speed: speed["dtype"],
    "weights": lambda speed: speed["weights"],
    "MB": lambda speed: f"{speed['weight_bytes'] / 1e6:.0f}",
    "batch": lambda speed: str(speed["batch"]),
    "tokens": lambda speed: str(speed["tokens"]),
    "ms": lambda speed: f"{speed['seconds'] * 1e3:.1f}",
    "ms/image": lambda speed: f"{speed['milliseconds_per_image']:.1f}",
    "images/s": lambda speed: f"{speed['images_per_second']:.2f}",
    "peak MB": lambda speed: f"{speed['peak_bytes'] / 1e6:.0f}",
    "GFLOP/s": lambda speed: f"{speed['flops_per_second'] / 1e9:.0f}",
    "of bare": lambda speed: f"{speed['fraction_of_bare']:.2f}",
}
"""What the table shows of each measurement."""

NATIVE_SIDE = 224
"""Pixels along the side of the images that a native model is measured on, if nothing else is asked for."""

WARM_UP_SECONDS = 1.0
"""Before a GPU is timed: its clock rises with work, and a pass may take milliseconds."""

FIRST_EMBEDDING = """
import json, sys, time
began = time.perf_counter()
from mlx_aimv2 import load
imported = time.perf_counter()
model, processor = load(sys.argv[1], dtype=sys.argv[2] or None)
loaded = time.perf_counter()
import mlx.core as mx
mx.eval(model.encode_image(processor([sys.argv[3]])))
print(json.dumps([imported - began, loaded - imported, time.perf_counter() - loaded]))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True).add_argument
    which("-m", "--model", metavar="MODEL", help=MODEL)
    which("--random", metavar="SIZE", help="random weights of a released size, such as large-patch14-224")
    add = group.add_argument
    add_revision(add)

    add = parser.add_argument_group("what is timed").add_argument
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="NAME",
        help="float32, float16, bfloat16 (default: float32 on a CPU, else both halves)",
    )
    add(
        "--batch",
        nargs="+",
        type=_up_to(MAX_BATCH),
        default=[1, 4],
        metavar="N",
        help="images at once (default: 1 4)",
    )
    add(
        "--side",
        type=_up_to(MAX_SIDE),
        metavar="N",
        help="native checkpoints: side of the images in pixels (default: 224)",
    )
    add("--runs", type=_up_to(MAX_RUNS), default=7, metavar="N", help="runs of each measurement (default: %(default)s)")
    add("--keep-quantized", action="store_true", help="time quantized weights packed, too, not only made dense")

    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print the measurements as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures as the flags say, tells of each step on stderr, and prints the table or JSON."""
    found = measure(arguments)
    print(json.dumps(found) if arguments.json else table(found, runs=arguments.runs))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as one dictionary for JSON."""
    from mlx_aimv2 import __version__

    if arguments.random:
        released(arguments.random)
        if arguments.keep_quantized:
            raise ValueError("--keep-quantized needs a quantized MLX folder: give it with -m")
    on = device.machine()
    found: dict[str, Any] = {
        "device": on.kind,
        "chip": on.chip,
        "cores": device.cpu_count(),
        "mlx": device.mlx_build(),
        "mlx-aimv2": __version__,
        "advice": device.advice(on),
        "model": arguments.model or f"random {arguments.random}",
        "runs": arguments.runs,
    }
    source = None
    if arguments.model:
        source = read_source(arguments.model, revision=arguments.revision)
        if arguments.keep_quantized and source.quantization is None:
            raise ValueError(
                f"--keep-quantized needs quantized weights, {arguments.model} holds dense ones; leave it out"
            )
        path = source.origin.path
        _tell("loading")
        found["loading"] = measure_loading(lambda: load(path), source.origin.files, runs=arguments.runs)
        _tell("first embedding in a fresh process")
        image, dtype = bundled.photographs()[0], (arguments.dtype or ["auto"])[0]
        found["first_embedding"] = measure_first_embedding(str(path), image, dtype=dtype)
    speeds = _speeds(arguments, source, arguments.dtype or DEFAULT_DTYPES[on.kind])
    found["speed"] = [asdict(speed) | speed.rates for speed in speeds]
    return found


def table(found: dict[str, Any], *, runs: int) -> str:
    """What was measured, as lines for the terminal."""
    lines = [
        ("machine", f"{found['chip']}, {found['device']}, {found['cores']} cores"),
        ("versions", f"mlx {found['mlx']}, mlx-aimv2 {found['mlx-aimv2']}"),
        ("model", found["model"]),
    ]
    if read := found.get("loading"):
        size = f"{read['bytes'] / 1e6:.0f} MB"
        lines.append(("load", f"{read['seconds']:.2f} s, {read['ratio']:.2f} times reading the {size} (page cache)"))
    if first := found.get("first_embedding"):
        steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in first.items())
        lines.append(("first embedding", f"{sum(first.values()):.2f} s in a fresh process: {steps}"))
    if found["advice"]:
        lines.append(("advice", found["advice"]))
    width = max(len(name) for name, _ in lines)
    head = [f"{name:<{width}}  {value}" for name, value in lines]
    rows = [list(COLUMNS), *([cell(speed) for cell in COLUMNS.values()] for speed in found["speed"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    body = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*head, "", *body, "", NOTE.format(runs=runs)])


def _speeds(arguments: argparse.Namespace, source: Source | None, dtypes: tuple[str, ...]) -> Iterator[Speed]:
    for dtype in dtypes:
        for weights in ("dense", "packed") if arguments.keep_quantized else ("dense",):
            model: AnyModel
            if source is None:
                model = random_model(released(arguments.random).vision, parse_dtype(dtype))
            else:
                model = source.reopened().load(dtype=dtype, keep_quantized=weights == "packed").model
            for batch in arguments.batch:
                _tell(f"{dtype} {weights}, {batch} images")
                pixels = random_pixels(model.vision.config, batch=batch, side=arguments.side)
                yield measure_speed(model, pixels, runs=arguments.runs, weights=weights)


def _tell(step: str) -> None:
    log(f"measuring: {step}")


def _up_to(limit: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        number = int(text) if text.isdigit() and len(text) < 10 else 0
        if not 1 <= number <= limit:
            raise argparse.ArgumentTypeError(f"a whole number from 1 to {limit} is wanted, got {text:.20}")
        return number

    return count


@dataclass(frozen=True)
class Speed:
    """One forward pass: B images of N tokens, medians over the runs.

    `weights` is dense or packed, `weight_bytes` what they take. `peak_bytes` is the most memory above the weights and
    the pixels. `flops` are the multiplications and additions of the matrix products, `bare_seconds` what these take
    alone.
    """

    dtype: str
    weights: str
    weight_bytes: int
    batch: int
    tokens: int
    seconds: float
    bare_seconds: float
    flops: int
    peak_bytes: int
    runs: int

    @property
    def rates(self) -> dict[str, float]:
        """What follows from the times; `fraction_of_bare` is that of the speed of the bare products, from 0 to 1."""
        return {
            "milliseconds_per_image": 1e3 * self.seconds / self.batch,
            "images_per_second": self.batch / self.seconds,
            "flops_per_second": self.flops / self.seconds,
            "fraction_of_bare": self.bare_seconds / self.seconds,
        }


def random_model(config: Aimv2VisionConfig, dtype: mx.Dtype) -> Aimv2VisionModel:
    """A model of these sizes with random weights: as fast as a trained one, its features mean nothing."""
    model = Aimv2VisionModel(config)
    model.set_dtype(dtype)
    for _, layer in model.named_modules():
        mx.eval([array for array in layer.values() if isinstance(array, mx.array)])  # one layer's float32 at a time
    model.eval()
    return model


def random_pixels(config: Aimv2VisionConfig, *, batch: int, side: int | None = None) -> mx.array:
    """Images of the size the model takes, `(B, H, W, 3)`; `side` is for native models."""
    side = config.image_size or side or NATIVE_SIDE
    pixels = mx.random.normal((batch, side, side, config.num_channels), key=mx.random.key(0))
    mx.eval(pixels)
    return pixels


def matrix_flops(config: Aimv2VisionConfig, *, batch: int, tokens: int) -> int:
    """Multiplications and additions of all matrix products of a forward pass."""
    width, inner = config.hidden_size, config.intermediate_size
    patches = config.num_channels * config.patch_size**2 * width
    block = width * 3 * width + width * width + 3 * width * inner + 2 * tokens * width
    head = 2 * width * width + 2 * width if config.use_head else 0
    last = width * width if config.use_head else 0
    return 2 * batch * (tokens * (patches + config.num_hidden_layers * block + head) + last)


def measure_speed(model: AnyModel, pixels: mx.array, *, runs: int, weights: str = "dense") -> Speed:
    """Times the vision encoder on images `(B, H, W, 3)`, in turn with its bare matrix products."""
    vision = model.vision
    rows, columns = vision.grid(pixels)
    batch, tokens = pixels.shape[0], rows * columns
    parameters: Any = tree_flatten(vision.parameters())
    bare = _bare_products(vision, batch=batch, tokens=tokens)

    def forward() -> None:
        mx.eval(vision(pixels).last_hidden_state)

    warm = time.perf_counter() + (0 if mx.default_device() == mx.cpu else WARM_UP_SECONDS)
    while True:
        forward()
        bare()
        if time.perf_counter() >= warm:
            break
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    forward()
    peak = mx.get_peak_memory() - before
    seconds, bare_seconds = _alternating(forward, bare, runs=runs)
    return Speed(
        dtype_name(vision.dtype),
        weights,
        sum(array.nbytes for _, array in parameters),
        batch,
        tokens,
        seconds,
        bare_seconds,
        matrix_flops(vision.config, batch=batch, tokens=tokens),
        peak,
        runs,
    )


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


def measure_first_embedding(path: str, image: Path, *, dtype: str | None) -> dict[str, float]:
    """Seconds of a fresh process: importing, loading, and an image's embedding with all that a first run costs."""
    command = [sys.executable, "-c", FIRST_EMBEDDING, path, dtype or "", str(image)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise ValueError(f"a fresh process could not embed an image: {finished.stderr.strip().splitlines()[-1]}")
    return dict(zip(("importing", "loading", "embedding"), json.loads(finished.stdout), strict=True))


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
