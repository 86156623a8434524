"""Pools the tokens of one pass through the encoder into an image's embedding.

pixels (B, H, W, 3) -> (B, D) for `mean` and `head`, (B, N, D) for `tokens`, (B, h, w, D) for `map`

AIMv2 has no CLS token. Without `layer` the last hidden state after the final norm is taken. With `layer` it is the
hidden state of that number as transformers counts them (0 is the patch embedding, -1 what the last block gives), as it
is: no norm, unless `norm` asks for the model's final one. So `layer=-1, norm=True` is the same as no layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

POOLS = {"mean": 1, "head": 1, "tokens": 2, "map": 3}
"""Name of a pooling -> axes of the result for one image.

`mean` is the mean over the tokens, (D,); `head` the checkpoint's own attention head, in LiT projected to the space it
shares with text, (E,); `tokens` every token, (N, D); `map` every token at its place, (rows, columns, D).
"""


@dataclass(frozen=True)
class Pooling:
    """How tokens become an embedding; `of` makes one that the model supports."""

    pool: str
    layer: int | None = None
    norm: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        pool: str | None = None,
        *,
        layer: int | None = None,
        norm: bool = False,
    ) -> Pooling:
        """Checks the settings against the model; without `pool` its head where it has one, else the mean."""
        config = model.vision.config
        if pool is None:
            pool = "head" if config.use_head and layer is None else "mean"
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool}")
        if pool == "head" and not config.use_head:
            raise ValueError("this checkpoint has no pooling head: use mean, tokens or map (only LiT has a head)")
        if pool == "head" and layer is not None:
            raise ValueError("the pooling head reads the last layer: use mean, tokens or map with a layer")
        if layer is None and norm:
            raise ValueError("norm goes with a layer: without one the final norm is applied already")
        states = config.num_hidden_layers + 1
        if layer is not None and not -states <= layer < states:
            raise ValueError(f"this checkpoint has hidden states {-states} to {states - 1}, got layer {layer}")
        return cls(pool, layer, norm)

    @property
    def axes(self) -> int:
        """1 for one vector an image, 2 for tokens, 3 for a map."""
        return POOLS[self.pool]

    def width(self, model: nn.Module) -> int:
        """D or E, the length of each vector."""
        hidden = model.vision.config.hidden_size
        return int(getattr(model.config, "projection_dim", hidden)) if self.pool == "head" else hidden

    def __call__(self, model: nn.Module, pixels: mx.array) -> mx.array:
        """Embeddings of a batch in float32, lazily: `(B, H, W, 3) -> (B, …)` as the pooling says."""
        vision = model.vision
        if self.pool == "head":
            pooled = None if hasattr(model.config, "projection_dim") else vision(pixels).pooler_output
            return (model.encode_image(pixels) if pooled is None else pooled).astype(mx.float32)
        if self.layer is None:
            tokens = vision(pixels).last_hidden_state
        else:  # lazy: the blocks after the layer are never computed
            tokens = vision(pixels, output_hidden_states=True).hidden_states[self.layer]
            tokens = vision.norm(tokens) if self.norm else tokens
        tokens = tokens.astype(mx.float32)
        if self.pool == "mean":
            return tokens.mean(axis=1)
        if self.pool == "map":
            return tokens.reshape(len(tokens), *vision.grid(pixels), -1)
        return tokens
