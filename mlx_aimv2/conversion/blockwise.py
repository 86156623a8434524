"""Runs a checkpoint on a few images block by block, in the memory of one block.

The weights are loaded lazily: all images pass a block, then its weights are freed. So a 3B model in float32 needs the
memory of one block, and two models that are compared are never in memory together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.config import dtype_name
from mlx_aimv2.loading import AnyModel, Source
from mlx_aimv2.model import Aimv2Model, Aimv2TextModel, Aimv2VisionModel, run_blocks, unit_length
from mlx_aimv2.processor import Aimv2Processor

TEXTS = (
    "a photo of a cat",
    "an astronaut in front of a flag",
    "a cup of coffee on a wooden table",
    "a rocket on its launch pad at night",
    "an empty street",
)
"""What a LiT model's text encoder is run on."""

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class BlockwiseRun:
    """The features and the range of activations of one model.

    `tokens` one (N, D) for each image, after the final norm; `vectors` (B, D), or (B, E) for LiT, as `encode_image`
    gives them; `text_vectors` (T, E), `text_tokens` T arrays (L, D) and `logits` (B, T) for LiT alone. `peaks` the
    largest absolute value of each block's output, or of everything between its layers too. `stored_bytes` of all
    tensors on disk.
    """

    name: str
    dtype: str
    parameters: int
    stored_bytes: int
    tokens: list[Floats]
    vectors: Floats
    peaks: dict[str, float]
    text_vectors: Floats | None = None
    text_tokens: list[Floats] = field(default_factory=list)
    logits: Floats | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each number of the model, scales included."""
        return 8 * self.stored_bytes / self.parameters


def run_blockwise(
    source: Source,
    images: Sequence[str | os.PathLike[str]],
    *,
    dtype: str | mx.Dtype | None = None,
    inside: bool = False,
    name: str | None = None,
) -> BlockwiseRun:
    """Runs a checkpoint on images, using up its weights: `Source, B images -> BlockwiseRun`.

    With `inside` the peaks include the inputs and outputs of the layers in a block. `name` is the model's name in
    reports, else the repository's or the folder's name.
    """
    stored_bytes, parameters = source.stored_bytes, source.parameters
    name = name or source.origin.repo or source.origin.folder.resolve().name
    loaded = source.load(dtype=dtype, lazy=True)
    model, processor = loaded.model, loaded.processor
    peaks: dict[str, float] = {}
    vision, prefix = model.vision, "vision_model." if isinstance(model, Aimv2Model) else ""
    states = [vision.embed(processor(os.fspath(image))) for image in images]
    states = run_encoder(vision, states, peaks, inside=inside, prefix=prefix)
    vectors = mx.concatenate([_image_vector(model, state) for state in states])
    tokens = [_float64(state[0]) for state in states]
    text_vectors = logits = None
    text_tokens: list[Floats] = []
    if isinstance(model, Aimv2Model):
        ids = text_ids(model, processor)
        text = model.text_model
        texts = run_encoder(text, [text.embed(row) for row in ids], peaks, inside=inside, prefix="text_model.")
        # Nothing is padded, so EOS is the last token.
        embeds = mx.concatenate([model.text_projection(state[:, -1]) for state in texts])
        logits = _float64(model.logits(unit_length(vectors), unit_length(embeds)))
        text_vectors, text_tokens = _float64(embeds), [_float64(state[0]) for state in texts]
    return BlockwiseRun(
        name,
        dtype_name(model.dtype),
        parameters,
        stored_bytes,
        tokens,
        _float64(vectors),
        peaks,
        text_vectors,
        text_tokens,
        logits,
    )


def run_encoder(
    encoder: Aimv2VisionModel | Aimv2TextModel,
    states: list[mx.array],
    peaks: dict[str, float],
    *,
    inside: bool = False,
    prefix: str = "",
) -> list[mx.array]:
    """Runs embedded inputs through an encoder and its final norm, freeing each block: `[(1, N, D), …] -> the same`.

    The encoder's blocks are removed. `peaks` gets the largest absolute value of each block.
    """
    causal = isinstance(encoder, Aimv2TextModel)
    mx.eval(states)
    for i, block in enumerate(encoder.blocks):
        found: list[mx.array] = []
        if inside:
            _record_ranges(block, found)
        highest = 0.0
        for k, state in enumerate(states):
            states[k] = next(run_blocks([block], state, causal=causal))
            highest = max(highest, _largest([*found, mx.abs(states[k]).max()]))
            found.clear()
        peaks[f"{prefix}blocks.{i}"] = highest
        encoder.blocks[i] = nn.Identity()
        del block
        mx.clear_cache()
    return [encoder.norm(state) for state in states]


def text_ids(model: Aimv2Model, processor: Aimv2Processor) -> list[mx.array]:
    """`TEXTS` as ids, each without padding: `[(1, L), …]`; without a tokenizer, ids spread over the vocabulary."""
    end = model.config.text_config.eos_token_id
    longest = model.config.text_config.max_position_embeddings
    rows: list[list[int]]
    try:
        rows = [np.array(processor.tokenize(text))[0].tolist() for text in TEXTS]
        rows = [row[: row.index(end) + 1] for row in rows]
    except FileNotFoundError:
        spread = [[end * (7 * i + k) // 53 % end for k in range(4 + i)] for i in range(len(TEXTS))]
        rows = [[*row[: longest - 1], end] for row in spread]
    return [mx.array([row]) for row in rows]


def cosines(a: Floats, b: Floats) -> Floats:
    """Cosines row by row, `(N, D), (N, D) -> (N,)`; 0 for a row that is not finite."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (a * b).sum(axis=-1) / lengths
    clipped: Floats = np.clip(np.where(np.isfinite(values), values, 0.0), -1.0, 1.0)
    return clipped


def token_cosines(a: Sequence[Floats], b: Sequence[Floats]) -> Floats:
    """Cosines of all tokens of several images or texts, one after another."""
    return np.concatenate([cosines(*pair) for pair in zip(a, b, strict=True)])


def _image_vector(model: AnyModel, state: mx.array) -> mx.array:
    """What `encode_image` gives, from the tokens: `(1, N, D) -> (1, D)` or `(1, E)`."""
    if isinstance(model, Aimv2Model):
        return model.visual_projection(model.vision.head(state))
    return state.astype(mx.float32).mean(axis=1)


def _record_ranges(block: nn.Module, found: list[mx.array]) -> None:
    """Replaces each linear layer of a block by one that also records the range of its input and output."""
    for part, name in ((block.attn, "qkv"), (block.attn, "proj"), *((block.mlp, n) for n in ("gate", "up", "down"))):
        setattr(part, name, _Recorder(getattr(part, name), found))


class _Recorder:
    """Calls a layer and records the largest absolute value of its input and of its output."""

    def __init__(self, layer: nn.Module, found: list[mx.array]) -> None:
        self.layer, self.found = layer, found

    def __call__(self, x: mx.array) -> mx.array:
        y = self.layer(x)
        self.found += [mx.abs(x).max(), mx.abs(y).max()]
        return y


def _largest(peaks: list[mx.array]) -> float:
    """The largest of some absolute values; infinity for NaN too."""
    largest: float = mx.stack([peak.astype(mx.float32) for peak in peaks]).max().item()  # type: ignore[assignment]
    return math.inf if math.isnan(largest) else largest


def _float64(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)
