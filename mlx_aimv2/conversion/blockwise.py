"""What does a model make of a few images, without ever being in memory as a whole?

A checkpoint is loaded lazily and walked through block by block: all images pass a block, then its weights are freed.
So a 3B model in float32 is observed in the memory of one block, and two models never meet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2.find_images import list_images
from mlx_aimv2.loading import AnyModel, build, load, parameter_shapes, read_source
from mlx_aimv2.model import Aimv2Model, Aimv2TextModel, Aimv2VisionModel, run_blocks, unit_length
from mlx_aimv2.processor import Aimv2Processor

MOST_IMAGES = 32
"""Of a folder with more images this many are taken, evenly spread over their sorted names."""

TEXTS = (
    "a photo of a cat",
    "an astronaut in front of a flag",
    "a cup of coffee on a wooden table",
    "a rocket on its launch pad at night",
    "an empty street",
)
"""What the text encoder reads where there is one."""

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class BlockwiseRun:
    """What one model gave.

    `tokens` one (N, D) for each image, after the final norm; `vectors` (B, D), or (B, E) for LiT, as `encode_image`
    gives them; `text_vectors` (T, E), `text_tokens` T arrays (L, D) and `logits` (B, T) for LiT alone. `peaks` the
    largest absolute value that occurred in each block, on its way from layer to layer and at its end. `stored_bytes` of
    all tensors on disk.
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
    path_or_hf_repo: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    inside: bool = False,
    name: str | None = None,
) -> BlockwiseRun:
    """Shows a checkpoint some images: `path or Hub name, B images -> BlockwiseRun`.

    With `inside` the peaks count what passes between the layers of a block as well as what leaves it. `name` is what
    the model is called in reports, else the repository's or the folder's name.
    """
    source = read_source(path_or_hf_repo, revision=revision)
    stored_bytes = sum(array.nbytes for array in source.weights.values())
    parameters = count_parameters(source.config)
    name = name or source.origin.repo or source.origin.folder.resolve().name
    del source
    model, processor = load(path_or_hf_repo, revision=revision, dtype=dtype, lazy=True)
    peaks: dict[str, float] = {}
    vision, prefix = model.vision, "vision_model." if isinstance(model, Aimv2Model) else ""
    states = [vision.embed(processor(os.fspath(image))) for image in images]
    states = walk(vision, states, peaks, inside=inside, prefix=prefix)
    vectors = mx.concatenate([_image_vector(model, state) for state in states])
    tokens = [_numbers(state[0]) for state in states]
    text_vectors = logits = None
    text_tokens: list[Floats] = []
    if isinstance(model, Aimv2Model):
        ids = text_ids(model, processor)
        texts = walk(
            model.text_model, [embed_text(model, row) for row in ids], peaks, inside=inside, prefix="text_model."
        )
        # Nothing is filled up, so the end of the text is the last token.
        words = mx.concatenate([model.text_projection(state[:, -1]) for state in texts])
        logits = _numbers(model.logits(unit_length(vectors), unit_length(words)))
        text_vectors, text_tokens = _numbers(words), [_numbers(state[0]) for state in texts]
    return BlockwiseRun(
        name,
        str(model.dtype).rpartition(".")[2],
        parameters,
        stored_bytes,
        tokens,
        _numbers(vectors),
        peaks,
        text_vectors,
        text_tokens,
        logits,
    )


def walk(
    encoder: Aimv2VisionModel | Aimv2TextModel,
    states: list[mx.array],
    peaks: dict[str, float],
    *,
    inside: bool = False,
    prefix: str = "",
) -> list[mx.array]:
    """Runs embedded inputs through an encoder and its final norm, freeing each block: `[(1, N, D), …] -> the same`.

    The encoder is used up. `peaks` gets the largest absolute value of each block.
    """
    causal = isinstance(encoder, Aimv2TextModel)
    mx.eval(states)
    for i, block in enumerate(encoder.blocks):
        seen: list[mx.array] = []
        if inside:
            _watch(block, seen)
        highest = 0.0
        for k, state in enumerate(states):
            states[k] = next(run_blocks([block], state, causal=causal))
            highest = max(highest, _largest([*seen, mx.abs(states[k]).max()]))
            seen.clear()
        peaks[f"{prefix}blocks.{i}"] = highest
        encoder.blocks[i] = nn.Identity()
        del block
        mx.clear_cache()
    return [encoder.norm(state) for state in states]


def choose_images(folder: str | os.PathLike[str] | None) -> list[Path]:
    """The images to look at: those of a folder, or the four that are bundled. Raises FileNotFoundError for none."""
    if folder is None:
        from mlx_aimv2 import bundled

        return bundled.photographs()
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: wanted a folder of images, there is none")
    files = [Path(file) for file in list_images([folder]).files]
    if not files:
        raise FileNotFoundError(f"{folder}: no images in this folder")
    if len(files) > MOST_IMAGES:
        files = [files[i * len(files) // MOST_IMAGES] for i in range(MOST_IMAGES)]
    return files


def text_ids(model: Aimv2Model, processor: Aimv2Processor) -> list[mx.array]:
    """`TEXTS` as ids, each without filling: `[(1, L), …]`. Without a tokenizer, numbers spread over the vocabulary."""
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


def embed_text(model: Aimv2Model, ids: mx.array) -> mx.array:
    """The input of the text encoder's first block: `(1, L) -> (1, L, D)`."""
    encoder = model.text_model
    embedded: mx.array = encoder.token_embed(ids) + encoder.pos_embed[: ids.shape[1]]
    return embedded


def cosines(a: Floats, b: Floats) -> Floats:
    """Cosine of each row with its fellow, `(N, D), (N, D) -> (N,)`; 0 for a row that is not finite."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (a * b).sum(axis=-1) / lengths
    same: Floats = np.clip(np.where(np.isfinite(values), values, 0.0), -1.0, 1.0)
    return same


def token_cosines(a: Sequence[Floats], b: Sequence[Floats]) -> Floats:
    """Cosines of all tokens of several images or texts, one after another."""
    return np.concatenate([cosines(ours, theirs) for ours, theirs in zip(a, b, strict=True)])


def count_parameters(config: Any) -> int:
    """Numbers of a model as it computes, however they are packed."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in parameter_shapes(build(config)).values())


def _image_vector(model: AnyModel, state: mx.array) -> mx.array:
    """What `encode_image` gives, from the tokens: `(1, N, D) -> (1, D)` or `(1, E)`."""
    if isinstance(model, Aimv2Model):
        return model.visual_projection(model.vision.head(state))
    return state.astype(mx.float32).mean(axis=1)


def _watch(block: nn.Module, seen: list[mx.array]) -> None:
    """Puts a listener before each layer of a block that writes down what goes in and out."""
    for part, name in ((block.attn, "qkv"), (block.attn, "proj"), *((block.mlp, n) for n in ("gate", "up", "down"))):
        setattr(part, name, _Listener(getattr(part, name), seen))


class _Listener:
    """Stands in for a layer and keeps the largest absolute value of its input and output."""

    def __init__(self, layer: nn.Module, seen: list[mx.array]) -> None:
        self.layer, self.seen = layer, seen

    def __call__(self, x: mx.array) -> mx.array:
        y = self.layer(x)
        self.seen += [mx.abs(x).max(), mx.abs(y).max()]
        return y


def _largest(peaks: list[mx.array]) -> float:
    """The largest of some absolute values; infinity also for what is not a number."""
    largest: float = mx.stack([peak.astype(mx.float32) for peak in peaks]).max().item()  # type: ignore[assignment]
    return math.inf if math.isnan(largest) else largest


def _numbers(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)
