"""Quantizes the blocks of a model with calibration (GPTQ): later numbers compensate for the rounding of earlier ones.

Frantar et al. 2022 (arXiv 2210.17323) in the form of Chee et al. 2023 (LDLQ, arXiv 2307.13304), which gives the same
numbers without an inverse: with a layer's inputs X and `X'X = U D U'`, U upper triangular with ones on its diagonal, a
column is rounded after adding the errors of the columns before it, times U. A group's scale and bias are those that MLX
computes for the corrected columns: the result is MLX's affine format.

Two streams of tokens go from block to block, one through the quantized layers and one through the dense ones. A layer
is calibrated on the outputs of the quantized layers before it, and the last layer of attention and of the feed-forward
is first fitted to bring the quantized stream back to the dense one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.backend import attention, by_images, swiglu
from mlx_aimv2.checkpoint.detect import listed
from mlx_aimv2.layers import Block, merge_heads
from mlx_aimv2.quantize import pack, settings_at, unpack

DAMPING = 0.03
"""Added to the diagonal of X'X, as a share of its mean; ten times as much where X'X cannot be factored."""

FIT_DAMPING = 1.0
"""The same for the fit to the dense stream: weights move only where the data leave no doubt."""

Floats = NDArray[np.floating[Any]]


class Calibration:
    """One encoder's tokens on their way through its blocks, which are quantized and removed one by one."""

    def __init__(
        self,
        states: list[mx.array],
        quantization: Mapping[str, Any],
        dtype: mx.Dtype,
        on_block: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes the embedded inputs, each (B, N, D), the section of config.json, and the dtype of the scales.

        `on_block` is called after each block.
        """
        self.states, self.exact = states, list(states)
        self.tokens = sum(x.size // x.shape[-1] for x in states)
        self.quantization, self.dtype, self.on_block = quantization, dtype, on_block
        self.parts: dict[str, list[mx.array]] = {}
        self.notes: dict[str, list[str]] = {}

    def __call__(self, blocks: list[Block], prefix: str = "", *, causal: bool = False) -> dict[str, list[mx.array]]:
        """The blocks' layers packed: `-> {path: packed integers, scales, biases}`; `prefix` goes before `blocks`.

        Raises ValueError for activations that are not finite.
        """

        def attended(block: Block, x: mx.array) -> mx.array:
            return merge_heads(attention(*block.attn.heads(block.norm1(x)), causal=causal))

        for i, block in enumerate(blocks):
            path = f"{prefix}blocks.{i}"
            rounded = copy.copy(block)
            rounded.attn, rounded.mlp = copy.copy(block.attn), copy.copy(block.mlp)
            self._half(block, rounded, block.norm1, attended, f"{path}.attn.qkv", f"{path}.attn.proj")
            self._half(block, rounded, block.norm2, _gated, f"{path}.mlp.gate", f"{path}.mlp.up", f"{path}.mlp.down")
            blocks[i] = nn.Identity()
            del block, rounded
            mx.clear_cache()
            self.on_block()
        for note, paths in self.notes.items():
            warnings.warn(f"{note}: {listed(paths)}", stacklevel=2)
        return self.parts

    def _half(
        self,
        block: Block,
        rounded: Block,
        norm: nn.Module,
        hidden: Callable[[Block, mx.array], mx.array],
        *paths: str,
    ) -> None:
        """Quantizes attention or feed-forward into `rounded`, and runs both streams through it.

        `hidden` computes the inputs of the last of the layers at `paths`.
        """
        *first, last = paths
        dense = _layer(block, last)

        def inputs(x: mx.array) -> tuple[mx.array]:
            return (_product(h := norm(x), h),)

        def outputs(x: mx.array, exact: mx.array) -> tuple[mx.array, ...]:
            h, exact = hidden(rounded, x), exact + dense(hidden(block, exact))
            return h, exact, _product(h, h), _product(exact - x, h)

        squares = products = mx.array(0.0)
        for x in self.states:
            squares = squares + by_images(inputs, x)[0].sum(axis=0)
            mx.eval(squares)
        self._quantize(first, rounded, squares)
        between, squares = [], mx.array(0.0)
        for i in range(len(self.states)):
            h, self.exact[i], *sums = by_images(outputs, self.states[i], self.exact[i])
            squares, products = squares + sums[0].sum(axis=0), products + sums[1].sum(axis=0)
            mx.eval(h, self.exact[i], squares, products)
            between.append(h)
        del h, sums
        self._quantize([last], rounded, squares, products - dense.weight @ squares)
        packed = _layer(rounded, last)
        for i in range(len(between)):
            (self.states[i],) = by_images(lambda x, h: (x + packed(h),), self.states[i], between[i])
            mx.eval(self.states[i])
            between[i] = mx.array(0.0)

    def _quantize(
        self, paths: Sequence[str], rounded: Block, squared: mx.array, products: mx.array | None = None
    ) -> None:
        """Packs layers that share their inputs, and puts the values of the packed weights into `rounded`.

        `squared` is X'X (I, I); `products` (O, I) is E'X with the error E of the stream that the layer adds to.
        """
        squares: Floats = np.asarray(squared)
        wanted: Floats | None = None if products is None else np.array(products)
        mx.clear_cache()  # X'X is the largest array of all, and its parts have been added up
        if not np.isfinite(squares).all():
            raise ValueError(f"{paths[0]}: inputs are not finite even in float32: the weights are damaged")
        if self.tokens < len(squares):
            self._note(f"calibrated on {self.tokens:,} tokens, fewer than these layers have inputs", paths)
        if not np.diag(squares).all():
            self._note("some inputs are zero in all calibration data, so their weights are rounded without it", paths)
        for path in paths:
            settings, layer = settings_at(path, self.quantization), copy.copy(_layer(rounded, path))
            if settings and settings["mode"] != "affine":  # a predicate's own
                self.parts[path] = pack(layer.weight, settings, self.dtype)
            elif settings:
                weight = np.array(layer.weight)
                if wanted is not None:
                    weight = weight + np.linalg.solve(_damped(squares.copy(), FIT_DAMPING), wanted.T).T
                self.parts[path] = self._packed(path, weight, squares, settings)
            if settings:
                layer.weight = unpack(self.parts[path], settings)
                mx.eval(self.parts[path], layer.weight)
            part, name = path.split(".")[-2:]
            rounded[part][name] = layer

    def _packed(self, path: str, weight: Floats, squares: Floats, settings: Mapping[str, Any]) -> list[mx.array]:
        """A weight (O, I) rounded column by column: `-> packed integers, scales, biases`."""
        group, bits = settings["group_size"], settings["bits"]
        order = _order(np.diag(squares), group)
        factor, damping = _factor(squares, order)
        if damping > DAMPING:
            self._note(f"X'X could not be factored, so its diagonal was raised by {damping:.0%}", [path])
        columns = np.ascontiguousarray(weight.T[order])
        numbers, errors = np.empty(columns.shape, np.uint8), np.empty_like(columns)
        scales, biases = (np.empty((len(order) // group, columns.shape[1]), columns.dtype) for _ in range(2))
        for start in range(0, len(order), group):
            end, here = start + group, order[start] // group
            due = factor[:start, start:end].T @ errors[:start]
            block = columns[start:end] + due
            # As if the group's own columns were rounded without error: the best guess available.
            expected = columns[start:end] + np.linalg.solve(factor[start:end, start:end].T, due)
            grid = mx.quantize(mx.array(expected.T), group_size=group, bits=bits)[1:]
            scales[here], biases[here] = (np.array(x.astype(self.dtype).astype(mx.float32))[:, 0] for x in grid)
            for i in range(group):
                row = start + i
                levels = np.clip(np.rint((block[i] - biases[here]) / scales[here]), 0, 2**bits - 1)
                numbers[order[row]] = levels
                errors[row] = columns[row] - (levels * scales[here] + biases[here])
                block[i + 1 :] += factor[row, row + 1 : end, None] * errors[row]
        return [mx.array(_words(numbers.T, bits)), *(mx.array(x.T).astype(self.dtype) for x in (scales, biases))]

    def _note(self, words: str, paths: Sequence[str]) -> None:
        self.notes.setdefault(words, []).extend(paths)


def _gated(block: Block, x: mx.array) -> mx.array:
    x = block.norm2(x)
    return swiglu(block.mlp.gate(x), block.mlp.up(x))


def _layer(block: Block, path: str) -> nn.Module:
    """The layer of a block at the end of a path."""
    part, name = path.split(".")[-2:]
    layer: nn.Module = block[part][name]
    return layer


def _product(a: mx.array, b: mx.array) -> mx.array:
    """`A'B` over all tokens: `(B, N, O), (B, N, I) -> (1, O, I)`."""
    return (a.flatten(0, -2).T @ b.flatten(0, -2))[None]


def _damped(squares: Floats, damping: float) -> Floats:
    """`squares` itself, its diagonal raised."""
    diagonal = np.diag(squares)
    np.fill_diagonal(squares, diagonal + damping * (diagonal.mean() or 1.0))
    return squares


def _order(diagonal: Floats, group: int) -> NDArray[np.intp]:
    """The columns in the order of rounding: groups with large inputs first, and within a group large inputs first."""
    groups = diagonal.reshape(-1, group)
    inside = np.argsort(-groups, axis=1, kind="stable") + group * np.arange(len(groups))[:, None]
    return inside[np.argsort(-groups.sum(axis=1), kind="stable")].ravel()


def _factor(squares: Floats, order: NDArray[np.intp]) -> tuple[Floats, float]:
    """U of `X'X = U D U'`, its columns in `order`, and the damping it needed: `(I, I), (I,) -> (I, I), damping`."""
    damping, backwards = DAMPING, np.ix_(order[::-1], order[::-1])
    while True:
        with suppress(np.linalg.LinAlgError):
            lower = np.linalg.cholesky(_damped(squares[backwards].astype(np.float64), damping))
            upper: Floats = lower[::-1, ::-1].astype(np.float32)
            return upper / np.diag(upper), damping
        damping *= 10


def _words(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Numbers of `bits` bits packed into 32-bit words, low bits first: `(O, I) -> (O, I bits / 32)`."""
    each = numbers[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(each.reshape(len(numbers), -1), axis=-1, bitorder="little").view(np.uint32)
