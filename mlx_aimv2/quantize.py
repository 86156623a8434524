"""Which layer gets how many bits, and how is a quantized layer made, recognised and undone?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Quantization = Mapping[str, Any]
"""The `quantization` section of config.json: group_size, bits, mode, and per layer path an own object or false."""

SHARED = ("group_size", "bits", "mode")


def apply_structure(model: nn.Module, quantization: Quantization) -> None:
    """Turns the layers that the section names into quantized ones, in place; their weights come later."""
    nn.quantize(model, class_predicate=lambda path, layer: layer_settings(path, layer, quantization))


def layer_settings(path: str, layer: nn.Module, quantization: Quantization) -> dict[str, Any] | bool:
    """The settings of one layer, False when it stays dense."""
    return (settings_at(path, quantization) or False) if hasattr(layer, "to_quantized") else False


def settings_at(path: str, quantization: Quantization) -> dict[str, Any]:
    """Group size, bits and mode at a path: its own entry where there is one, else the shared one; empty when dense."""
    entry = quantization.get(path, True)
    if entry is True:
        return {key: quantization[key] for key in SHARED if key in quantization}
    return dict(entry) if entry else {}


def dequantized(weights: dict[str, mx.array], quantization: Quantization) -> dict[str, mx.array]:
    """Dense weights from packed ones, lazily: `{name: array} -> {name: array}` without `.scales` and `.biases`."""
    dense: dict[str, mx.array] = {}
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and f"{path}.scales" in weights:
            settings = settings_at(path, quantization)
            scales, biases = weights[f"{path}.scales"], weights.get(f"{path}.biases")
            dense[name] = mx.dequantize(array, scales, biases, **settings)
        elif kind not in ("scales", "biases"):
            dense[name] = array
    return dense
