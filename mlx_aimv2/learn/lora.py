"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) on the matrices of the blocks, in mlx-lm's files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_aimv2.files import read_text
from mlx_aimv2.model import Aimv2VisionModel

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"

LAYERS = ("attn.qkv", "attn.proj", "mlp.gate", "mlp.up", "mlp.down")
"""Matrices of a block that get an adapter."""

RANK, SCALE, DROPOUT = 8, 20.0, 0.0
"""mlx-lm's defaults."""


class LoRALinear(nn.Module):
    """A frozen linear layer plus a product of two thin matrices: `y = W x + scale (x A) B`, B zero at the start."""

    def __init__(self, linear: nn.Linear, *, rank: int = RANK, scale: float = SCALE, dropout: float = DROPOUT) -> None:
        super().__init__()
        output_dims, input_dims = linear.weight.shape
        linear.freeze()
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        bound = 1 / math.sqrt(input_dims)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(input_dims, rank))
        self.lora_b = mx.zeros((rank, output_dims))

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self._added(x)

    def _added(self, x: mx.array) -> mx.array:
        return (self.scale * ((self.dropout(x) @ self.lora_a) @ self.lora_b)).astype(x.dtype)

    def change(self) -> mx.array:
        """What the adapter adds to the weight, `(out, in)` in float32."""
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        return self.scale * (a @ b).T

    def fused_weight(self) -> mx.array:
        """The one matrix that does the same, `(out, in)` in the weight's dtype."""
        weight: mx.array = self.linear.weight
        return (weight.astype(mx.float32) + self.change()).astype(weight.dtype)


class DoRALinear(LoRALinear):
    """LoRA whose rows have learned lengths: `y = m / |W + scale (A B)^T| * (W x + scale (x A) B)`.

    The length of the rows counts as a constant for the gradient, as in the paper and in mlx-lm.
    """

    def __init__(self, linear: nn.Linear, *, rank: int = RANK, scale: float = SCALE, dropout: float = DROPOUT) -> None:
        super().__init__(linear, rank=rank, scale=scale, dropout=dropout)
        self.m = mx.linalg.norm(linear.weight.astype(mx.float32), axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        return (self._lengths() * super().__call__(x)).astype(x.dtype)

    def _lengths(self) -> mx.array:
        adapted = self.linear.weight.astype(mx.float32) + self.change()
        return self.m / mx.stop_gradient(mx.linalg.norm(adapted, axis=1))

    def fused_weight(self) -> mx.array:
        weight: mx.array = self.linear.weight
        adapted = weight.astype(mx.float32) + self.change()
        return (self._lengths()[:, None] * adapted).astype(weight.dtype)


KINDS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}


def add_adapters(
    encoder: Aimv2VisionModel,
    kind: str,
    *,
    num_layers: int,
    rank: int = RANK,
    scale: float = SCALE,
    dropout: float = DROPOUT,
) -> None:
    """Freezes the encoder and puts adapters around the matrices of its last `num_layers` blocks."""
    encoder.freeze()
    for block in encoder.blocks[len(encoder.blocks) - num_layers :]:
        for name in LAYERS:
            part, layer = name.split(".")
            parent = block[part]
            setattr(parent, layer, KINDS[kind](parent[layer], rank=rank, scale=scale, dropout=dropout))


def adapted(encoder: Aimv2VisionModel) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapter with the path of the matrix that it is around."""
    for path, module in encoder.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def remove_adapters(encoder: Aimv2VisionModel) -> None:
    """Replaces every adapted matrix by the one that does the same."""
    for block in encoder.blocks:
        for name in LAYERS:
            part, layer = name.split(".")
            adapter = block[part][layer]
            if isinstance(adapter, LoRALinear):
                adapter.linear.weight = adapter.fused_weight()
                setattr(block[part], layer, adapter.linear)


def config_of(kind: str, *, num_layers: int, rank: int, scale: float, dropout: float) -> dict[str, Any]:
    """The content of adapter_config.json, as mlx-lm writes it."""
    parameters = {"rank": rank, "scale": scale, "dropout": dropout, "keys": list(LAYERS)}
    return {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}


def save_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes adapter_config.json, which belongs to adapters.safetensors with the encoder's trainable parameters."""
    text = json.dumps(dict(config), indent=4, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_adapters(encoder: Aimv2VisionModel, folder: Path) -> dict[str, Any]:
    """Puts the adapters of a folder into an encoder and returns their configuration.

    Raises FileNotFoundError or ValueError with one line where files are missing, damaged, or for another encoder.
    """
    config = _read_config(folder)
    parameters = config["lora_parameters"]
    add_adapters(
        encoder,
        config["fine_tune_type"],
        num_layers=_layers(config, len(encoder.blocks), folder),
        rank=int(parameters["rank"]),
        scale=float(parameters["scale"]),
        dropout=float(parameters.get("dropout", 0.0)),
    )
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: an adapter is that file and {CONFIG_FILE}")
    try:
        weights: Any = mx.load(str(file))
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    flat: Any = tree_flatten(encoder.trainable_parameters())
    wanted = {name: tuple(array.shape) for name, array in flat}
    found = {name: tuple(array.shape) for name, array in weights.items()}
    if wanted != found:
        wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{file} is not for this encoder: {wrong[0]} is {found.get(wrong[0], 'missing')}, "
            f"wanted {wanted.get(wrong[0], 'no such tensor')}; {len(wrong)} differ"
        )
    encoder.load_weights(list(weights.items()), strict=False)
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(read_text(file))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: {folder} is no adapter folder") from None
    except ValueError:
        raise ValueError(f"{file} is not JSON") from None
    parameters = config.get("lora_parameters") if isinstance(config, dict) else None
    if not isinstance(parameters, dict) or config.get("fine_tune_type") not in KINDS:
        raise ValueError(f"{file}: wanted fine_tune_type {' or '.join(KINDS)} and lora_parameters")
    keys = parameters.get("keys", list(LAYERS))
    if sorted(keys) != sorted(LAYERS):
        raise ValueError(f"{file}: the adapters of this package are on {', '.join(LAYERS)}, got {keys}")
    for name in ("rank", "scale"):
        if not isinstance(parameters.get(name), (int, float)):
            raise ValueError(f"{file}: lora_parameters has no number for {name}")
    return config


def _layers(config: Mapping[str, Any], depth: int, folder: Path) -> int:
    layers = config.get("num_layers", -1)
    if not isinstance(layers, int) or not (layers == -1 or 1 <= layers <= depth):
        raise ValueError(f"{folder / CONFIG_FILE}: num_layers {layers!r}, and this encoder has {depth} blocks")
    return depth if layers == -1 else layers
