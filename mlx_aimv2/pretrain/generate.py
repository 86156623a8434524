"""What an encoder and the decoder of its pre-training generate: the rest of an image after a prefix, and its caption.

    prefix -> encoder -> decoder -> next patch -> encoder, causal after the prefix -> … -> BOS -> next token -> …

The keys and values of what was seen are kept, so each patch and each token goes through the blocks once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_aimv2.checkpoint.read import read_safetensors
from mlx_aimv2.images.open import ImageInput
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.layers import Block, attention, merge_heads, patches_of, pixels_of, project_and_add, sincos_positions
from mlx_aimv2.loading import load
from mlx_aimv2.pretrain.objective import DecoderConfig, Grid, Pretraining, drawable
from mlx_aimv2.pretrain.pretraining import DECODER_FILE, levels_of
from mlx_aimv2.tokenizer import Tokenizer

Cache: TypeAlias = "list[tuple[mx.array, mx.array] | None]"
"""Keys and values (B, H, N, D/H) of the tokens so far, for each block."""


@dataclass(frozen=True)
class Generated:
    """`images` (B, H, W, 3) uint8, the prefix of each and what was drawn after it; `captions`, one each."""

    images: np.ndarray[Any, np.dtype[np.uint8]]
    captions: list[str]


class Steps:
    """A model of `pretrain`, patch by patch and token by token: B images of one grid and one length of prefix."""

    def __init__(self, model: Pretraining, grid: Grid) -> None:
        encoder = model.encoder
        self.model, self.seen, self.read = model, 0, 0
        is_native = encoder.config.num_patches is None
        self.positions = (
            mx.array(sincos_positions(*grid, encoder.config.hidden_size)) if is_native else encoder.pos_embed
        )
        self._encoder: Cache = [None] * len(encoder.blocks)
        self._decoder: Cache = [None] * len(model.decoder.blocks)

    def patches(self, patches: mx.array) -> mx.array:
        """What follows each of the next patches, `(B, M, P) -> (B, M, P or P + 2)`; the first call has the prefix."""
        encoder, decoder, (batch, count, _) = self.model.encoder, self.model.decoder, patches.shape
        side = encoder.config.patch_size
        embedded = encoder.patch_embed(patches.reshape(batch * count, side, side, -1)).reshape(batch, count, -1)
        x = embedded + self.positions[self.seen : self.seen + count]
        features = encoder.norm(through(encoder.blocks, x, self._encoder, causal=self.seen > 0))
        self.seen += count
        x = through(decoder.blocks, decoder.from_features(features), self._decoder, causal=True)
        predicted: mx.array = decoder.patch_head(decoder.norm(x))
        return predicted

    def tokens(self, ids: mx.array) -> mx.array:
        """Logits of what follows each of the next tokens, after all patches: `(B, T) -> (B, T, V)`."""
        decoder = self.model.decoder
        x = decoder.token_embed(ids) + decoder.pos_embed[self.read : self.read + ids.shape[1]]
        self.read += ids.shape[1]
        logits: mx.array = decoder.token_head(decoder.norm(through(decoder.blocks, x, self._decoder, causal=True)))
        return logits


def through(blocks: Sequence[Block], x: mx.array, cache: Cache, *, causal: bool) -> mx.array:
    """Runs tokens through blocks after those in the cache, and adds them to it: `(B, M, D) -> (B, M, D)`.

    Each attends to all in the cache and to all others, or if `causal` to those before it.
    """
    for number, block in enumerate(blocks):
        queries, *own = block.attn.heads(block.norm1(x))
        if (before := cache[number]) is not None:
            own = [mx.concatenate([*both], axis=2) for both in zip(before, own, strict=True)]
        keys, values = cache[number] = own[0], own[1]
        x = project_and_add(block.attn.proj, merge_heads(attention(queries, keys, values, causal=causal)), x)
        x = block.mlp(block.norm2(x), residual=x)
    return x


def generate(
    folder: str | Path,
    images: ImageInput | Iterable[ImageInput],
    *,
    prefix: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Completes images from their first `prefix` patches, and writes captions; None keeps whole images, captions alone.

    `folder` is what `pretrain` wrote. Tokens are the likeliest ones, or drawn at a `temperature` above 0. Patches are
    always the mean of what may follow, which is blurred where much may. Captions are in the tokenizer's lower case.
    Raises FileNotFoundError for a folder without a decoder, and ValueError for a prefix that the images do not have or
    that a run without `--generative` cannot complete.
    """
    model, processor, tokenizer = with_decoder(Path(folder))
    pixels, side = processor(images), model.encoder.config.patch_size
    grid, patches = model.encoder.grid(pixels), patches_of(pixels, side)
    count = patches.shape[1] if prefix is None else prefix
    if not 1 <= count <= patches.shape[1]:
        raise ValueError(f"prefix must be from 1 to the {patches.shape[1]} patches of these images, got {prefix}")
    steps, shown = Steps(model, grid), [patches[:, :count]]
    predicted = steps.patches(shown[0])
    if count < patches.shape[1] and predicted.shape[-1] == patches.shape[-1]:
        raise ValueError(
            f"{folder} predicts patches without mean and contrast: train with --generative, or leave prefix out"
        )
    while steps.seen < patches.shape[1]:
        shown.append(drawable(predicted[:, -1:]))
        predicted = steps.patches(shown[-1])
        mx.eval(predicted)
    written = _written(steps, tokenizer, len(pixels), temperature, mx.random.key(seed))
    drawn = levels_of(pixels_of(mx.concatenate(shown, axis=1), grid, side))
    return Generated(drawn, [tokenizer.decode(ids) for ids in written])


def _written(steps: Steps, tokenizer: Tokenizer, batch: int, temperature: float, key: mx.array) -> list[list[int]]:
    """The ids of B captions, each up to the end of text or as long as the decoder reads."""
    columns = [mx.full((batch, 1), tokenizer.bos, mx.int32)]
    ended = mx.zeros((batch, 1), mx.bool_)
    while len(columns) < tokenizer.context and not ended.all().item():
        logits = steps.tokens(columns[-1])[:, -1:]
        key, own = mx.random.split(key)
        drawn = mx.random.categorical(logits / temperature, key=own) if temperature > 0 else mx.argmax(logits, axis=-1)
        columns.append(mx.where(ended, tokenizer.eos, drawn))
        ended = ended | (columns[-1] == tokenizer.eos)
    ids: Any = mx.concatenate(columns[1:], axis=1).tolist()
    return [row[: row.index(tokenizer.eos)] if tokenizer.eos in row else row for row in ids]


def with_decoder(folder: Path) -> tuple[Pretraining, Aimv2Processor, Tokenizer]:
    """Encoder and decoder of a finished pre-training, its processor and its tokenizer."""
    file = folder / DECODER_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {DECODER_FILE}, so nothing can be generated: wanted a folder from a recent `pretrain`"
        )
    encoder, processor = load(folder, dtype="float32")
    weights, about = read_safetensors(file)
    try:
        config = DecoderConfig(**json.loads(about["config"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} does not say its decoder's sizes: wanted a file that pretrain wrote") from None
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.context = config.max_position_embeddings
    generative = weights["patch_head.bias"].size > 3 * encoder.vision.config.patch_size**2
    model = Pretraining(encoder.vision.config, config, eos=tokenizer.eos, generative=generative)
    model.encoder = encoder.vision
    model.decoder.load_weights(list(weights.items()))
    model.eval()
    return model, processor, tokenizer
