"""What differs between machines, behind one interface: network, quantization and training name no processor.

`device` describes the machine. On MLX's CPU backend for x86, `x86` runs the blocks and has what training needs;
everywhere else MLX's own operations run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_aimv2 import layers
from mlx_aimv2.backend import x86
from mlx_aimv2.backend.x86 import WIDE_SIGHT, Balance, by_images, columns_first, prepared
from mlx_aimv2.layers import Block

__all__ = [
    "WIDE_SIGHT",
    "Balance",
    "attention",
    "by_images",
    "columns_first",
    "compiled",
    "compiles",
    "cross_entropy",
    "packing_streams",
    "plain_blocks",
    "prepared",
    "run_blocks",
    "swiglu",
]

MAX_TRACES = 16
"""Number of argument shapes for which a function is compiled; MLX never frees compiled functions."""


def run_blocks(
    blocks: Iterable[Block], x: mx.array, *, causal: bool = False, mask: mx.array | None = None
) -> Iterator[mx.array]:
    """Runs tokens through blocks and yields the output of each: `(B, N, D) -> (B, N, D), …`; as `layers.attention`."""
    run = x86.run_blocks if x86.on_x86_cpu() else plain_blocks
    return run(blocks, x, causal=causal, mask=mask)


def plain_blocks(
    blocks: Iterable[Block], x: mx.array, *, causal: bool = False, mask: mx.array | None = None
) -> Iterator[mx.array]:
    """`run_blocks` by MLX's own operations on any machine."""
    for block in blocks:
        x = block(x, causal=causal, mask=mask)
        yield x


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, causal: bool) -> mx.array:
    """`layers.attention`: three `(B, H, N, D/H) -> (B, H, N, D/H)`."""
    attend = x86.attention if x86.on_x86_cpu() else layers.attention
    return attend(queries, keys, values, causal=causal)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`layers.swiglu`: two `(B, N, I) -> (B, N, I)`."""
    return x86.swiglu(gate, up) if x86.on_x86_cpu() else layers.swiglu(gate, up)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """`-log softmax(logits)[target]`: `(B, T, V), (B, T) -> (B, T)`."""
    return x86.cross_entropy(logits, targets) if x86.on_x86_cpu() else nn.losses.cross_entropy(logits, targets)


def compiles() -> bool:
    """Whether training steps are compiled: on a GPU. For a CPU MLX starts a C++ compiler, and gains nothing."""
    return mx.default_device().type == mx.DeviceType.gpu


def compiled(function: Callable[..., Any], state: list[Any]) -> Callable[..., Any]:
    """`function` of trees of arrays, compiled where that pays; `state` are the arrays, in trees, that it changes.

    Beyond the first `MAX_TRACES` shapes of arguments it runs uncompiled.
    """
    if not compiles():
        return function
    fast, traced = mx.compile(function, inputs=state, outputs=state), set[tuple[Any, ...]]()

    def call(*arguments: Any) -> Any:
        leaves: Any = tree_flatten(arguments)
        shapes = tuple((path, leaf.shape) for path, leaf in leaves if leaf is not None)
        if len(traced) < MAX_TRACES:
            traced.add(shapes)
        return fast(*arguments) if shapes in traced else function(*arguments)

    return call


def packing_streams() -> Iterator[mx.Stream]:
    """Streams in turn: a CPU uses one core for each, so two layers are packed at once; a GPU needs one."""
    device = mx.default_device()
    if device.type != mx.DeviceType.cpu:
        return itertools.repeat(mx.default_stream(device))
    return itertools.cycle(x86.streams()[:2])
