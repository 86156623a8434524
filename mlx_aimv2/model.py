"""The models: the vision encoder, LiT's text encoder, the LiT model that joins them, and what they return.

Read from top to bottom like the paper (arXiv 2411.14402): patches, blocks, final norm, pooling, shared space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2 import layers
from mlx_aimv2.backend import run_blocks
from mlx_aimv2.backend.device import any_thread
from mlx_aimv2.config import LIT_CHECKPOINT, Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.habits import AnswersHabits

if TYPE_CHECKING:
    from mlx_aimv2.checkpoint.read import Checkpoint


@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder returns.

    `last_hidden_state` (B, N, D) after the final norm; `pooler_output` (B, D), None for vision models without a pooling
    head; `hidden_states`, if asked for, depth + 1 arrays (B, N, D) before the final norm, the embedding first.
    """

    last_hidden_state: mx.array
    pooler_output: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None


@dataclass(frozen=True)
class Aimv2Output:
    """What the LiT model returns for B images and T texts.

    `logits_per_image` (B, T) and `logits_per_text` (T, B) in float32; `image_embeds` (B, E) and `text_embeds` (T, E) of
    unit length in float32; the outputs of both encoders.
    """

    logits_per_image: mx.array
    logits_per_text: mx.array
    image_embeds: mx.array
    text_embeds: mx.array
    vision_model_output: EncoderOutput
    text_model_output: EncoderOutput


class Aimv2VisionModel(AnswersHabits, nn.Module):
    """The vision encoder: images to one vector per patch, `(B, H, W, 3) -> (B, N, D)`."""

    origin: Checkpoint | None = None
    """The checkpoint that the weights were loaded from, without its tensors; None for a new model."""

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = layers.PatchEmbed(
            config.num_channels, config.hidden_size, config.patch_size, config.rms_norm_eps
        )
        if config.num_patches is not None:
            self.pos_embed = mx.zeros((config.num_patches, config.hidden_size))
        self.blocks = _blocks(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.use_head:
            self.head = layers.AttentionPoolingHead(config.hidden_size, config.num_attention_heads)

    @property
    def vision(self) -> Aimv2VisionModel:
        """The vision encoder itself, under the same name as in the LiT model."""
        return self

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the weights and of the features; quantized layers compute in it too."""
        dtype: mx.Dtype = self.patch_embed.proj.weight.dtype
        return dtype

    @any_thread
    def __call__(
        self,
        pixels: mx.array,
        *,
        patch_mask: mx.array | None = None,
        output_hidden_states: bool = False,
        mask: mx.array | None = None,
    ) -> EncoderOutput:
        """Features of images, `(B, H, W, 3) -> EncoderOutput`.

        `pixels` come from the processor: normalised RGB, channels last. `patch_mask` (B, N) of bool is true for hidden
        patches, the same number in each image: they are dropped before the first block, the others keep their
        positions and order. With a boolean `mask` (B, N, N) a patch attends where its row is true (prefix attention,
        in pre-training); without it, to all. Raises ValueError for an image whose size differs from a fixed
        checkpoint's, for one smaller than a patch, and for a patch_mask of the wrong shape or with unequal counts.
        """
        embedded = self.embed(pixels, patch_mask=patch_mask)
        states = [embedded]
        for x in run_blocks(self.blocks, embedded, mask=mask):
            if output_hidden_states:
                states.append(x)
        x = self.norm(x)
        pooled = self.head(x) if self.config.use_head else None
        return EncoderOutput(x, pooled, tuple(states) if output_hidden_states else None)

    def embed(self, pixels: mx.array, *, patch_mask: mx.array | None = None) -> mx.array:
        """Patches with their positions, the input of the first block: `(B, H, W, 3) -> (B, N, D)`.

        With `patch_mask` (B, N) only the visible patches, in order.
        """
        pixels = pixels if isinstance(pixels, mx.array) else mx.array(pixels)  # NumPy arrays are welcome too
        rows, columns = self.grid(pixels)
        visible = None if patch_mask is None else visible_patches(patch_mask, (pixels.shape[0], rows * columns))
        x = self.patch_embed(pixels.astype(self.dtype))
        if self.config.num_patches is not None:
            x = x + self.pos_embed
        else:
            x = x + mx.array(layers.sincos_positions(rows, columns, self.config.hidden_size), x.dtype)
        return x if visible is None else mx.take_along_axis(x, visible[..., None], axis=1)

    def grid(self, pixels: mx.array) -> tuple[int, int]:
        """Rows and columns of patches in `pixels`, after checking that this checkpoint takes images of that size."""
        config = self.config
        if pixels.ndim != 4 or pixels.shape[3] != config.num_channels:
            raise ValueError(
                f"pixels must be (images, height, width, {config.num_channels}), got {tuple(pixels.shape)}; "
                "the processor makes them so"
            )
        if not mx.issubdtype(pixels.dtype, mx.floating):
            raise ValueError(
                f"pixels must be scaled and normalised numbers, got {str(pixels.dtype).rpartition('.')[2]}: "
                "pass the images through the processor first"
            )
        height, width = pixels.shape[1:3]
        if config.image_size is not None and (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"this checkpoint takes images of {config.image_size} x {config.image_size} pixels, "
                f"got {height} x {width}; resize them with its processor or use a native checkpoint"
            )
        rows, columns = height // config.patch_size, width // config.patch_size
        if rows == 0 or columns == 0:
            raise ValueError(
                f"an image of {height} x {width} pixels (height x width) is smaller than one patch "
                f"of {config.patch_size} x {config.patch_size}"
            )
        return rows, columns

    @any_thread
    def encode_image(
        self, pixels: mx.array, *, patch_mask: mx.array | None = None, normalize: bool = False
    ) -> mx.array:
        """One vector per image, the mean over its tokens: `(B, H, W, 3) -> (B, D)`; `normalize` for unit length.

        With `patch_mask` (B, N) the mean over the visible patches.
        """
        tokens = self(pixels, patch_mask=patch_mask).last_hidden_state
        mean = tokens.astype(mx.float32).mean(axis=1)  # float32: hundreds of halves would lose digits
        return (unit_length(mean) if normalize else mean).astype(tokens.dtype)

    def encode_text(self, ids: mx.array, *, normalize: bool = False) -> mx.array:
        """Always raises ValueError: this checkpoint has no text encoder; the message names the one that does."""
        raise ValueError(f"this checkpoint has no text encoder; use {LIT_CHECKPOINT}")


class Aimv2TextModel(AnswersHabits, nn.Module):
    """The text encoder of LiT: token ids to one vector per token and one per text, always causal."""

    def __init__(self, config: Aimv2TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = layers.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embed = mx.zeros((config.max_position_embeddings, config.hidden_size))
        self.blocks = _blocks(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    @any_thread
    def __call__(self, ids: mx.array, *, output_hidden_states: bool = False) -> EncoderOutput:
        """Features of texts, `(B, L) -> EncoderOutput`; `pooler_output` is the token at each row's first EOS.

        Raises ValueError for ids beyond the vocabulary, rows longer than the context and rows without EOS.
        """
        self.check(ids)
        return self.unchecked(ids, output_hidden_states=output_hidden_states)

    def unchecked(self, ids: mx.array, *, output_hidden_states: bool = False, run: Any = run_blocks) -> EncoderOutput:
        """The same without checking the ids, for compiled functions; `run` runs the blocks."""
        embedded = self.embed(ids)
        states = [embedded]
        for x in run(self.blocks, embedded, causal=True):  # so padding after EOS changes nothing
            if output_hidden_states:
                states.append(x)
        x = self.norm(x)
        pooled = x[mx.arange(ids.shape[0]), mx.argmax(ids == self.config.eos_token_id, axis=1)]  # the first EOS
        return EncoderOutput(x, pooled, tuple(states) if output_hidden_states else None)

    def embed(self, ids: mx.array) -> mx.array:
        """Tokens with their positions, the input of the first block: `(B, L) -> (B, L, D)`."""
        embedded: mx.array = self.token_embed(ids) + self.pos_embed[: ids.shape[1]]
        return embedded

    def check(self, ids: mx.array) -> None:
        """Raises ValueError for ids `(B, L)` that `__call__` refuses."""
        config = self.config
        if not isinstance(ids, mx.array):
            raise ValueError(f"ids must be an mlx array, as processor.tokenize returns it, got {type(ids).__name__}")
        if ids.ndim != 2 or 0 in ids.shape or not mx.issubdtype(ids.dtype, mx.integer):
            raise ValueError(f"ids must be whole numbers (texts, length), got {ids.dtype} {tuple(ids.shape)}")
        if ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"this checkpoint reads at most {config.max_position_embeddings} tokens per text, got {ids.shape[1]}; "
                "processor.tokenize cuts texts to that length"
            )
        lowest, highest = (int(value.item()) for value in (ids.min(), ids.max()))  # type: ignore[arg-type]
        if lowest < 0 or highest >= config.vocab_size:
            outside = lowest if lowest < 0 else highest
            raise ValueError(
                f"token id {outside} is outside the vocabulary of {config.vocab_size:,}; is this its own tokenizer?"
            )
        if not (ids == config.eos_token_id).any(axis=1).all().item():
            raise ValueError(f"a row of ids has no EOS (id {config.eos_token_id}); processor.tokenize adds it")


class Aimv2Model(AnswersHabits, nn.Module):
    """LiT: the vision encoder with its pooling head and the text encoder, projected into one space of width E."""

    origin: Checkpoint | None = None
    """The checkpoint that the weights were loaded from, without its tensors; None for a new model."""

    def __init__(self, config: Aimv2Config) -> None:
        super().__init__()
        self.config = config
        self.vision_model = Aimv2VisionModel(config.vision_config)
        self.text_model = Aimv2TextModel(config.text_config)
        self.visual_projection = layers.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = layers.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = mx.array(math.log(1 / 0.07))

    @property
    def vision(self) -> Aimv2VisionModel:
        """The vision encoder."""
        return self.vision_model

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the weights and so of the features."""
        return self.vision_model.dtype

    @any_thread
    def __call__(
        self, pixels: mx.array, ids: mx.array | None = None, *, patch_mask: mx.array | None = None
    ) -> Aimv2Output:
        """How well each image fits each text: `(B, H, W, 3), (T, L) -> Aimv2Output`.

        `patch_mask` (B, N) hides patches as in `Aimv2VisionModel`. Raises TypeError without ids, naming the calls for
        images alone.
        """
        if ids is None:
            raise TypeError(
                "the LiT model compares images with texts: model(pixels, ids) with ids = processor.tokenize(texts); "
                "for images alone, model.vision(pixels) gives the tokens and model.encode_image(pixels) one vector"
            )
        vision, text = self.vision_model(pixels, patch_mask=patch_mask), self.text_model(ids)
        image_embeds = unit_length(self.visual_projection(_pooled(vision)))
        text_embeds = unit_length(self.text_projection(_pooled(text)))
        logits = self.logits(image_embeds, text_embeds)
        return Aimv2Output(logits, logits.T, image_embeds, text_embeds, vision, text)

    def logits(self, image_embeds: mx.array, text_embeds: mx.array) -> mx.array:
        """Scaled cosines of unit vectors, `(B, E), (T, E) -> (B, T)`, in float32.

        The scale is `exp(logit_scale)` clamped between 1 and `max_logit_scale`; the trained value exceeds it, so the
        limit applies.
        """
        limit = math.log(self.config.max_logit_scale)
        scale = mx.exp(mx.clip(self.logit_scale.astype(mx.float32), 0.0, limit))
        return scale * (image_embeds.astype(mx.float32) @ text_embeds.astype(mx.float32).T)

    @any_thread
    def encode_image(
        self, pixels: mx.array, *, patch_mask: mx.array | None = None, normalize: bool = False
    ) -> mx.array:
        """One vector per image in the shared space: `(B, H, W, 3) -> (B, E)`; `normalize` for unit length.

        With `patch_mask` (B, N) from the visible patches.
        """
        vision = self.vision_model(pixels, patch_mask=patch_mask)
        return self._features(self.visual_projection(_pooled(vision)), normalize)

    @any_thread
    def encode_text(self, ids: mx.array, *, normalize: bool = False) -> mx.array:
        """One vector per text in the shared space: `(T, L) -> (T, E)`; `normalize` for unit length."""
        return self._features(self.text_projection(_pooled(self.text_model(ids))), normalize)

    @staticmethod
    def _features(projected: mx.array, normalize: bool) -> mx.array:
        return unit_length(projected).astype(projected.dtype) if normalize else projected


def visible_patches(patch_mask: mx.array, shape: tuple[int, int]) -> mx.array:
    """The indices of the visible patches, in order: `(B, N) bool -> (B, M)`.

    `shape` is the (B, N) that the mask must have. Raises ValueError for another shape, for numbers instead of bool, for
    images with different numbers of hidden patches, and where no patch is visible.
    """
    if not isinstance(patch_mask, (mx.array, np.ndarray)):
        raise ValueError(f"patch_mask must be an array of bool (B, N), got {type(patch_mask).__name__}")
    patch_mask = mx.array(patch_mask)
    if patch_mask.dtype != mx.bool_ or tuple(patch_mask.shape) != shape:
        raise ValueError(
            f"patch_mask must be bool (images, patches) = {shape}, true where hidden; "
            f"got {str(patch_mask.dtype).removeprefix('mlx.core.')} {tuple(patch_mask.shape)}"
        )
    hidden = np.array(patch_mask.sum(axis=1))
    if hidden.min() != hidden.max():
        raise ValueError(
            f"patch_mask must hide the same number of patches in each image, got {hidden.min():,} to {hidden.max():,}"
        )
    if hidden[0] == shape[1]:
        raise ValueError(f"patch_mask hides all {shape[1]:,} patches: leave at least one visible")
    # Visible ones first, each group in order: sort the indices with the hidden ones moved to the end.
    indices = mx.where(patch_mask, shape[1], 0) + mx.arange(shape[1])
    return mx.sort(indices, axis=1)[:, : shape[1] - int(hidden[0])]


def unit_length(x: mx.array) -> mx.array:
    """Each vector divided by its length, `(B, D) -> (B, D)` in float32; zero stays zero, as in Apple's code."""
    x = x.astype(mx.float32)
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _blocks(config: Aimv2VisionConfig | Aimv2TextConfig) -> list[layers.Block]:
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.rms_norm_eps)
    return [layers.Block(*sizes) for _ in range(config.num_hidden_layers)]


def _pooled(output: EncoderOutput) -> mx.array:
    if output.pooler_output is None:
        raise ValueError("this vision encoder has no pooling head, so its images cannot be compared with texts")
    return output.pooler_output
