"""The objective of pre-training on one page (arXiv 2411.14402, section 3): prefix attention, decoder, losses.

    pixels -> encoder, the first M patches seen by all -> features  \
                                                  caption -> tokens  > decoder, causal -> next patch, next token -> loss

Apple released no decoder. This one follows the paper: the encoder's blocks (SwiGLU, RMSNorm), the features projected
linearly to its width, two linear heads on its last state. The paper does not say how the caption's positions are
coded: here by a learned table, as in LiT's text encoder.

Native encoders: the paper draws 2 ** n patches with n between 7 and 12, from a standard normal distribution cut to
-1 … 1 and stretched to that, and resizes images to that area in their own shape; the larger, the fewer in a batch. Here
a batch has one shape, drawn with the number, and crops of that shape: so nothing is distorted and nothing is padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_aimv2 import layers
from mlx_aimv2.backend import by_images, cross_entropy, run_blocks
from mlx_aimv2.config import Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.train.augment import ASPECT

ALPHA = 0.4
"""Weight of the image loss beside the text loss (arXiv 2411.14402, section 3.1)."""

EPS = 1e-6
"""Added to a patch's variance (He et al. 2021, arXiv 2111.06377, their code)."""


Grid: TypeAlias = tuple[int, int]
"""Rows and columns of patches."""

PATCHES = (1 << 7, 1 << 12)
"""The fewest and the most patches of an image."""


def grid_of(vision: Aimv2VisionConfig, rng: np.random.Generator | None, *, patches: tuple[int, int] = PATCHES) -> Grid:
    """The grid of a batch: that of the fixed size, or drawn between the fewest and the most patches.

    Without `rng`, for validation, a square in the middle of what is drawn.
    """
    if vision.image_size is not None:
        return (vision.image_size // vision.patch_size,) * 2
    if rng is None:
        return (max(2, round((patches[0] * patches[1]) ** 0.25)),) * 2
    low, high = (math.log2(number) for number in patches)
    z = math.inf
    while not -1 <= z <= 1:
        z = rng.normal()
    area = 2 ** (low + (high - low) * (z + 1) / 2)
    aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    rows = max(1, round(math.sqrt(area / aspect)))
    return rows, max(2, min(round(area / rows), patches[1] // rows))


def images_of(vision: Aimv2VisionConfig, grid: Grid, size: int, *, patches: tuple[int, int] = PATCHES) -> int:
    """The images of a batch of this grid: `size`, native as many as have the patches of `size` images in the middle."""
    if vision.image_size is not None:
        return size
    return max(1, round(size * math.sqrt(patches[0] * patches[1]) / math.prod(grid)))


def draw_lengths(count: int, patches: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int32]]:
    """A prefix length for each image, uniform in 1 … I - 1: `(B,)`. Raises ValueError for images of one patch."""
    if patches < 2:
        raise ValueError(f"pre-training predicts patches from patches: an image needs at least two, got {patches}")
    return rng.integers(1, patches, count, dtype=np.int32)


def prefix_mask(lengths: mx.array, patches: int) -> mx.array:
    """Which patch attends to which: prefix lengths `(B,) -> (B, I, I)` boolean, rows attend to columns."""
    position = mx.arange(patches)
    in_prefix = position[None, None, :] < lengths[:, None, None]  # (B, 1, I)
    before = position[None, :] <= position[:, None]  # (I, I)
    return in_prefix | before[None]


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

    P is the number of values that are predicted of a patch, V the size of the vocabulary. Output i of the first
    predicts patch i + 1, output t of the second token t + 1.
    """

    def __init__(self, config: DecoderConfig, *, feature_size: int, patch_values: int) -> None:
        super().__init__()
        self.config = config
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


def mean_and_deviation(patches: mx.array) -> tuple[mx.array, mx.array]:
    """Of each patch over its values, in float32: `(B, I, P) -> two (B, I, 1)`; the variance's divisor is P - 1.

    That is torch's `var` in He et al.'s code.
    """
    x = patches.astype(mx.float32)
    return x.mean(axis=-1, keepdims=True), mx.sqrt(x.var(axis=-1, keepdims=True, ddof=1) + EPS)


def normalised(patches: mx.array) -> mx.array:
    """Each patch with mean 0 and variance 1 over its values, in float32: `(B, I, P) -> (B, I, P)`."""
    mean, deviation = mean_and_deviation(patches)
    return (patches.astype(mx.float32) - mean) / deviation


def drawable(predicted: mx.array) -> mx.array:
    """Predictions of normalised patches, their means and deviations as pixels: `(B, I, P + 2) -> (B, I, P)`."""
    return predicted[..., :-2] * mx.maximum(predicted[..., -1:], 0) + predicted[..., -2:-1]


def image_loss(predicted: mx.array, patches: mx.array, lengths: mx.array) -> mx.array:
    """Mean squared error over the patches after each prefix: `(B, I - 1, P), (B, I, P), (B,) -> (B,)`.

    With P + 2 predictions the last two are compared with the patch's mean and deviation, which the target has lost,
    and their squared errors are added.
    """
    target = normalised(patches[:, 1:])
    values = patches.shape[-1]
    x = predicted.astype(mx.float32)
    error = mx.square(x[..., :values] - target).mean(axis=-1)  # (B, I - 1)
    if x.shape[-1] > values:
        lost = mx.concatenate([*mean_and_deviation(patches[:, 1:])], axis=-1)
        error = error + mx.square(x[..., values:] - lost).sum(axis=-1)
    counts = mx.arange(1, patches.shape[1])[None] >= lengths[:, None]
    return (error * counts).sum(axis=1) / counts.sum(axis=1)


def text_loss(logits: mx.array, targets: mx.array, counts: mx.array) -> mx.array:
    """Cross-entropy per caption, the mean over its tokens: `(B, T, V), (B, T), (B, T) boolean -> (B,)`.

    `counts` leaves out the filling after the end of text.
    """
    each = cross_entropy(logits.astype(mx.float32), targets)
    return (each * counts).sum(axis=1) / mx.maximum(counts.sum(axis=1), 1)


def is_counted(targets: mx.array, eos: int) -> mx.array:
    """Tokens up to and with the first end of text: `(B, T) -> (B, T)` boolean."""
    ends = (targets == eos).astype(mx.int32)
    return mx.cumsum(ends, axis=1) - ends == 0


class Batch(NamedTuple):
    """What a step sees: pixels (B, H, W, 3) float32, ids (B, T + 1) with BOS and EOS, prefix lengths (B,)."""

    pixels: mx.array
    ids: mx.array
    lengths: mx.array


class Pretraining(nn.Module):
    """The encoder with prefix attention and the decoder over its features.

    A `generative` one predicts the mean and deviation of each patch too.
    """

    def __init__(
        self, vision: Aimv2VisionConfig, decoder: DecoderConfig, *, eos: int, generative: bool = False
    ) -> None:
        super().__init__()
        self.eos = eos
        self.encoder = Aimv2VisionModel(vision)
        patch_values = vision.num_channels * vision.patch_size**2 + 2 * generative
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
        image = image_loss(patches, layers.patches_of(batch.pixels, self.encoder.config.patch_size), batch.lengths)
        text = text_loss(tokens, targets, is_counted(targets, self.eos))
        return image, text

    def losses(self, batch: Batch, alpha: float = ALPHA) -> dict[str, mx.array]:
        """`loss = text_loss + alpha * image_loss`, and both alone, each the mean over the examples.

        Means of means, so that accumulated steps and several ranks of equal batches give what one large batch gives.
        """
        image, text = (x.mean() for x in by_images(lambda *own: self(Batch(*own)), *batch))
        return {"loss": text + alpha * image, "image_loss": image, "text_loss": text}


def initialise(model: nn.Module, depth: int, *, seed: int) -> None:
    """Random weights, the same for the same seed: normal with deviation `fan_in ** -0.5`, norms at one, biases at zero.

    What a block writes into the residual is smaller by `(2 depth) ** -0.5`; tables have deviation 0.02.
    """
    rng = np.random.default_rng(seed)
    writes = ("attn.proj.weight", "mlp.down.weight")
    tables = ("pos_embed", "token_embed.weight", "cls_token")

    def start(name: str, weight: mx.array) -> mx.array:
        if weight.ndim < 2:
            return weight if not name.endswith(".bias") else mx.zeros(weight.shape)
        spread = 0.02 if name.endswith(tables) else math.prod(weight.shape[1:]) ** -0.5
        if name.endswith(writes):
            spread *= (2 * depth) ** -0.5
        return mx.array(rng.normal(0, spread, weight.shape).astype(np.float32))

    parameters: Any = tree_flatten(model.parameters())
    model.load_weights([(name, start(name, weight)) for name, weight in parameters])
