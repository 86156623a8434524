"""AdamW (Loshchilov and Hutter 2019) whose learning rate and weight decay are each parameter's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_aimv2.x86_training import Balance

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Group:
    """What holds for a parameter: factors of learning rate and weight decay, and whose gradients it is clipped with."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    clip_with: str = ""


Groups = Callable[[str], Group]
"""The group of a parameter by its path."""


class AdamW:
    """Adam with decoupled weight decay, as torch's: `m / (sqrt(v) + eps)`, both without their bias towards zero.

    Parameters of fewer than two axes (norms, biases) are not decayed.
    """

    def __init__(self, *, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.steps = 0
        self.first: Arrays = {}
        self.second: Arrays = {}

    def updated(self, parameters: Arrays, gradients: Arrays, learning_rate: float, groups: Groups) -> Arrays:
        """The parameters after one step; computed in float32, returned in their dtype."""
        self.steps += 1
        beta1, beta2 = self.betas
        unbias1, unbias2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        result, balance = {}, Balance(parameters.values())
        for name, parameter in parameters.items():
            with balance.stream_for(parameter):
                gradient = gradients[name].astype(mx.float32)
                group = groups(name)
                rate = learning_rate * group.learning_rate
                first, second = (1 - beta1) * gradient, (1 - beta2) * mx.square(gradient)
                if name in self.first:
                    first, second = beta1 * self.first[name] + first, beta2 * self.second[name] + second
                self.first[name], self.second[name] = first, second
                value = parameter.astype(mx.float32)
                if parameter.ndim >= 2:
                    value = value * (1 - rate * self.weight_decay * group.weight_decay)
                step = (first / unbias1) / (mx.sqrt(second) / math.sqrt(unbias2) + self.eps)
                result[name] = (value - rate * step).astype(parameter.dtype)
        return result


def clipped(gradients: Arrays, largest: float, groups: Groups) -> Arrays:
    """Gradients of at most this length, the parameters of each clip group together."""
    lengths: dict[str, mx.array] = {}
    for name, gradient in gradients.items():
        square = mx.square(gradient.astype(mx.float32)).sum()
        key = groups(name).clip_with
        lengths[key] = lengths[key] + square if key in lengths else square
    factors = {key: mx.minimum(1.0, largest / (mx.sqrt(square) + 1e-6)) for key, square in lengths.items()}
    return {name: gradient * factors[groups(name).clip_with] for name, gradient in gradients.items()}


def cosine(step: int, *, steps: int, warm_up: int) -> float:
    """The share of the learning rate at a step: rising linearly for `warm_up` steps, then half a cosine to zero."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def layer_wise(depth: int, decay: float) -> Groups:
    """Groups by which each layer learns `decay` times as fast as the one after it (BEiT; Bao et al. 2022)."""

    def group(path: str) -> Group:
        return Group(learning_rate=decay ** (depth + 1 - _layer(path, depth)))

    return group


def _layer(path: str, depth: int) -> int:
    """0 for patches and positions, 1 to depth for the blocks, depth + 1 for what comes after."""
    parts = path.split(".")
    if "blocks" in parts:
        return int(parts[parts.index("blocks") + 1]) + 1
    return 0 if path.startswith(("encoder.patch_embed", "encoder.pos_embed")) else depth + 1


def groups_of(settings: Mapping[str, Group]) -> Groups:
    """Groups by the first parts of a path: `{"heads.3": Group(…)}`."""

    def group(path: str) -> Group:
        return settings[".".join(path.split(".")[:2])]

    return group
