"""Reads the sizes of a model from config.json in every format that AIMv2 comes in, and checks them against the tensors.

Five formats are known: Apple's (`max_context_length`, `use_bias`, no `image_size` for native), transformers'
(`is_native`, `max_position_embeddings`), timm's (`architecture`, `pretrained_cfg`), that of the vision-language models
that hold an AIMv2 encoder (Ovis2), and the one this package writes, which is transformers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mlx_aimv2.config import (
    Aimv2Config,
    Aimv2TextConfig,
    Aimv2VisionConfig,
    AnyConfig,
    Shapes,
    read_fields,
    section_of,
)

HEAD_DIM = 128
"""Every released AIMv2 encoder, image or text, has heads of this width; timm's config.json does not say."""

_VISION_SECTIONS = (("visual_tokenizer_config", "backbone_config"), ("vision_config",))
"""Where a vision-language model's config.json keeps the encoder's sizes: Ovis2, then transformers' ovis2 and LiT."""

_TIMM_ARGUMENTS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
}


def read_config(raw: Mapping[str, Any], shapes: Shapes) -> AnyConfig:
    """Sizes as config.json says them, with what it leaves out taken from the tensors.

    `config.json, {target name: shape} -> config`. Whether there is a text encoder, a pooling head or a position table
    is read from the tensors, because no format of config.json says it reliably. Raises ValueError for a network that
    AIMv2 is not (biases in the blocks, another activation) and for a size that cannot be known.
    """
    if any(name.startswith("text_model.") for name in shapes):
        return lit_config(raw, shapes)
    return vision_config(raw, shapes)


def disagreements(config: AnyConfig, shapes: Shapes) -> list[str]:
    """Every size on which config.json and the tensors differ, as `"hidden_size is 96, the weights say 128"`."""
    if isinstance(config, Aimv2Config):
        pairs = [
            *_size_pairs(config.vision_config, vision_sizes(_without("vision_model.", shapes)), "vision_config."),
            *_size_pairs(config.text_config, text_sizes(_without("text_model.", shapes)), "text_config."),
        ]
        if (projection := _shape(shapes, "visual_projection.weight", axes=2)) is not None:
            pairs.append(("projection_dim", config.projection_dim, projection[0]))
    else:
        pairs = _size_pairs(config, vision_sizes(shapes), "")
    return [f"{name} is {said}, the weights say {found}" for name, said, found in pairs if said != found]


def vision_sizes(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a vision encoder that its tensors show; absent where the tensor is absent."""
    sizes: dict[str, Any] = _block_sizes(shapes)
    if (conv := _shape(shapes, "patch_embed.proj.weight", axes=4)) is not None:  # (D, patch, patch, channels)
        sizes |= {"hidden_size": conv[0], "patch_size": conv[1], "num_channels": conv[3]}
        if (table := _shape(shapes, "pos_embed", axes=2)) is not None:
            sizes["image_size"] = math.isqrt(table[0]) * conv[1]
    sizes["use_head"] = any(name.startswith("head.") for name in shapes)
    return sizes


def text_sizes(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a text encoder that its tensors show; absent where the tensor is absent."""
    sizes: dict[str, Any] = _block_sizes(shapes)
    if (table := _shape(shapes, "token_embed.weight", axes=2)) is not None:
        sizes["vocab_size"] = table[0]
    if (table := _shape(shapes, "pos_embed", axes=2)) is not None:  # never packed into integers, unlike the token table
        sizes |= {"max_position_embeddings": table[0], "hidden_size": table[1]}
    return sizes


def _vision_section(raw: Mapping[str, Any]) -> dict[str, Any]:
    for path in _VISION_SECTIONS:
        section: Any = raw
        for key in path:
            section = section.get(key) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping):
            return {"is_native": False, "image_size": 224, **section} if path == ("vision_config",) else dict(section)
    if isinstance(timm := raw.get("pretrained_cfg"), Mapping):
        return _timm_section(raw, timm)
    return dict(raw)


def _timm_section(raw: Mapping[str, Any], pretrained: Mapping[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = {"is_native": False}
    size = pretrained.get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3:
        section["image_size"] = list(size[1:])
    arguments = raw.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"config.json: model_args must be an object, got {arguments!r:.80}")
    return section | {_TIMM_ARGUMENTS[key]: value for key, value in arguments.items() if key in _TIMM_ARGUMENTS}


def vision_config(raw: Mapping[str, Any], shapes: Shapes) -> Aimv2VisionConfig:
    """The vision encoder's sizes: `config.json or its section, {target name: shape} -> Aimv2VisionConfig`."""
    section = _vision_section(raw)
    sizes = vision_sizes(shapes)
    if "is_native" not in section:  # Apple's format: native has neither a size nor a position table
        section["is_native"] = section.get("image_size") is None and "pos_embed" not in shapes
    if section["is_native"]:
        if "pos_embed" in shapes:
            raise ValueError("config.json says is_native, yet the weights hold a position table (pos_embed)")
        section["image_size"] = None
    said = read_fields(Aimv2VisionConfig, section)
    said["use_head"] = sizes.pop("use_head")
    return _complete(Aimv2VisionConfig, said, sizes)


def text_config(raw: Mapping[str, Any], shapes: Shapes) -> Aimv2TextConfig:
    """The text encoder's sizes: `config.json or its section, {target name: shape} -> Aimv2TextConfig`."""
    section = section_of(raw, "text_config")
    return _complete(Aimv2TextConfig, read_fields(Aimv2TextConfig, section), text_sizes(shapes))


def lit_config(raw: Mapping[str, Any], shapes: Shapes) -> Aimv2Config:
    """The sizes of both encoders and of their shared space: `config.json, {target name: shape} -> Aimv2Config`."""
    said = read_fields(Aimv2Config, {key: raw[key] for key in ("projection_dim", "max_logit_scale") if key in raw})
    if (projection := _shape(shapes, "visual_projection.weight", axes=2)) is not None:
        said.setdefault("projection_dim", projection[0])
    said["vision_config"] = vision_config(
        {"image_size": 224, "is_native": False} | section_of(raw, "vision_config"), _without("vision_model.", shapes)
    )
    said["text_config"] = text_config(raw, _without("text_model.", shapes))
    return Aimv2Config(**said)


def _complete(kind: type[Any], said: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """What config.json says, then what the tensors show, then (without tensors) the class's defaults."""
    values = {**sizes, **said}
    if "num_attention_heads" not in values and "hidden_size" in values:
        if values["hidden_size"] % HEAD_DIM:
            raise ValueError(
                f"config.json does not say num_attention_heads, and hidden_size {values['hidden_size']} "
                f"is no multiple of the released head width {HEAD_DIM}: add num_attention_heads to config.json"
            )
        values["num_attention_heads"] = values["hidden_size"] // HEAD_DIM
    return kind(**values)


def _size_pairs(config: Any, sizes: Mapping[str, Any], where: str) -> list[tuple[str, Any, Any]]:
    pairs = [(where + name, getattr(config, name), size) for name, size in sizes.items() if name != "image_size"]
    if (side := sizes.get("image_size")) and config.num_patches != (side // config.patch_size) ** 2:
        pairs.append((f"{where}image_size", config.image_size, side))  # what is left over at the edges is no patch
    return pairs


def _block_sizes(shapes: Shapes) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    indices = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))]
    if indices:
        sizes["num_hidden_layers"] = max(indices) + 1
    if (gate := _shape(shapes, "blocks.0.mlp.gate.weight", axes=2)) is not None:
        sizes["intermediate_size"] = gate[0]
    return sizes


def _without(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _shape(shapes: Shapes, name: str, *, axes: int) -> tuple[int, ...] | None:
    """A tensor's shape if it has as many axes as it should; the strict comparison names those that have not."""
    shape = shapes.get(name)
    return shape if shape is not None and len(shape) == axes else None
