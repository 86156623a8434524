"""Translates a model back to PyTorch: the names and axes of transformers' or Apple's layout, and its config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2.checkpoint.layouts import layout_for
from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig, AnyConfig, dtype_name
from mlx_aimv2.conversion import folder

METADATA = {"format": "pt"}
"""What PyTorch's readers ask of a safetensors header."""


def weights_for(
    weights: Iterable[tuple[str, mx.array]], config: AnyConfig, layout: str
) -> Iterator[tuple[str, mx.array]]:
    """Weights under a layout's names and axes, one at a time: `(target name, array), … -> (source name, array), …`."""
    return layout_for(layout, pair=isinstance(config, Aimv2Config)).to_source(weights)


def save_model(
    config: AnyConfig, weights: Iterable[tuple[str, mx.array]], place: Path, *, layout: str, dtype: mx.Dtype
) -> None:
    """Writes a model that comes from no checkpoint: its weights, dense and in `dtype` already, and config.json."""
    folder.save_weights(place, weights_for(weights, config, layout), metadata=METADATA, index_one_file=False)
    folder.save_config(place, config_for(config, layout) | {"torch_dtype": dtype_name(dtype)})


def config_for(config: AnyConfig, layout: str) -> dict[str, Any]:
    """The content of config.json in a layout's format. Raises ValueError for a layout that is not exported."""
    if layout not in _FORMATS:
        raise ValueError(f"the layouts to export are {' and '.join(_FORMATS)}, got {layout}")
    return _FORMATS[layout](config)


def _transformers(config: AnyConfig) -> dict[str, Any]:
    architecture = "Aimv2Model" if isinstance(config, Aimv2Config) else "Aimv2VisionModel"
    return {"architectures": [architecture], **config.to_dict()}


def _apple(config: AnyConfig) -> dict[str, Any]:
    common = {"architectures": ["AIMv2Model"], "model_type": "aimv2"}
    if isinstance(config, Aimv2VisionConfig):
        return common | _apple_vision(config)
    return common | {
        "projection_dim": config.projection_dim,
        "max_logit_scale": config.max_logit_scale,
        "init_temperature": 0.07,
        "vision_config": _apple_vision(config.vision_config) | {"num_queries": 1, "is_causal": False},
        "text_config": _apple_text(config.text_config) | {"is_causal": True},
    }


def _apple_vision(config: Aimv2VisionConfig) -> dict[str, Any]:
    values = {key: getattr(config, key) for key in (*_ENCODER_SIZES, "num_channels", "patch_size", "image_size")}
    # A native model has no image_size in Apple's format.
    return _APPLE_FIXED | {key: value for key, value in values.items() if value is not None}


def _apple_text(config: Aimv2TextConfig) -> dict[str, Any]:
    values = {key: getattr(config, key) for key in (*_ENCODER_SIZES, "vocab_size", "eos_token_id")}
    return _APPLE_FIXED | values | {"max_context_length": config.max_position_embeddings}


_ENCODER_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")

_APPLE_FIXED = {"attention_dropout": 0.0, "projection_dropout": 0.0, "qkv_bias": False, "use_bias": False}

_FORMATS: dict[str, Callable[[AnyConfig], dict[str, Any]]] = {"transformers": _transformers, "apple": _apple}
