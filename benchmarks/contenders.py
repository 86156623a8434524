"""Who can encode the same pictures with the same weights, to be measured beside us?

Each function takes a checkpoint's folder in transformers' layout, pixels (B, 3, H, W), the dtype and whether to stay on
the CPU. It gives a function that computes the features (B, N, D), on the device, and waits for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Encode: TypeAlias = Callable[[], Any]


def mlx_aimv2(folder: Path, pixels: np.ndarray, dtype: str, cpu: bool) -> Encode:
    """This package."""
    import mlx.core as mx

    from mlx_aimv2 import load

    if cpu:
        mx.set_default_device(mx.cpu)
    model, _ = load(folder, dtype=dtype)
    given = mx.array(pixels.transpose(0, 2, 3, 1)).astype(model.dtype)
    return lambda: _evaluated(model(given).last_hidden_state)


def apple(folder: Path, pixels: np.ndarray, dtype: str, cpu: bool) -> Encode:
    """Apple's own MLX code, packages aim-v1 and aim-v2 of github.com/apple/ml-aim."""
    import mlx.core as mx
    from aim.v2.mlx import models

    if cpu:
        mx.set_default_device(mx.cpu)
    maker = {1024: models.aimv2_large, 1536: models.aimv2_huge, 2048: models.aimv2_1B, 3072: models.aimv2_3B}
    sizes = json.loads((folder / "config.json").read_text())
    model = maker[sizes["hidden_size"]](img_size=sizes["image_size"])
    kind = getattr(mx, dtype)
    weights = [(name, array.astype(kind)) for name, array in _translated(folder, "apple-mlx")]
    mx.eval([array for _, array in weights])
    model.load_weights(weights, strict=True)
    model.eval()
    given = mx.array(pixels).astype(kind)
    return lambda: _evaluated(model(given))


def transformers(folder: Path, pixels: np.ndarray, dtype: str, cpu: bool) -> Encode:
    """transformers on torch, with torch's fused attention."""
    from transformers import Aimv2VisionModel

    model = Aimv2VisionModel.from_pretrained(folder, attn_implementation="sdpa")
    return _torch(model, lambda model, x: model(x).last_hidden_state, pixels, dtype, cpu)


def timm(folder: Path, pixels: np.ndarray, dtype: str, cpu: bool) -> Encode:
    """timm on torch, with torch's fused attention."""
    import timm
    import torch

    sizes = json.loads((folder / "config.json").read_text())
    width = {1024: "large", 1536: "huge", 2048: "1b", 3072: "3b"}[sizes["hidden_size"]]
    model = timm.create_model(f"aimv2_{width}_patch14_{sizes['image_size']}", num_classes=0)
    weights = {name: torch.from_numpy(np.array(array)) for name, array in _translated(folder, "timm")}
    model.load_state_dict(weights, strict=True)
    return _torch(model, lambda model, x: model.forward_features(x), pixels, dtype, cpu)


CONTENDERS = {contender.__name__: contender for contender in (mlx_aimv2, transformers, apple, timm)}


def numbers(features: Any) -> np.ndarray:
    """Features from any contender as float32, `(B, N, D) -> (B, N, D)`."""
    if hasattr(features, "cpu"):
        return features.float().cpu().numpy()
    import mlx.core as mx

    return np.array(features.astype(mx.float32))


def _translated(folder: Path, layout: str) -> Any:
    """The folder's weights under the names of another layout, one at a time."""
    from mlx_aimv2.loading import read_source
    from mlx_aimv2.names import layout_for

    return layout_for(layout, pair=False).to_theirs(read_source(folder).weights.items())


def _evaluated(features: Any) -> Any:
    import mlx.core as mx

    mx.eval(features)
    return features


def _torch(
    model: Any, encode: Callable[[Any, Any], Any], pixels: np.ndarray, dtype: str, cpu: bool
) -> Callable[[], Any]:
    import torch

    device = "cpu"
    if not cpu:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    kind = getattr(torch, dtype)
    model = model.to(device, kind).eval()
    given = torch.from_numpy(pixels).to(device, kind)

    def run() -> Any:
        with torch.inference_mode():
            features = encode(model, given)
            wait()
        return features

    return run
