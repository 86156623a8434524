"""Starts a run from an earlier one, at a higher resolution for example: encoder, decoder and tokenizer go on.

The paper continues so at 336 and 448 pixels, with weight decay 0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_aimv2.loading import load, resample_positions
from mlx_aimv2.pretrain import state
from mlx_aimv2.pretrain.objective import Pretraining
from mlx_aimv2.tokenizer import Tokenizer


def tokenizer_of(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer beside the earlier run's encoder, None for an encoder that came without (Apple's)."""
    return Tokenizer.from_folder(checkpoint) if (checkpoint / "tokenizer.json").is_file() else None


def start_from(model: Pretraining, checkpoint: str | Path) -> bool:
    """Fills the model from an earlier run's checkpoint; returns whether there was a decoder, in CHECKPOINT.training.

    Position tables are resampled to the new number of patches. Raises ValueError for an encoder of other sizes.
    """
    earlier, _ = load(checkpoint, dtype="float32")
    weights = {f"encoder.{name}": array for name, array in _flat(earlier.vision) if not name.startswith("head.")}
    decoder = state.model_weights(state.place_of(Path(checkpoint)), prefix="decoder.")
    weights |= decoder
    table = "encoder.pos_embed"
    if table in weights and (patches := model.encoder.config.num_patches) is not None:
        old, new = math.isqrt(weights[table].shape[0]), math.isqrt(patches)
        weights[table] = resample_positions(weights[table], (old, old), (new, new))
    shapes = {name: array.shape for name, array in _flat(model)}
    for name, array in weights.items():
        if shapes.get(name) != array.shape:
            raise ValueError(f"{checkpoint}: {name} is {array.shape}, this run's is {shapes.get(name)}; give its sizes")
    model.load_weights(list(weights.items()), strict=False)
    return bool(decoder)


def _flat(model: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(model.parameters())
    return flat
