"""Chooses the images and texts that calibrate a conversion, and the images that judge it: never the same ones.

By default crops of three bundled photographs calibrate, and the fourth judges along with bundled emoji. In a folder
every fifth image judges. Texts are random tokens, which worked better than names: they leave no token out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_aimv2 import bundled
from mlx_aimv2.config import Aimv2TextConfig
from mlx_aimv2.conversion.fidelity import choose_images, spread
from mlx_aimv2.conversion.gptq import Calibration
from mlx_aimv2.images import ImageInput
from mlx_aimv2.loading import Source, at_size
from mlx_aimv2.model import Aimv2Model
from mlx_aimv2.quantize import Predicate
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.train.augment import Augmentation

MAX_IMAGES, BATCH = 128, 8
"""Images for calibration, and how many of them pass through a layer at once."""

EMOJI = 19
"""Emoji among the judges: with the photograph twenty images, enough to ask for the ten nearest."""

TEXTS, TEXT_LENGTHS = 128, (4, 6, 8, 12, 16, 20)
"""Texts of each length, in tokens."""

MIN_AREA = 0.08
"""Side of a crop, as a share of its photograph."""

EMBEDDING_BITS = 6
"""Minimum for the token embedding: at 4 it cost half as much again as all blocks at 4 (docs/converting.md)."""


def split(folder: str | os.PathLike[str] | None, *, calibrates: bool) -> tuple[list[Path], list[Path]]:
    """The images that calibrate and those that judge; without a folder the first list is empty, and crops are used.

    Raises FileNotFoundError for a folder without images, ValueError for one with a single image.
    """
    if folder is None:
        return [], [bundled.photographs()[-1], *spread(list(bundled.emoji_images()), EMOJI)]
    files = choose_images(folder, limit=None)
    if len(files) == 1 and calibrates:
        raise ValueError(f"{folder} has one image; calibration takes at least two, one of which judges the result")
    judges = files[:: min(5, len(files))]
    return spread([file for file in files if file not in set(judges)], MAX_IMAGES), spread(judges)


def with_finer_embedding(settings: Mapping[str, Any]) -> Predicate:
    """A predicate that gives LiT's token embedding, which cannot be calibrated, at least `EMBEDDING_BITS`."""
    bits = max(settings["bits"], EMBEDDING_BITS)
    return lambda path, layer: {"bits": bits} if isinstance(layer, nn.Embedding) else True


def calibrate(
    source: Source,
    files: Sequence[Path],
    quantization: Mapping[str, Any],
    *,
    dtype: mx.Dtype,
    on_progress: Callable[[int, int, str], None],
) -> dict[str, list[mx.array]]:
    """The layers of all blocks packed with calibration: `-> {path: packed integers, scales, biases}`.

    `files` are the images, none for crops of the bundled ones; `quantization` is the section of config.json, `dtype`
    that of the scales. Consumes the source's weights.
    """
    loaded = source.load(dtype="float32", lazy=True)
    model = loaded.model
    encoder, processor = at_size(model.vision, loaded.processor, None)
    images: Sequence[ImageInput] = files or crops(processor.canvas)
    states = [encoder.embed(processor(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    text = model.text_model if isinstance(model, Aimv2Model) else None
    total = len(encoder.blocks) + (len(text.blocks) if text else 0)
    done = itertools.count()

    def on_block() -> None:
        on_progress(next(done), total, "blocks quantized")

    on_block()
    run = Calibration(states, quantization, dtype, on_block)
    parts = run(encoder.blocks, "vision_model." if text else "")
    if text:
        states = [text.embed(ids) for ids in random_texts(text.config, loaded.processor.tokenizer)]
        parts |= Calibration(states, quantization, dtype, on_block)(text.blocks, "text_model.", causal=True)
    return parts


def crops(size: tuple[int, int]) -> list[Image.Image]:
    """`MAX_IMAGES` random crops of three bundled photographs, always the same, of `size` (height, width)."""
    crop, rng = Augmentation(min_area=MIN_AREA), np.random.default_rng(0)
    photographs = [Image.open(file).convert("RGB") for file in bundled.photographs()[:-1]]
    return [crop(photographs[i % len(photographs)], size, rng) for i in range(MAX_IMAGES)]


def random_texts(config: Aimv2TextConfig, tokenizer: Tokenizer | None) -> list[mx.array]:
    """Random tokens between start and end tokens, texts of several lengths: `[(T, L), …]`."""
    rng, longest = np.random.default_rng(0), config.max_position_embeddings
    texts = []
    for length in (length for length in TEXT_LENGTHS if length <= longest):
        ids = rng.integers(0, config.vocab_size, (TEXTS, length))
        ids[:, 0] = tokenizer.bos if tokenizer is not None else ids[:, 0]
        ids[:, -1] = config.eos_token_id
        texts.append(mx.array(ids))
    return texts
