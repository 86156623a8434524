"""Searches the fewest bits of each layer with which the features stay within a target.

The target is the mean cosine of the tokens with those of the float32 source, on calibration images. The method:

1. What one layer at so many bits costs is measured where it counts, at the output: only this layer is quantized, the
   rest runs in float32, and the loss is 1 - mean token cosine. Bits from 8 downwards, until the layer alone would use
   up what the target allows.
2. Losses of several layers roughly add up, as long as they are small. So the smallest model within an allowance is a
   knapsack with one choice for each layer, solved exactly by dynamic programming.
3. "Roughly" is measured too: each choice runs as a whole, and the allowance is corrected by what was found until the
   target is met closely. Choices for allowances around it are tried as well; in the smallest few single layers are
   lowered further as long as the whole still meets the target.

Choosing bits by measured sensitivity under a budget is HAWQ's idea (arXiv 1905.03696; as an integer programme HAWQ-V3,
arXiv 2011.10680). mlx-lm's dynamic quantization ranks layers by gradients times weight errors and gives each one of two
widths, to reach a size; here all of MLX's widths are used, the output's error is measured instead of estimated, and
quality is what is asked for.

Cost: the source is held in float32. A layer of block i is measured through the blocks from i on, so `depth` blocks of
five layers cost about `5 * widths * depth / 2` runs of the whole model over the images: 240 at 24 blocks, 4 widths,
and some forty for the choices as a whole.
The same source, images and device give the same bits.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.config import dtype_name
from mlx_aimv2.conversion.blockwise import run_blockwise, text_ids, token_cosines
from mlx_aimv2.loading import load
from mlx_aimv2.model import Aimv2Model, Aimv2TextModel, Aimv2VisionModel, run_blocks
from mlx_aimv2.quantize import MODES, STAY_DENSE, Predicate, layers, pack, unpack

WIDTHS = sorted(MODES["affine"].bits, reverse=True)
BINS = 1 << 14
"""Into how many steps the allowance is divided in the knapsack."""

CORRECTIONS, NEIGHBOURS, FINALISTS = 6, 16, 4
"""Runs to correct the allowance; allowances tried around it; choices that go into the last step."""

SAFETY = 0.99
"""Of the allowed loss this share is used: the folder is computed in its own dtype, whose rounding varies a little."""

AnyEncoder = Aimv2VisionModel | Aimv2TextModel

Bits = dict[str, int | None]
"""Path of a layer -> its bits; None stays dense."""

Losses = dict[str, dict[int | None, float]]
"""Path of a layer -> bits -> 1 - mean token cosine with this layer alone quantized."""

Stored = Callable[[mx.array, int], mx.array]
"""A weight at so many bits, as it would be read back from a folder."""


def choose_bits(
    path_or_hf_repo: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    *,
    target: float,
    settings: Mapping[str, Any],
    dtype: mx.Dtype,
    revision: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Bits:
    """The bits of each layer for a mean token cosine of at least `target`: `checkpoint, images -> Bits`.

    `settings` are group size and mode of all layers, `dtype` that of the scales and of what stays dense. LiT's encoders
    are searched one after the other, the text encoder on `blockwise.TEXTS`. Raises ValueError if `dtype` alone misses
    the target.
    """
    rounding = _loss_of_dtype(path_or_hf_repo, images, dtype=dtype, revision=revision)
    model, processor = load(path_or_hf_repo, revision=revision, dtype=mx.float32)

    def stored(weight: mx.array, width: int) -> mx.array:
        own = {**settings, "bits": width}
        return unpack(pack(weight, own, dtype), own)

    chosen: Bits = {}
    is_lit = isinstance(model, Aimv2Model)
    pixels = [processor(os.fspath(image)) for image in images]
    encoders: list[tuple[str, AnyEncoder, list[mx.array]]] = [("vision_model." * is_lit, model.vision, pixels)]
    if isinstance(model, Aimv2Model):
        encoders.append(("text_model.", model.text_model, text_ids(model, processor)))
    for encoder in itertools.starmap(_Encoder, encoders):
        lost = rounding.get(encoder.prefix, 0.0)
        if 1 - target <= lost:
            raise ValueError(
                f"the target {target} cannot be reached: {dtype_name(dtype)} alone, without fewer bits, gives a mean "
                f"token cosine of {1 - lost:.7f}; ask for less or for --dtype float32"
            )
        chosen |= _search(encoder, (1 - target - lost) * SAFETY, stored, 8 * dtype.size, log)
    return chosen


def most_common(bits: Bits) -> int:
    """The bits that most layers have, for the shared entry; the most bits where all stay dense."""
    counts = Counter(width for width in bits.values() if width is not None)
    return max(counts, key=lambda width: (counts[width], width)) if counts else WIDTHS[0]


def as_predicate(bits: Bits) -> Predicate:
    """The choice as `quantize.plan` takes it."""

    def settings(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        width = bits[path]
        return {"bits": width} if width is not None else False

    return settings


class _Encoder:
    """An encoder as steps, the embedding (0) and the blocks, each of which may hold layers to quantize."""

    def __init__(self, prefix: str, encoder: AnyEncoder, inputs: list[mx.array]) -> None:
        self.prefix, self.encoder, self.inputs = prefix, encoder, inputs
        self.layers: list[dict[str, nn.Module]] = [{} for _ in range(1 + len(encoder.blocks))]
        for path, layer in layers(encoder).items():
            if not set(path.split(".")) & set(STAY_DENSE):
                step = int(path.split(".")[1]) + 1 if path.startswith("blocks.") else 0
                self.layers[step][prefix + path] = layer
        self.sizes: dict[str, int] = {path: layer.weight.size for found in self.layers for path, layer in found.items()}
        self.reference = self._tokens(inputs, 0, {}, lambda weight, width: weight)

    def loss(self, states: list[mx.array], start: int, bits: Mapping[str, int | None], stored: Stored) -> float:
        """1 - mean token cosine with these layers quantized, from the input of step `start` on."""
        pairs = zip(self._tokens(states, start, bits, stored), self.reference, strict=True)
        # Half the squared distance of unit vectors is the same and keeps its digits near 0.
        losses = mx.concatenate([mx.square(a - b).sum(axis=-1).flatten() for a, b in pairs])
        return float(np.array(losses).astype(np.float64).mean() / 2)

    def advance(
        self, states: list[mx.array], number: int, bits: Mapping[str, int | None], stored: Stored
    ) -> list[mx.array]:
        """Through one step, with the weights of its layers exchanged meanwhile: `[(1, N, D), …] -> [(1, N, D), …]`."""
        weights = {}
        for path, layer in self.layers[number].items():
            weights[path] = layer.weight
            width = bits.get(path)
            layer.weight = layer.weight if width is None else stored(layer.weight, width)
        states = [self._step(number, state) for state in states]
        mx.eval(states)
        for path, layer in self.layers[number].items():
            layer.weight = weights[path]
        return states

    def _step(self, number: int, state: mx.array) -> mx.array:
        if number == 0:
            return self.encoder.embed(state)
        causal = isinstance(self.encoder, Aimv2TextModel)
        return next(run_blocks([self.encoder.blocks[number - 1]], state, causal=causal))

    def _tokens(
        self, states: list[mx.array], start: int, bits: Mapping[str, int | None], stored: Stored
    ) -> list[mx.array]:
        """Tokens of unit length after the final norm."""
        for number in range(start, len(self.layers)):
            states = self.advance(states, number, bits, stored)
        tokens = [self.encoder.norm(state) for state in states]
        units = [x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in tokens]
        mx.eval(units)
        return units


def _search(encoder: _Encoder, allowed: float, stored: Stored, dense_bits: int, log: Callable[[str], None]) -> Bits:
    losses: Losses = {}
    states = encoder.inputs
    for number, found in enumerate(encoder.layers):
        for path in found:
            losses[path] = {None: 0.0}
            for width in WIDTHS:
                losses[path][width] = encoder.loss(states, number, {path: width}, stored)
                if losses[path][width] > allowed:
                    break
        states = encoder.advance(states, number, {}, stored)
        log(f"[INFO] Measured {encoder.prefix}{'embedding' if number == 0 else f'blocks.{number - 1}'} at the output")

    def size(bits: Bits) -> int:
        return sum((width or dense_bits) * encoder.sizes[path] for path, width in bits.items())

    def whole(bits: Bits) -> float:
        return encoder.loss(encoder.inputs, 0, bits, stored)

    # Losses do not quite add up: the first runs find the ratio, the others try values around it.
    tried: list[Bits] = []
    fitting: list[tuple[int, float, Bits]] = [(size(dict.fromkeys(losses)), 0.0, dict.fromkeys(losses))]
    ratio = 1.0
    for spread in (*[1.0] * CORRECTIONS, *np.geomspace(0.8, 1.25, NEIGHBOURS)):
        bits = knapsack(losses, encoder.sizes, allowed * ratio * spread, dense_bits=dense_bits)
        if bits in tried:
            continue
        tried.append(bits)
        loss = whole(bits)
        if loss <= allowed:
            fitting.append((size(bits), loss, bits))
        if spread == 1.0 and loss > 0:
            ratio *= min(4.0, max(0.25, allowed / loss))
    fitting.sort(key=lambda found: found[:2])
    lowered = [_lowered(bits, loss, allowed, losses, encoder.sizes, whole) for _, loss, bits in fitting[:FINALISTS]]
    best, best_loss = min(lowered, key=lambda found: (size(found[0]), found[1]))
    log(f"[INFO] Chose {_histogram(best)}: mean token cosine {1 - best_loss:.6f}")
    return best


def _lowered(
    bits: Bits,
    loss: float,
    allowed: float,
    losses: Losses,
    sizes: Mapping[str, int],
    whole: Callable[[Bits], float],
) -> tuple[Bits, float]:
    """Lowers single layers, those that save most for their loss first, while the whole still meets the target."""
    failed: set[tuple[str, int]] = set()
    while True:
        steps = []
        for path, width in bits.items():
            lower = [known for known in losses[path] if known is not None and (width is None or known < width)]
            if lower and (path, max(lower)) not in failed:
                more = losses[path][max(lower)] - losses[path][width]
                if more <= 1.5 * (allowed - loss):
                    steps.append((more / sizes[path], path, max(lower)))
        if not steps:
            return bits, loss
        _, path, lower_width = min(steps)
        trial = {**bits, path: lower_width}
        found = whole(trial)
        if found <= allowed:
            bits, loss = trial, found
        else:
            failed.add((path, lower_width))


def knapsack(losses: Losses, sizes: Mapping[str, int], allowance: float, *, dense_bits: int) -> Bits:
    """The smallest choice of bits whose losses add up to at most `allowance`: `path -> {bits: loss} -> path -> bits`.

    Exact but for the rounding of each loss up to a `BINS`th of the allowance.
    """
    smallest = np.zeros(BINS + 1)  # of the layers so far, within so many steps of the allowance
    picks: list[tuple[list[int | None], NDArray[np.intp]]] = []
    for path, options in losses.items():
        widths = list(options)
        rows = np.full((len(widths), BINS + 1), np.inf)
        for row, width in zip(rows, widths, strict=True):
            steps = int(np.ceil(options[width] / allowance * BINS))
            if steps <= BINS:
                row[steps:] = smallest[: BINS + 1 - steps] + (width or dense_bits) * sizes[path]
        picks.append((widths, rows.argmin(axis=0)))
        smallest = rows.min(axis=0)
    left, bits = BINS, {}
    for (path, options), (widths, pick) in zip(reversed(losses.items()), reversed(picks), strict=True):
        bits[path] = widths[pick[left]]
        left -= int(np.ceil(options[bits[path]] / allowance * BINS))
    return {path: bits[path] for path in losses}


def _loss_of_dtype(
    path: str | os.PathLike[str], images: Sequence[str | os.PathLike[str]], *, dtype: mx.Dtype, revision: str | None
) -> dict[str, float]:
    """What computing in `dtype` costs with all weights dense: encoder's prefix -> 1 - mean token cosine."""
    if dtype == mx.float32:
        return {}
    exact, rounded = (run_blockwise(path, images, revision=revision, dtype=kind) for kind in (mx.float32, dtype))
    vision = 1 - float(token_cosines(exact.tokens, rounded.tokens).mean())
    text = 1 - float(token_cosines(exact.text_tokens, rounded.text_tokens).mean()) if exact.text_tokens else 0.0
    return {"": vision, "vision_model.": vision, "text_model.": text}


def _histogram(bits: Bits) -> str:
    counts = Counter(bits.values())
    named = sorted(counts.items(), key=lambda item: -(item[0] or 99))
    return ", ".join(f"{count} layers {'dense' if width is None else f'at {width} bits'}" for width, count in named)
