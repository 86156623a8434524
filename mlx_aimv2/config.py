"""How large is a model: its sizes as frozen dataclasses, with Hugging Face's field names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor by its name."""

LARGEST = 1 << 24
"""No size of a network comes near this; a config.json that says more is damaged."""

_NO_BIASES = {"qkv_bias": False, "mlp_bias": False}


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
        from mlx_aimv2.checkpoint.config_json import vision_config

        return vision_config(raw, {})

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
        from mlx_aimv2.checkpoint.config_json import text_config

        return text_config(raw, {})

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

    def __post_init__(self) -> None:
        _check_positive(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Aimv2Config:
        """Sizes from the content of a config.json in any spelling: `{key: value} -> Aimv2Config`."""
        from mlx_aimv2.checkpoint.config_json import pair_config

        return pair_config(raw, {})

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


def _check_positive(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        least = 0 if f.name == "eos_token_id" else 1
        if type(value) is int and not least <= value < LARGEST:
            raise ValueError(f"{f.name} must be from {least} to {LARGEST:,}, got {value:.6g}")
        if isinstance(value, float) and not 0 < value < LARGEST:  # false for NaN too
            raise ValueError(f"{f.name} must be a positive number, got {value}")
    if getattr(config, "rms_norm_eps", 0) >= 1:
        raise ValueError(f"rms_norm_eps must be far below 1, got {config.rms_norm_eps}")


def _check_heads(config: Aimv2VisionConfig | Aimv2TextConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} does not divide into {config.num_attention_heads} attention heads"
        )
