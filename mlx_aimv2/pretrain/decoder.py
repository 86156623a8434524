"""The multimodal decoder: image features, then the caption, causal throughout; it predicts the next patch or token.

Apple released no decoder. This one follows section 3 of arXiv 2411.14402: the encoder's blocks (SwiGLU, RMSNorm), the
features projected linearly to its width, two linear heads on its last state. The paper does not say how the caption's
positions are coded: here by a learned table, as in LiT's text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2 import layers
from mlx_aimv2.config import Aimv2TextConfig
from mlx_aimv2.model import run_blocks


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; the defaults are the paper's, the same for encoders of all sizes."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        Aimv2TextConfig(**vars(self), eos_token_id=0)  # the same bounds as any transformer of this package


class Decoder(nn.Module):
    """Features of patches and a caption's ids to predictions: `(B, I, D), (B, T) -> (B, I - 1, P), (B, T, V)`.

    P is the number of values in a patch, V the size of the vocabulary. Output i of the first predicts patch i + 1,
    output t of the second token t + 1.
    """

    def __init__(self, config: DecoderConfig, *, feature_size: int, patch_values: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.from_features = nn.Linear(feature_size, width, bias=False)
        self.token_embed = nn.Embedding(config.vocab_size, width)
        self.pos_embed = mx.zeros((config.max_position_embeddings, width))
        sizes = (width, config.intermediate_size, config.num_attention_heads, config.rms_norm_eps)
        self.blocks = [layers.Block(*sizes) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.patch_head = nn.Linear(width, patch_values)
        self.token_head = nn.Linear(width, config.vocab_size)

    def __call__(self, features: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        patches = features.shape[1]
        text = self.token_embed(ids) + self.pos_embed[: ids.shape[1]]
        x = mx.concatenate([self.from_features(features), text.astype(features.dtype)], axis=1)  # (B, I + T, width)
        *_, x = run_blocks(self.blocks, x, causal=True)
        x = self.norm(x)
        return self.patch_head(x[:, : patches - 1]), self.token_head(x[:, patches:])
