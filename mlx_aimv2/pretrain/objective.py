"""Encoder, decoder and losses together: what a pre-training step minimises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain import losses
from mlx_aimv2.pretrain.decoder import Decoder, DecoderConfig
from mlx_aimv2.pretrain.prefix import prefix_mask
from mlx_aimv2.x86_training import by_images


@dataclass(frozen=True)
class Batch:
    """What a step sees: pixels (B, H, W, 3) float32, ids (B, T + 1) with BOS and EOS, prefix lengths (B,)."""

    pixels: mx.array
    ids: mx.array
    lengths: mx.array


class Pretraining(nn.Module):
    """The encoder with prefix attention and the decoder over its features."""

    def __init__(self, vision: Aimv2VisionConfig, decoder: DecoderConfig, *, eos: int) -> None:
        super().__init__()
        self.eos = eos
        self.encoder = Aimv2VisionModel(vision)
        patch_values = vision.num_channels * vision.patch_size**2
        self.decoder = Decoder(decoder, feature_size=vision.hidden_size, patch_values=patch_values)

    def predict(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """Next patches and next tokens: `Batch -> (B, I - 1, P), (B, T, V)`."""
        rows, columns = self.encoder.grid(batch.pixels)
        mask = prefix_mask(batch.lengths, rows * columns)
        features = self.encoder(batch.pixels, mask=mask).last_hidden_state
        return self.decoder(features, batch.ids[:, :-1])

    def __call__(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """Image loss and text loss of each example: `Batch -> (B,), (B,)`."""
        patches, tokens = self.predict(batch)
        targets = batch.ids[:, 1:]
        image = losses.image_loss(
            patches, losses.patches_of(batch.pixels, self.encoder.config.patch_size), batch.lengths
        )
        text = losses.text_loss(tokens, targets, losses.is_counted(targets, self.eos))
        return image, text

    def loss(self, batch: Batch, alpha: float = losses.ALPHA) -> tuple[mx.array, mx.array, mx.array]:
        """`L_text + alpha * L_image`, then both alone, each the mean over the examples.

        Means of means, so that accumulated steps and several ranks of equal batches give what one large batch gives.
        """

        def each(pixels: mx.array, ids: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
            return self(Batch(pixels, ids, lengths))

        image, text = (x.mean() for x in by_images(each, batch.pixels, batch.ids, batch.lengths))
        return text + alpha * image, image, text


def initialise(model: nn.Module, depth: int, *, seed: int) -> None:
    """Random weights, the same for the same seed: normal with deviation `fan_in ** -0.5`, norms at one, biases at zero.

    What a block writes into the residual is smaller by `(2 depth) ** -0.5`; tables have deviation 0.02.
    """
    chance = np.random.default_rng(seed)
    writes = ("attn.proj.weight", "mlp.down.weight")
    tables = ("pos_embed", "token_embed.weight", "cls_token")

    def start(name: str, weight: mx.array) -> mx.array:
        if weight.ndim < 2:
            return weight if not name.endswith(".bias") else mx.zeros(weight.shape)
        spread = 0.02 if name.endswith(tables) else math.prod(weight.shape[1:]) ** -0.5
        if name.endswith(writes):
            spread *= (2 * depth) ** -0.5
        return mx.array(chance.normal(0, spread, weight.shape).astype(np.float32))

    parameters: Any = tree_flatten(model.parameters())
    model.load_weights([(name, start(name, weight)) for name, weight in parameters])
