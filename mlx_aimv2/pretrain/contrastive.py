"""The contrastive loss of CLIP and LiT: softmax over the batch in both directions, with a learned scale."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_aimv2.model import Aimv2Model, unit_length


def embed_features(model: Aimv2Model, features: mx.array) -> mx.array:
    """The trainable end of the image side: the trunk's features `(B, N, D) -> (B, E)` of unit length, float32."""
    return unit_length(model.visual_projection(model.vision_model.head(features)))


def embed_texts(model: Aimv2Model, ids: mx.array) -> mx.array:
    """The text side: `(B, L) -> (B, E)` of unit length, float32."""
    return unit_length(model.text_projection(model.text_model(ids).pooler_output))


def contrastive_loss(logits: mx.array, same: mx.array) -> mx.array:
    """Cross-entropy of each image among texts and of each text among images, their mean: `(B, B), (B, B) -> ()`.

    `same` is true where two examples have the same caption: such a pair is neither wrong nor counted.
    """
    own = mx.eye(logits.shape[0], dtype=mx.bool_)
    logits = mx.where(same & ~own, -math.inf, logits)
    diagonal = mx.diagonal(logits)
    per_image = mx.logsumexp(logits, axis=1) - diagonal
    per_text = mx.logsumexp(logits, axis=0) - diagonal
    return 0.5 * (per_image.mean() + per_text.mean())


def over_all_ranks(x: mx.array, group: mx.distributed.Group | None) -> mx.array:
    """Rows of every rank, in the order of the ranks: `(B, …) -> (ranks * B, …)`."""
    return x if group is None else mx.distributed.all_gather(x, group=group)


def averaged_gradients(gradient: dict[str, object], group: mx.distributed.Group | None) -> dict[str, object]:
    """Gradients of the global loss.

    Each rank has differentiated the whole loss by its own rows alone, so the ranks' shares are summed; the scale,
    which every rank has differentiated in full, is averaged.
    """
    if group is None:
        return gradient
    scale = gradient.pop("logit_scale")
    mean = nn.average_gradients({"rest": gradient, "logit_scale": scale}, group=group)
    total = tree_map(lambda x: x * group.size(), mean["rest"])
    return total | {"logit_scale": mean["logit_scale"]}


def same_captions(keys: list[int]) -> mx.array:
    """Which pairs of examples have the same key: `(B,) -> (B, B)` boolean."""
    numbers = np.array(keys)
    return mx.array(numbers[:, None] == numbers[None])
