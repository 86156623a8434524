"""How large is a model: its sizes as frozen dataclasses, read from every spelling of config.json in the wild.

Field names are Hugging Face's. Five spellings are understood: Apple's (`max_context_length`, `use_bias`, no
`image_size` for native), transformers' (`is_native`, `max_position_embeddings`), timm's (`architecture`,
`pretrained_cfg`), the vision-language models that carry an AIMv2 tower (Ovis2), and our own, which is transformers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor under our names, as `names.Match.our_shapes` gives them."""

HEAD_DIM = 128
"""Every released AIMv2 vision tower and text tower has heads of this width; timm's config.json does not say."""


@dataclass(frozen=True)
class Aimv2VisionConfig:
    """Sizes of a vision encoder; the defaults are aimv2-large-patch14-224.

    `image_size` is the side of the square pictures in pixels, None for native checkpoints (`is_native`), which take any
    size of at least one patch. `use_head` says that an attention-pooling head follows the final norm (LiT only).
    """

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    num_channels: int = 3
    image_size: int | None = 224
    patch_size: int = 14
    rms_norm_eps: float = 1e-5
    is_native: bool = False
    use_head: bool = False

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_heads(self)
        if self.is_native:
            object.__setattr__(self, "image_size", None)  # a native model has no size of its own
            if self.hidden_size % 4:
                raise ValueError(f"a native model's hidden_size is a multiple of 4, got {self.hidden_size}")
        elif self.image_size is None or self.image_size < self.patch_size:
            raise ValueError(
                f"image_size must be at least one patch of {self.patch_size} pixels, got {self.image_size}"
            )

    @property
    def num_patches(self) -> int | None:
        """Tokens per picture; None for native checkpoints, where the picture decides."""
        return None if self.image_size is None else (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Aimv2VisionConfig:
        """Sizes from the content of a config.json in any spelling: `{key: value} -> Aimv2VisionConfig`."""
        return _vision_config(_vision_section(raw), {})

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, in transformers' spelling."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return {"model_type": "aimv2_vision_model", "hidden_act": "silu", **_NO_BIASES, **values}


@dataclass(frozen=True)
class Aimv2TextConfig:
    """Sizes of LiT's text encoder; the defaults are aimv2-large-patch14-224-lit."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_heads(self)
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} does not fit a vocabulary of {self.vocab_size}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Aimv2TextConfig:
        """Sizes from the content of a config.json or of its `text_config`: `{key: value} -> Aimv2TextConfig`."""
        return _text_config(_section(raw, "text_config"), {})

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` of config.json, in transformers' spelling."""
        return {"model_type": "aimv2_text_model", "hidden_act": "silu", **_NO_BIASES, **asdict(self)}


@dataclass(frozen=True)
class Aimv2Config:
    """Sizes of the pair of towers (LiT): both encoders and the space that they share."""

    vision_config: Aimv2VisionConfig = field(default_factory=lambda: Aimv2VisionConfig(use_head=True))
    text_config: Aimv2TextConfig = field(default_factory=Aimv2TextConfig)
    projection_dim: int = 768
    max_logit_scale: float = 100.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Aimv2Config:
        """Sizes from the content of a config.json in any spelling: `{key: value} -> Aimv2Config`."""
        return _pair_config(raw, {})

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, in transformers' spelling."""
        return {
            "model_type": "aimv2",
            "projection_dim": self.projection_dim,
            "max_logit_scale": self.max_logit_scale,
            "vision_config": self.vision_config.to_dict(),
            "text_config": self.text_config.to_dict(),
        }


AnyConfig = Aimv2VisionConfig | Aimv2Config


def read_config(raw: Mapping[str, Any], shapes: Shapes) -> AnyConfig:
    """Sizes as config.json says them, with what it leaves out taken from the tensors.

    `config.json, {our name: shape} -> config`. Whether there is a text tower, a pooling head or a position table is
    read from the tensors, because no spelling of config.json says it reliably. Raises ValueError for a network that
    AIMv2 is not (biases in the blocks, another activation) and for a size that cannot be known.
    """
    if any(name.startswith("text_model.") for name in shapes):
        return _pair_config(raw, shapes)
    return _vision_config(_vision_section(raw), shapes)


def disagreements(config: AnyConfig, shapes: Shapes) -> list[str]:
    """Every size on which config.json and the tensors differ, as `"hidden_size is 96, the weights say 128"`."""
    if isinstance(config, Aimv2Config):
        pairs = [
            *_size_pairs(config.vision_config, vision_sizes(_without("vision_model.", shapes)), "vision_config."),
            *_size_pairs(config.text_config, text_sizes(_without("text_model.", shapes)), "text_config."),
        ]
        if (projection := shapes.get("visual_projection.weight")) is not None:
            pairs.append(("projection_dim", config.projection_dim, projection[0]))
    else:
        pairs = _size_pairs(config, vision_sizes(shapes), "")
    return [f"{name} is {said}, the weights say {found}" for name, said, found in pairs if said != found]


def vision_sizes(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a vision tower that its tensors show; absent where the tensor is absent."""
    sizes: dict[str, Any] = _block_sizes(shapes)
    if (conv := shapes.get("patch_embed.proj.weight")) is not None and len(conv) == 4:  # (D, patch, patch, channels)
        sizes |= {"hidden_size": conv[0], "patch_size": conv[1], "num_channels": conv[3]}
        if (table := shapes.get("pos_embed")) is not None:
            sizes["image_size"] = math.isqrt(table[0]) * conv[1]
    sizes["use_head"] = any(name.startswith("head.") for name in shapes)
    return sizes


def text_sizes(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a text tower that its tensors show; absent where the tensor is absent."""
    sizes: dict[str, Any] = _block_sizes(shapes)
    if (table := shapes.get("token_embed.weight")) is not None:
        sizes["vocab_size"] = table[0]
    if (table := shapes.get("pos_embed")) is not None:  # never packed into integers, unlike the token table
        sizes |= {"max_position_embeddings": table[0], "hidden_size": table[1]}
    return sizes


_NO_BIASES = {"qkv_bias": False, "mlp_bias": False}

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
    return section | {_TIMM_ARGUMENTS[key]: value for key, value in arguments.items() if key in _TIMM_ARGUMENTS}


def _section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = raw.get(key, raw)
    if not isinstance(section, Mapping):
        raise ValueError(f"config.json: {key} must be an object, got {section!r}")
    return dict(section)


def _vision_config(section: dict[str, Any], shapes: Shapes) -> Aimv2VisionConfig:
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


def _text_config(section: dict[str, Any], shapes: Shapes) -> Aimv2TextConfig:
    _refuse_other_networks(section)
    return _complete(Aimv2TextConfig, _fields_of(Aimv2TextConfig, section), text_sizes(shapes))


def _pair_config(raw: Mapping[str, Any], shapes: Shapes) -> Aimv2Config:
    said = _fields_of(Aimv2Config, {key: raw[key] for key in ("projection_dim", "max_logit_scale") if key in raw})
    if (projection := shapes.get("visual_projection.weight")) is not None:
        said.setdefault("projection_dim", projection[0])
    said["vision_config"] = _vision_config(
        {"image_size": 224, "is_native": False} | _section(raw, "vision_config"), _without("vision_model.", shapes)
    )
    said["text_config"] = _text_config(_section(raw, "text_config"), _without("text_model.", shapes))
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
        if len(set(value)) == 1 or (name == "eos_token_id" and value):
            value = value[0]
        else:
            raise ValueError(f"config.json: {name} must be square, got {value}")
    allowed: tuple[type, ...] = {"bool": (bool,), "float": (int, float)}.get(kind, (int,))
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"config.json: {name} must be a {kind.split(' ')[0]}, got {value!r}")
    return float(value) if kind == "float" else value


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


def _check_positive(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0 and f.name != "eos_token_id":
            raise ValueError(f"{f.name} must be positive, got {value}")


def _check_heads(config: Aimv2VisionConfig | Aimv2TextConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} does not divide into {config.num_attention_heads} attention heads"
        )


def _size_pairs(config: Any, sizes: Mapping[str, Any], where: str) -> list[tuple[str, Any, Any]]:
    return [(where + name, getattr(config, name), size) for name, size in sizes.items()]


def _block_sizes(shapes: Shapes) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    indices = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))]
    if indices:
        sizes["num_hidden_layers"] = max(indices) + 1
    if (gate := shapes.get("blocks.0.mlp.gate.weight")) is not None:
        sizes["intermediate_size"] = gate[0]
    return sizes


def _without(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
