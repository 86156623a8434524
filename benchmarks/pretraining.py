"""Times steps of pre-training beside the matrix products they contain, and states the memory they need.

    python -m benchmarks.pretraining                    20 steps at large-224's size, batch 4
    python -m benchmarks.pretraining --size FILE.json   other sizes, as `mlx-aimv2 pretrain --size` takes them

A step is the forward pass, the backward pass and AdamW. Its products are those of the forward pass and, for each, the
two of the backward pass; each distinct product is timed alone on the same streams, in turn with the steps.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_aimv2.backend import x86
from mlx_aimv2.cli.pretrain_lit import sizes
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.pretrain.objective import Batch, DecoderConfig, Pretraining, draw_lengths, initialise
from mlx_aimv2.pretrain.pretraining import Settings
from mlx_aimv2.train.loop import Step

CAPTION = 16
"""Tokens of a caption, BOS and EOS among them."""

Product = tuple[int, int, int, int, int]
"""How often, and batch, rows, inner size, columns of `(batch, rows, inner) @ (batch, inner, columns)`."""


@dataclass(frozen=True)
class Same:
    """One batch for every step."""

    batch: Batch

    def __call__(self, number: int) -> tuple[Batch, int]:
        return self.batch, 0

    def close(self) -> None:
        pass


@x86.prepared(x86.WIDE_SIGHT)
def main() -> None:
    parser = argparse.ArgumentParser(description="Time pre-training beside its matrix products.")
    parser.add_argument("--size", default="large")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    vision, decoder = sizes(arguments.size)
    model = Pretraining(vision, decoder, eos=1)
    initialise(model, vision.num_hidden_layers, seed=0)
    settings = Settings(
        vision=vision, decoder=decoder, dtype="float32", iters=arguments.steps, learning_rate=1e-4, warm_up=1
    )
    update = Step(model, lambda model, batch, key: model.losses(batch), settings.plan())
    patches = vision.num_patches or 0
    chance = np.random.default_rng(0)
    size = vision.image_size or 0
    batch = Batch(
        mx.array(chance.normal(size=(arguments.batch, size, size, 3)).astype(np.float32)),
        mx.array(chance.integers(2, decoder.vocab_size, (arguments.batch, CAPTION))),
        mx.array(draw_lengths(arguments.batch, patches, chance)),
    )

    def step() -> None:
        update(0, Same(batch))

    step()
    products = products_of(vision, decoder, arguments.batch)
    seconds, bare = [], []
    for _ in range(arguments.steps):
        seconds.append(timed(step))
        bare.append(sum(count * timed(run) for count, run in products))
    flops = 3 * sum(2 * c * b * m * k * n for c, b, m, k, n in shapes(vision, decoder, arguments.batch))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    middle, middle_bare = statistics.median(seconds), statistics.median(bare)
    print(
        f"a step of {arguments.batch} images: {middle:.2f} s, median of {arguments.steps}, least {min(seconds):.2f} s"
    )
    print(f"its matrix products alone: {middle_bare:.2f} s; fraction {middle_bare / middle:.1%}")
    print(f"{flops / 1e12:.2f} TFLOP in products, {flops / middle / 1e9:.0f} GFLOP/s; peak memory {peak / 1e9:.1f} GB")


def timed(work: Callable[[], None]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shapes(vision: Aimv2VisionConfig, decoder: DecoderConfig, batch: int) -> list[Product]:
    """The matrix products of a forward pass."""
    patches, text = vision.num_patches or 0, CAPTION - 1
    values = vision.num_channels * vision.patch_size**2
    found: list[Product] = [
        (1, 1, batch * patches, values, vision.hidden_size),
        (1, 1, batch * patches, vision.hidden_size, decoder.hidden_size),
        (1, 1, batch * (patches - 1), decoder.hidden_size, values),
        (1, 1, batch * text, decoder.hidden_size, decoder.vocab_size),
    ]
    for config, tokens in ((vision, patches), (decoder, patches + text)):
        width, inner, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        heads, rows = config.num_attention_heads, batch * tokens
        found += [
            (depth, 1, rows, width, 3 * width),
            (depth, 1, rows, width, width),
            (2 * depth, 1, rows, width, inner),
            (depth, 1, rows, inner, width),
            (depth, batch * heads, tokens, width // heads, tokens),
            (depth, batch * heads, tokens, tokens, width // heads),
        ]
    return found


def products_of(vision: Aimv2VisionConfig, decoder: DecoderConfig, batch: int) -> list[tuple[int, Callable[[], None]]]:
    """Each distinct product with the two of its backward pass, as a function that runs it on all streams."""
    return [(count, product(*rest)) for count, *rest in shapes(vision, decoder, batch)]


def product(batch: int, rows: int, inner: int, columns: int) -> Callable[[], None]:
    """`a @ b`, `c @ b.T` and `a.T @ c`, the rows (or the batch) shared by the streams as the blocks share images."""
    shards = x86.Shards.of((batch * rows, 1, inner)) if x86.on_x86_cpu() else x86.Shards([None])
    shards = replace(shards, axis=0 if batch > 1 else 1)
    a, b, c = (
        mx.random.normal((batch, m, n), key=mx.random.key(0))
        for m, n in ((rows, inner), (inner, columns), (rows, columns))
    )
    parts = [[mx.contiguous(part) for part in shards.split(x)] for x in (a, c)]
    others = [mx.contiguous(part) for part in shards.split(b)] if batch > 1 else [b] * len(parts[0])
    mx.eval(*parts, others)

    def work(a: mx.array, c: mx.array, b: mx.array) -> list[mx.array]:
        return [a @ b, c @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ c]

    def run() -> None:
        mx.eval(shards.run(work, *parts, others))

    return run


if __name__ == "__main__":
    main()
