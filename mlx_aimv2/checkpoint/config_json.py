"""What does a config.json say, in any of the spellings that AIMv2 comes in, and do the tensors agree?

Five spellings are understood: Apple's (`max_context_length`, `use_bias`, no `image_size` for native), transformers'
(`is_native`, `max_position_embeddings`), timm's (`architecture`, `pretrained_cfg`), the vision-language models that
carry an AIMv2 tower (Ovis2), and our own, which is transformers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig, AnyConfig, Shapes

HEAD_DIM = 128
"""Every released AIMv2 vision tower and text tower has heads of this width; timm's config.json does not say."""


_BIAS_KEYS = ("qkv_bias", "mlp_bias", "use_bias")

_OTHER_KEYS = ("disable_rope", "preserve_original_pe", "fullatt_block_indexes", "rope_theta")
"""Keys of towers that keep AIMv2's tensors and add rotary positions or windows, which no tensor shows (AndesVL)."""

_SPELLINGS = {"max_context_length": "max_position_embeddings"}
"""Apple's name of a field -> Hugging Face's."""

_VISION_SECTIONS = (("visual_tokenizer_config", "backbone_config"), ("vision_config",))
"""Where a vision-language model's config.json keeps the tower's sizes: Ovis2, then transformers' ovis2 and LiT."""

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

    `config.json, {our name: shape} -> config`. Whether there is a text tower, a pooling head or a position table is
    read from the tensors, because no spelling of config.json says it reliably. Raises ValueError for a network that
    AIMv2 is not (biases in the blocks, another activation) and for a size that cannot be known.
    """
    if any(name.startswith("text_model.") for name in shapes):
        return pair_config(raw, shapes)
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
    """The sizes of a vision tower that its tensors show; absent where the tensor is absent."""
    sizes: dict[str, Any] = _block_sizes(shapes)
    if (conv := _shape(shapes, "patch_embed.proj.weight", axes=4)) is not None:  # (D, patch, patch, channels)
        sizes |= {"hidden_size": conv[0], "patch_size": conv[1], "num_channels": conv[3]}
        if (table := _shape(shapes, "pos_embed", axes=2)) is not None:
            sizes["image_size"] = math.isqrt(table[0]) * conv[1]
    sizes["use_head"] = any(name.startswith("head.") for name in shapes)
    return sizes


def text_sizes(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a text tower that its tensors show; absent where the tensor is absent."""
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
        raise ValueError(f"config.json: model_args must be an object, got {arguments!r}")
    return section | {_TIMM_ARGUMENTS[key]: value for key, value in arguments.items() if key in _TIMM_ARGUMENTS}


def _section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = raw.get(key, raw)
    if not isinstance(section, Mapping):
        raise ValueError(f"config.json: {key} must be an object, got {section!r}")
    return dict(section)


def vision_config(raw: Mapping[str, Any], shapes: Shapes) -> Aimv2VisionConfig:
    """The vision tower's sizes: `config.json or its section, {our name: shape} -> Aimv2VisionConfig`."""
    section = _vision_section(raw)
    _refuse_other_networks(section)
    sizes = vision_sizes(shapes)
    if "is_native" not in section:  # Apple's spelling: native has neither a size nor a position table
        section["is_native"] = section.get("image_size") is None and "pos_embed" not in shapes
    if section["is_native"]:
        if "pos_embed" in shapes:
            raise ValueError("config.json says is_native, yet the weights hold a position table (pos_embed)")
        section["image_size"] = None
    said = _fields_of(Aimv2VisionConfig, section)
    said["use_head"] = sizes.pop("use_head")
    return _complete(Aimv2VisionConfig, said, sizes)


def text_config(raw: Mapping[str, Any], shapes: Shapes) -> Aimv2TextConfig:
    """The text tower's sizes: `config.json or its section, {our name: shape} -> Aimv2TextConfig`."""
    section = _section(raw, "text_config")
    _refuse_other_networks(section)
    return _complete(Aimv2TextConfig, _fields_of(Aimv2TextConfig, section), text_sizes(shapes))


def pair_config(raw: Mapping[str, Any], shapes: Shapes) -> Aimv2Config:
    """The sizes of both towers and of the space that they share: `config.json, {our name: shape} -> Aimv2Config`."""
    said = _fields_of(Aimv2Config, {key: raw[key] for key in ("projection_dim", "max_logit_scale") if key in raw})
    if (projection := _shape(shapes, "visual_projection.weight", axes=2)) is not None:
        said.setdefault("projection_dim", projection[0])
    said["vision_config"] = vision_config(
        {"image_size": 224, "is_native": False} | _section(raw, "vision_config"), _without("vision_model.", shapes)
    )
    said["text_config"] = text_config(raw, _without("text_model.", shapes))
    if not shapes:  # no tensors to ask: a pair always pools with the head
        said["vision_config"] = Aimv2VisionConfig(**{**asdict(said["vision_config"]), "use_head": True})
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


def _fields_of(kind: type[Any], section: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {f.name: str(f.type) for f in fields(kind)}
    said: dict[str, Any] = {}
    for key, value in section.items():
        name = _SPELLINGS.get(key, key)
        if name in wanted and value is not None:
            said[name] = _number(name, value, wanted[name])
    if section.get("is_native"):
        said["image_size"] = None
    return said


def _number(name: str, value: Any, kind: str) -> Any:
    if isinstance(value, list | tuple):  # [224, 224], or several end-of-text ids of which the first counts
        if not all(isinstance(number, int | float) for number in value):
            raise ValueError(f"config.json: {name} must be a number or a list of numbers, got {value!r}")
        if len(set(value)) == 1 or (name == "eos_token_id" and value):
            value = value[0]
        else:
            raise ValueError(f"config.json: {name} must be square, got {value}")
    kind = kind.split(" ")[0]  # "int | None"
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind:
        raise ValueError(f"config.json: {name} must be of type {kind}, got {value!r}")
    return value


def _refuse_other_networks(section: Mapping[str, Any]) -> None:
    if on := [key for key in _BIAS_KEYS if section.get(key)]:
        raise ValueError(f"config.json says {on[0]}: true; AIMv2's blocks have no biases, so this is another network")
    if on := [key for key in _OTHER_KEYS if section.get(key) is not None]:
        raise ValueError(
            f"config.json says {on[0]}: {section[on[0]]}; AIMv2 has neither rotary positions nor windows, so this is "
            "another network"
        )
    if (activation := section.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"config.json says hidden_act: {activation}; AIMv2 uses silu, so this is another network")


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
