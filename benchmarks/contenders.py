"""The packages that `side_by_side` compares: each encodes the same images with the same weights.

Each function takes a checkpoint's folder in transformers' layout, pixels (B, 3, H, W), the dtype, and the kind of
device (cpu, metal or cuda). It returns a function that computes the features (B, N, D) and waits for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

TORCH_DEVICES = {"cpu": "cpu", "metal": "mps", "cuda": "cuda"}
"""Kind of device -> its name in torch."""

Encode: TypeAlias = Callable[[], Any]


def mlx_aimv2(folder: Path, pixels: np.ndarray, dtype: str, kind: str) -> Encode:
    """This package."""
    import mlx.core as mx

    from mlx_aimv2 import load

    if kind == "cpu":
        mx.set_default_device(mx.cpu)
    model, _ = load(folder, dtype=dtype)
    given = mx.array(pixels.transpose(0, 2, 3, 1)).astype(model.dtype)
    return lambda: _evaluated(model(given).last_hidden_state)


def apple(folder: Path, pixels: np.ndarray, dtype: str, kind: str) -> Encode:
    """Apple's own MLX code, packages aim-v1 and aim-v2 of github.com/apple/ml-aim."""
    import mlx.core as mx
    from aim.v2.mlx import models

    if kind == "cpu":
        mx.set_default_device(mx.cpu)
    maker = {1024: models.aimv2_large, 1536: models.aimv2_huge, 2048: models.aimv2_1B, 3072: models.aimv2_3B}
    sizes = json.loads((folder / "config.json").read_text())
    model = maker[sizes["hidden_size"]](img_size=sizes["image_size"])
    in_dtype = getattr(mx, dtype)
    weights = [(name, array.astype(in_dtype)) for name, array in _translated(folder, "apple-mlx")]
    mx.eval([array for _, array in weights])
    model.load_weights(weights, strict=True)
    model.eval()
    given = mx.array(pixels).astype(in_dtype)
    return lambda: _evaluated(model(given))


def transformers(folder: Path, pixels: np.ndarray, dtype: str, kind: str) -> Encode:
    """transformers on torch, with torch's fused attention."""
    import torch
    from transformers import Aimv2VisionModel

    model = Aimv2VisionModel.from_pretrained(folder, attn_implementation="sdpa", dtype=getattr(torch, dtype))
    return _on_torch(model, lambda model, x: model(x).last_hidden_state, pixels, dtype, kind)


def timm(folder: Path, pixels: np.ndarray, dtype: str, kind: str) -> Encode:
    """timm on torch, with torch's fused attention."""
    import timm
    import torch

    sizes = json.loads((folder / "config.json").read_text())
    width = {1024: "large", 1536: "huge", 2048: "1b", 3072: "3b"}[sizes["hidden_size"]]
    model = timm.create_model(f"aimv2_{width}_patch14_{sizes['image_size']}", num_classes=0)
    weights = {name: torch.from_numpy(np.array(array)) for name, array in _translated(folder, "timm")}
    model.load_state_dict(weights, strict=True)
    return _on_torch(model, lambda model, x: model.forward_features(x), pixels, dtype, kind)


CONTENDERS = {contender.__name__: contender for contender in (mlx_aimv2, transformers, apple, timm)}


def numbers(features: Any) -> np.ndarray:
    """Features from any contender as float32, `(B, N, D) -> (B, N, D)`."""
    if hasattr(features, "cpu"):
        return features.float().cpu().numpy()
    import mlx.core as mx

    return np.array(features.astype(mx.float32))


def _translated(folder: Path, layout: str) -> Any:
    """The folder's weights under the names of another layout, one at a time."""
    from mlx_aimv2.checkpoint.layouts import layout_for
    from mlx_aimv2.loading import read_source

    return layout_for(layout, pair=False).to_source(read_source(folder).weights.items())


def _evaluated(features: Any) -> Any:
    import mlx.core as mx

    mx.eval(features)
    return features


def _on_torch(
    model: Any, encode: Callable[[Any, Any], Any], pixels: np.ndarray, dtype: str, kind: str
) -> Callable[[], Any]:
    import torch

    device = TORCH_DEVICES[kind]
    if not {"cpu": lambda: True, "mps": torch.backends.mps.is_available, "cuda": torch.cuda.is_available}[device]():
        raise SystemExit(
            f"MLX computes on {kind}, but torch {torch.__version__} has no {device} here: install a torch build with it"
        )
    wait = {"cpu": lambda: None, "mps": torch.mps.synchronize, "cuda": torch.cuda.synchronize}[device]
    model = model.to(device, getattr(torch, dtype)).eval()
    given = torch.from_numpy(pixels).to(device, getattr(torch, dtype))

    def run() -> Any:
        with torch.inference_mode():
            features = encode(model, given)
            wait()
        return features

    return run
