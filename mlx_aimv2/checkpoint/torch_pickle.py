"""Reads PyTorch's pickled weights (.bin, .pt) safely, where torch is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np


def read(file: Path) -> dict[str, mx.array]:
    """Tensors of a pickled state dict, `file -> {name: array}`.

    Only torch can read the format, and only its `weights_only=True` refuses code hidden in it. Raises ValueError when
    torch is not installed or the file holds anything but tensors.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{file}: a pickled file, which only torch reads safely; install it (pip install torch) for this one "
            "conversion, or fetch the .safetensors file of the same checkpoint"
        ) from None
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means that the file cannot be used
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: torch refuses to read it as plain weights ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file}: holds more than named tensors; wanted a state dict")
    # MLX would make float32 of float64 in silence. Whole numbers may belong to the rest of a larger model.
    allowed = {
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
    }
    if other := [f"{name} is {tensor.dtype}" for name, tensor in state.items() if tensor.dtype not in allowed]:
        raise ValueError(f"{file}: weights must be float32, float16 or bfloat16, got {', '.join(other)}")
    return {name: _to_mlx(tensor) for name, tensor in state.items()}


def _to_mlx(tensor: Any) -> mx.array:
    import torch

    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16: carry the bits
        return mx.array(tensor.contiguous().view(torch.int16).numpy().view(np.uint16)).view(mx.bfloat16)
    return mx.array(tensor.contiguous().numpy())
