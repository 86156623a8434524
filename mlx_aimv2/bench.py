"""Measures how fast a model is on this machine, beside the machine's own matrix products.

An encoder is matrix products. So each forward pass is timed in turn with the bare products of the same shapes, on the
same weights: the ratio of the two says what is left to gain here, and hardly depends on what else the machine does.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_aimv2 import x86
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.layers import Block, split_heads
from mlx_aimv2.model import Aimv2VisionModel

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
    def images_per_second(self) -> float:
        """Images in a second."""
        return self.batch / self.seconds

    @property
    def flops_per_second(self) -> float:
        """What the forward pass achieves, counting matrix products alone."""
        return self.flops / self.seconds

    @property
    def fraction(self) -> float:
        """Of the speed of the bare matrix products, from 0 to 1."""
        return self.bare_seconds / self.seconds


@dataclass(frozen=True)
class Loading:
    """Loading a checkpoint beside reading its files into memory, both from the page cache, medians over the runs."""

    seconds: float
    reading_seconds: float
    bytes: int

    @property
    def ratio(self) -> float:
        """How many times as long as reading the files."""
        return self.seconds / self.reading_seconds


@dataclass(frozen=True)
class FirstEmbedding:
    """Seconds of a fresh process: importing, loading, and a photograph's embedding with all that a first run costs."""

    importing: float
    loading: float
    embedding: float


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


def measure_speed(model: Any, pixels: mx.array, *, runs: int, weights: str = "dense") -> Speed:
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
        str(vision.dtype).rpartition(".")[2],
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


def measure_loading(load: Callable[[], Any], files: list[Path], *, runs: int) -> Loading:
    """Times `load()` in turn with reading its weight files."""

    def read() -> None:
        for file in files:
            file.read_bytes()

    read()
    load()
    seconds, reading = _alternating(lambda: _discard(load()), read, runs=runs)
    return Loading(seconds, reading, sum(file.stat().st_size for file in files))


def measure_first_embedding(path: str, image: Path, *, dtype: str | None) -> FirstEmbedding:
    """Runs a fresh process that imports, loads and embeds one image."""
    command = [sys.executable, "-c", FIRST_EMBEDDING, path, dtype or "", str(image)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise ValueError(f"a fresh process could not embed an image: {finished.stderr.strip().splitlines()[-1]}")
    return FirstEmbedding(*json.loads(finished.stdout))


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


def _discard(result: Any) -> None:
    del result
    mx.clear_cache()
