"""MLX's layers with weights of zeros inside `empty()`, for models whose weights are about to be loaded.

MLX's constructors draw random weights. In a thread that ends as the process exits, that aborts the process: the state
of MLX's random numbers belongs to the thread and is freed too late. Nor must loading advance the user's random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_is_empty = ContextVar("_is_empty", default=False)


@contextmanager
def empty() -> Iterator[None]:
    """Within the block, and in this thread alone, the layers of this module start with zeros."""
    token = _is_empty.set(True)
    try:
        yield
    finally:
        _is_empty.reset(token)


class Linear(nn.Linear):
    """`nn.Linear`: `(…, D) -> (…, E)`."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True) -> None:
        if not _is_empty.get():
            super().__init__(input_dims, output_dims, bias=bias)
            return
        nn.Module.__init__(self)
        self.weight = mx.zeros((output_dims, input_dims))
        if bias:
            self.bias = mx.zeros((output_dims,))


class PatchConv(nn.Conv2d):
    """`nn.Conv2d` whose stride is its kernel: `(B, H, W, channels) -> (B, H / kernel, W / kernel, D)`."""

    def __init__(self, channels: int, dims: int, kernel: int) -> None:
        if not _is_empty.get():
            super().__init__(channels, dims, kernel_size=kernel, stride=kernel)
            return
        nn.Module.__init__(self)
        self.weight, self.bias = mx.zeros((dims, kernel, kernel, channels)), mx.zeros((dims,))
        self.stride, self.padding, self.dilation, self.groups = (kernel, kernel), (0, 0), 1, 1


class Embedding(nn.Embedding):
    """`nn.Embedding`: `(B, L) -> (B, L, D)`."""

    def __init__(self, num_embeddings: int, dims: int) -> None:
        if not _is_empty.get():
            super().__init__(num_embeddings, dims)
            return
        nn.Module.__init__(self)
        self.weight = mx.zeros((num_embeddings, dims))


def quantized(layer: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The layer with its weight packed, as `layer.to_quantized` makes it, without random numbers."""
    kind = nn.QuantizedEmbedding if isinstance(layer, nn.Embedding) else nn.QuantizedLinear
    packed: Any = kind.__new__(kind)
    nn.Module.__init__(packed)
    packed.group_size, packed.bits, packed.mode = settings["group_size"], settings["bits"], settings["mode"]
    if isinstance(layer, nn.Embedding):
        packed.num_embeddings, packed.dims = layer.weight.shape
    packed.weight, packed.scales, *biases = mx.quantize(layer.weight, **settings)
    packed.biases = biases[0] if biases else None
    if "bias" in layer:
        packed.bias = layer.bias
    packed.freeze()
    result: nn.Module = packed
    return result
