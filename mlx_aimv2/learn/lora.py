"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) on the matrices of the blocks, in mlx-lm's files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_aimv2.checkpoint.read import read_safetensors
from mlx_aimv2.files import read_json
from mlx_aimv2.learn.task_options import MAX_RANK
from mlx_aimv2.loading import AnyModel
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.train.optimizer import first_not_finite
from mlx_aimv2.untrusted_json import Fields, misfit

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"

KEYS = ["attn.qkv", "attn.proj", "mlp.gate", "mlp.up", "mlp.down"]
"""Matrices of a block that get an adapter."""

RANK, SCALE, DROPOUT = 8, 20.0, 0.0
"""mlx-lm's defaults."""

PARAMETERS: Fields = {"rank": int, "scale": (int, float), "dropout": (int, float)}

BOUNDS: dict[str, tuple[float, float]] = {"rank": (1, MAX_RANK), "scale": (-3.4e38, 3.4e38), "dropout": (0, 0.999)}
"""Fields of lora_parameters and the smallest and largest value of each."""


class LoRALinear(nn.Module):
    """A frozen linear layer plus a product of two thin matrices: `y = W x + scale (x A) B`, B zero at the start."""

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float, dropout: float) -> None:
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
        added = self.scale * ((self.dropout(x) @ self.lora_a) @ self.lora_b)
        return self.linear(x) + added.astype(x.dtype)

    def adapted(self) -> mx.array:
        """The weight including the adapter's contribution, `(out, in)` in float32."""
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        return self.linear.weight.astype(mx.float32) + self.scale * (a @ b).T

    def fused(self) -> nn.Linear:
        """The equivalent single linear layer, in the weight's dtype."""
        self.linear.weight = self.adapted().astype(self.linear.weight.dtype)
        return self.linear


class DoRALinear(LoRALinear):
    """LoRA whose rows have learned lengths: `y = m / |W + scale (A B)^T| * (W x + scale (x A) B)`.

    The gradient treats the length of the rows as a constant, as in the paper and in mlx-lm.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank=rank, scale=scale, dropout=dropout)
        self.m = mx.linalg.norm(linear.weight.astype(mx.float32), axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        lengths = mx.stop_gradient(mx.linalg.norm(super().adapted(), axis=1))
        return (self.m / lengths * super().__call__(x)).astype(x.dtype)

    def adapted(self) -> mx.array:
        weight = super().adapted()
        return (self.m / mx.linalg.norm(weight, axis=1))[:, None] * weight


KINDS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}


def add_adapters(
    model: AnyModel,
    kind: str = "lora",
    *,
    num_layers: int = -1,
    rank: int = RANK,
    scale: float = SCALE,
    dropout: float = DROPOUT,
) -> dict[str, Any]:
    """Freezes a model and puts adapters, "lora" or "dora", around the matrices of its last `num_layers` blocks.

    -1 means all blocks; in a pair both encoders get them. `nn.value_and_grad` then differentiates only the adapters,
    which have no effect yet; dropout needs `model.train()`. Returns the content of adapter_config.json in mlx-lm's
    format, to go with adapters.safetensors. Raises ValueError for numbers out of range, and for layers that are packed
    or already have adapters.
    """
    numbers: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": dropout}
    if kind not in KINDS:
        raise ValueError(f"adapters must be {' or '.join(KINDS)}, got {kind!r:.60}")
    if (name := _unfit(numbers)) is not None:
        raise ValueError(f"{name} must be from {BOUNDS[name][0]} to {BOUNDS[name][1]:g}, got {numbers[name]!r:.60}")
    found: list[tuple[str, LoRALinear]] = []
    for path, encoder in [(path, module) for path, module in model.named_modules() if "blocks" in module]:
        depth = len(encoder.blocks)
        count = depth if num_layers == -1 else num_layers
        if not 1 <= count <= depth:
            raise ValueError(f"num_layers must be from 1 to {depth}, the blocks, or -1 for all, got {num_layers!r:.60}")
        for i in range(depth - count, depth):
            layers = dict(encoder.blocks[i].named_modules())
            if other := next((layers[key] for key in KEYS if not isinstance(layers[key], nn.Linear)), None):
                advice = "fuse(model) first" if isinstance(other, LoRALinear) else "load it without keep_quantized"
                raise ValueError(f"blocks.{i} already has {type(other).__name__} layers: {advice}")
            found += [
                (f"{path}.blocks.{i}.{key}".removeprefix("."), KINDS[kind](layers[key], **numbers)) for key in KEYS
            ]
    model.freeze()
    model.update_modules(tree_unflatten(found))
    return {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": numbers | {"keys": KEYS}}


def _unfit(numbers: Mapping[str, Any]) -> str | None:
    """The first of `PARAMETERS` that is missing, of the wrong type or out of bounds."""
    name = misfit(numbers, PARAMETERS)
    return name or next((one for one, (low, high) in BOUNDS.items() if not low <= numbers[one] <= high), None)


def remove_adapters(model: AnyModel) -> None:
    """Replaces every adapted matrix by the equivalent one."""
    adapters = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    if not adapters:
        raise ValueError("the model has no adapters, so there is nothing to fuse: add_adapters(model) adds them")
    model.update_modules(tree_unflatten([(name, adapter.fused()) for name, adapter in adapters]))


def load_adapters(encoder: Aimv2VisionModel, folder: Path) -> dict[str, Any]:
    """Loads the adapters of a folder into an encoder and returns their configuration.

    Raises FileNotFoundError or ValueError with one line if files are missing, damaged, or for another encoder.
    """
    file, depth = folder / CONFIG_FILE, len(encoder.blocks)
    try:
        config: dict[str, Any] = read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: {folder} is not an adapter folder") from None
    if misfit(config, {"fine_tune_type": str, "lora_parameters": dict}) or config["fine_tune_type"] not in KINDS:
        raise ValueError(f"{file}: wanted fine_tune_type {' or '.join(KINDS)} and lora_parameters")
    parameters: dict[str, Any] = {"dropout": DROPOUT, "keys": KEYS} | config["lora_parameters"]
    keys = parameters.pop("keys")
    if not isinstance(keys, list) or len(keys) != len(KEYS) or any(key not in keys for key in KEYS):
        raise ValueError(f"{file}: the adapters of this package are on {', '.join(KEYS)}, got {keys!r:.200}")
    if (name := _unfit(parameters)) is not None:
        raise ValueError(f"{file}: lora_parameters has {parameters.get(name)!r:.60} for {name}")
    layers = config.setdefault("num_layers", -1)
    if misfit(config, {"num_layers": int}) or not (layers == -1 or 1 <= layers <= depth):
        raise ValueError(f"{file}: num_layers {layers!r:.60}, and this encoder has {depth} blocks")
    numbers = {name: parameters[name] for name in PARAMETERS}
    add_adapters(encoder, config["fine_tune_type"], num_layers=layers, **numbers)
    load_arrays(folder / WEIGHTS_FILE, encoder, encoder.trainable_parameters())
    return config


def load_arrays(file: Path, module: nn.Module, wanted: Any, *, partly: bool = False) -> None:
    """Loads a file's tensors into a module: all that are `wanted`, or with `partly` some of them, and no others.

    Raises FileNotFoundError or ValueError with one line if the file is missing, damaged, or for another encoder.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {file.parent} is incomplete")
    arrays, _ = read_safetensors(file)
    flat: Any = tree_flatten(wanted)
    shapes = {name: tuple(array.shape) for name, array in flat}
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    names = found.keys() if partly else found.keys() | shapes.keys()
    if differ := sorted(name for name in names if shapes.get(name) != found.get(name)):
        raise ValueError(
            f"{file} is not for this encoder: {differ[0]} is {found.get(differ[0], 'missing')}, "
            f"wanted {shapes.get(differ[0], 'no such tensor')}; {len(differ)} differ"
        )
    if (name := first_not_finite(arrays)) is not None:
        raise ValueError(f"{file} is damaged: {name} has values that are not numbers")
    module.load_weights(list(arrays.items()), strict=False)
