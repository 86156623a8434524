"""Translates tensor names and axes between the layouts that AIMv2 is published in, both ways.

One table per part of the network, one column per layout; everything below the tables only reads them. The target is
this package's own layout, the source any other.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor by name."""

MLX = "mlx-aimv2"
"""The target: the layout of this package's models and folders."""


@dataclass(frozen=True)
class AxisOrder:
    """How the axes of one tensor differ between source and target; unexpected axes are left for the comparison."""

    to_target: Callable[[mx.array], mx.array] = lambda x: x
    to_source: Callable[[mx.array], mx.array] = lambda x: x


AS_IS = AxisOrder()
# PyTorch's convolution is (out, channels, height, width), MLX's has the channels last.
OIHW = AxisOrder(lambda x: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x, lambda x: x.transpose(0, 3, 1, 2))
# A position table with an axis for the batch.
BATCHED = AxisOrder(lambda x: x[0] if x.ndim == 3 else x, lambda x: x[None])

_BLOCK_NUMBER = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.")
"""Where a tensor's name contains its block number, in every layout."""

PATCH_CONV = "patch_embed.proj.weight"

# fmt: off
# target                     Apple                                 transformers                           timm
_IMAGES = (
    (PATCH_CONV,                "preprocessor.patchifier.proj.weight", "embeddings.patch_embed.weight",        PATCH_CONV),
    ("patch_embed.proj.bias",   "preprocessor.patchifier.proj.bias",   "embeddings.patch_embed.bias",          "patch_embed.proj.bias"),
    ("patch_embed.norm.weight", "preprocessor.patchifier.norm.weight", "embeddings.rms_norm.weight",           "patch_embed.norm.weight"),
    ("pos_embed",               "preprocessor.pos_embed",              "embeddings.position_embedding.weight", "pos_embed"),
)
_BLOCK_AT = ("blocks.{i}.",     "trunk.blocks.{i}.",                   "encoder.layers.{i}.",                  "blocks.{i}.")
_QKV = ("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight")
_BLOCK = (
    ("norm1.weight",            "norm_1.weight",                       "rms_norm1.weight",                     "norm1.weight"),
    ("attn.qkv.weight",         "attn.qkv.weight",                     _QKV,                                   "attn.qkv.weight"),
    ("attn.proj.weight",        "attn.proj.weight",                    "attention.out_proj.weight",            "attn.proj.weight"),
    ("norm2.weight",            "norm_2.weight",                       "rms_norm2.weight",                     "norm2.weight"),
    ("mlp.gate.weight",         "mlp.fc1.weight",                      "ffn.gate_proj.weight",                 "mlp.fc1_g.weight"),
    ("mlp.up.weight",           "mlp.fc3.weight",                      "ffn.up_proj.weight",                   "mlp.fc1_x.weight"),
    ("mlp.down.weight",         "mlp.fc2.weight",                      "ffn.down_proj.weight",                 "mlp.fc2.weight"),
)
_NORM = (
    ("norm.weight",             "trunk.post_trunk_norm.weight",        "rms_norm.weight",                      "norm.weight"),
)
_HEAD = (
    ("head.cls_token",          "head.cls_token",                      "head.cls_token"),
    ("head.k.weight",           "head.k.weight",                       "head.k_proj.weight"),
    ("head.v.weight",           "head.v.weight",                       "head.v_proj.weight"),
    ("head.linear.weight",      "head.linear.weight",                  "head.output_proj.weight"),
    ("head.linear.bias",        "head.linear.bias",                    "head.output_proj.bias"),
)
_TEXTS = (
    ("token_embed.weight",      "preprocessor.text_embedding.weight",  "embeddings.token_embedding.weight"),
    ("pos_embed",               "preprocessor.positional_embedding",   "embeddings.position_embedding.weight"),
)
_PAIR = (
    ("visual_projection.weight", "image_projector.weight",             "visual_projection.weight"),
    ("text_projection.weight",  "text_projector.weight",               "text_projection.weight"),
    ("logit_scale",             "log_logit_scale",                     "logit_scale"),
)
_PAIR_AT = (("vision_model.", "text_model."), ("image_encoder.", "text_encoder."), ("vision_model.", "text_model."))
# fmt: on

_TARGET, _APPLE, _TRANSFORMERS, _TIMM = range(4)

# Drafts of the transformers class kept Apple's names inside the blocks.
_DRAFT_NAMES = {"out_proj": "proj_out", "gate_proj": "fc1", "up_proj": "fc3", "down_proj": "fc2"}
_OVIS2_NAMES = {"embeddings.patch_embed.": "embeddings.patch_embedding."}


@dataclass(frozen=True)
class Row:
    """A target tensor and the source tensors that make it up, joined along the first axis if several."""

    target: str
    sources: tuple[str, ...]
    axes: AxisOrder = AS_IS

    def to_target(self, parts: list[mx.array]) -> mx.array:
        """The target's tensor from those of the source, lazily."""
        return self.axes.to_target(mx.concatenate(parts) if len(parts) > 1 else parts[0])

    def to_source(self, array: mx.array) -> Iterator[tuple[str, mx.array]]:
        """The source's tensors from that of the target, lazily: `-> (name, array), …`."""
        whole = self.axes.to_source(array)
        parts = mx.split(whole, len(self.sources)) if len(self.sources) > 1 else [whole]
        yield from zip(self.sources, parts, strict=True)


@dataclass(frozen=True)
class Layout:
    """One public form of AIMv2: the rows of a vision encoder and, where it was released in this form, of LiT."""

    name: str
    vision: tuple[Row, ...]
    pair: tuple[Row, ...] = ()


def _rows(
    table: Iterable[tuple[Any, ...]], column: int, axes: Mapping[str, AxisOrder], at: tuple[str, str] = ("", "")
) -> tuple[Row, ...]:
    """The rows of a table in one layout, with a prefix for the target and one for the source."""
    cells = ((row[_TARGET], row[column]) for row in table)
    return tuple(
        Row(at[0] + target, tuple(at[1] + name for name in names), axes.get(target, AS_IS))
        for target, source in cells
        for names in [source if isinstance(source, tuple) else (source,)]
    )


def _trunk(column: int, at: tuple[str, str]) -> tuple[Row, ...]:
    block = at[0] + _BLOCK_AT[_TARGET], at[1] + _BLOCK_AT[column]
    return (*_rows(_BLOCK, column, {}, block), *_rows(_NORM, column, {}, at))


def _vision(column: int, axes: Mapping[str, AxisOrder], at: tuple[str, str] = ("", "")) -> tuple[Row, ...]:
    head = () if column == _TIMM else _rows(_HEAD, column, {}, at)
    return (*_rows(_IMAGES, column, axes, at), *_trunk(column, at), *head)


def _lit(column: int, axes: Mapping[str, AxisOrder]) -> tuple[Row, ...]:
    vision, text = zip(_PAIR_AT[_TARGET], _PAIR_AT[column], strict=True)
    texts = (*_rows(_TEXTS, column, {}, text), *_trunk(column, text))
    return (*_vision(column, axes, vision), *texts, *_rows(_PAIR, column, {}))


def _renamed(rows: Iterable[Row], replace: Mapping[str, str]) -> tuple[Row, ...]:
    def rename(name: str) -> str:
        for old, new in replace.items():
            name = name.replace(old, new)
        return name

    return tuple(Row(row.target, tuple(map(rename, row.sources)), row.axes) for row in rows)


_PYTORCH = {PATCH_CONV: OIHW, "pos_embed": BATCHED}
_APPLE_MLX = {"pos_embed": BATCHED}
_HF = {PATCH_CONV: OIHW}
_HF_VISION, _HF_LIT = _vision(_TRANSFORMERS, _HF), _lit(_TRANSFORMERS, _HF)

_ALL = (
    Layout("apple", _vision(_APPLE, _PYTORCH), _lit(_APPLE, _PYTORCH)),
    Layout("apple-mlx", _vision(_APPLE, _APPLE_MLX), _lit(_APPLE, _APPLE_MLX)),
    Layout("transformers", _HF_VISION, _HF_LIT),
    Layout("transformers-draft", _renamed(_HF_VISION, _DRAFT_NAMES), _renamed(_HF_LIT, _DRAFT_NAMES)),
    Layout("ovis2", _renamed(_HF_VISION, _OVIS2_NAMES)),
    Layout("timm", _vision(_TIMM, _PYTORCH)),
    Layout(MLX, _vision(_TARGET, {}), _lit(_TARGET, {})),
)
LAYOUTS = {layout.name: layout for layout in _ALL}
"""Every layout that is read, by name."""


@dataclass(frozen=True)
class Match:
    """A recognised checkpoint: its layout, its rows, and the prefix before the encoder's tensor names.

    Tensors without the prefix are the rest of a vision-language model and are not read.
    """

    layout: Layout
    rows: tuple[Row, ...]
    prefix: str

    @property
    def is_target(self) -> bool:
        """Whether the names are already the target's."""
        return self.layout.name == MLX

    @cached_property
    def _by_name(self) -> Mapping[str, Row]:
        return {row.target: row for row in self.rows}

    def row(self, target: str) -> Row:
        """The row of one tensor, `target name -> Row` with its block number and the prefix filled in."""
        pattern, number = split_number(target)
        row = self._by_name[pattern]
        return Row(target, tuple(self.prefix + name.replace("{i}", number) for name in row.sources), row.axes)

    def target_shapes(self, found: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes of complete tensors under target names: `{source name: shape} -> {target name: shape}`."""
        target_of = {self.prefix + name: row.target for row in self.rows for name in row.sources}
        shapes: dict[str, tuple[int, ...]] = {}
        for source in found:
            pattern, number = split_number(source)
            if pattern not in target_of:
                continue
            row = self.row(target_of[pattern].replace("{i}", number))
            if all(name in found for name in row.sources):
                with contextlib.suppress(ValueError):  # parts that do not join: the strict comparison names them
                    shapes[row.target] = row.to_target([mx.zeros(found[name]) for name in row.sources]).shape
        return shapes

    def source_shapes(self, target: Shapes) -> dict[str, tuple[int, ...]]:
        """Exactly what a source in this layout must contain: `{target name: shape} -> {source name: shape}`."""
        if self.is_target:  # also for the scales and biases of quantized layers, which no row lists
            return {self.prefix + name: shape for name, shape in target.items()}
        zeros = self.to_source((name, mx.zeros(shape)) for name, shape in target.items())  # never computed
        return {name: array.shape for name, array in zeros}

    def to_target(self, tensors: dict[str, mx.array], wanted: Iterable[str]) -> dict[str, mx.array]:
        """Translates lazily: `{source name: array} -> {target name: array}` for the names wanted.

        Takes the tensors out of `tensors` along the way, so each can be freed once it is used.
        """
        if self.is_target:
            return {name: tensors.pop(self.prefix + name) for name in wanted}
        rows = map(self.row, wanted)
        return {row.target: row.to_target([tensors.pop(part) for part in row.sources]) for row in rows}

    def to_source(self, arrays: Iterable[tuple[str, mx.array]]) -> Iterator[tuple[str, mx.array]]:
        """Translates back, one tensor at a time: `(target name, array), … -> (source name, array), …`."""
        for name, array in arrays:
            yield from self.row(name).to_source(array)


def layout_for(name: str, *, pair: bool) -> Match:
    """The layout to write, as a match without prefix. Raises ValueError for a layout without such rows."""
    layout = LAYOUTS[name]
    rows = layout.pair if pair else layout.vision
    if not rows:
        raise ValueError(f"the {name} layout has no text encoder; choose another")
    return Match(layout, rows, "")


def split_number(name: str) -> tuple[str, str]:
    """The pattern of a name and its block number: `blocks.7.norm1.weight -> (blocks.{i}.norm1.weight, 7)`."""
    found = _BLOCK_NUMBER.search(name)
    return (f"{name[: found.start(1)]}{{i}}{name[found.end(1) :]}", found[1]) if found else (name, "")
