"""AdamW with warm-up and cosine, gradients over parts of a batch and over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_aimv2.x86_training import Balance, columns_first

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 1e-4
PAPER_BATCH = 8192
PAPER_RATES = {1024: 1e-3, 1536: 8e-4, 2048: 8e-4, 3072: 4e-4}
"""Width -> learning rate at batch 8192. The paper gives the ends, 1e-3 (large) and 4e-4 (3B); between, our reading."""

MAX_NORM = 1.0
"""Gradients longer than this are scaled down to it."""


def scaled_rate(width: int, batch: int) -> float:
    """The paper's learning rate for a width, scaled by the square root of the batch, as Adam's noise goes."""
    rate = next((rate for size, rate in PAPER_RATES.items() if width <= size), PAPER_RATES[3072])
    return rate * math.sqrt(batch / PAPER_BATCH)


class AdamW(optim.AdamW):
    """MLX's AdamW, each parameter on the core that has least to do where MLX uses one for all of them."""

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The parameters after one step, as MLX's."""
        arrays: Any = tree_flatten(gradients)
        self._balance = Balance(x for _, x in arrays)
        return super().apply_gradients(gradients, parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """One parameter after the step; its moments go into `state`."""
        with self._balance.stream_for(gradient):
            result: mx.array = super().apply_single(gradient, parameter, state)
        return result


def adamw(rate: float, *, steps: int, warm_up: int, weight_decay: float) -> AdamW:
    """AdamW whose learning rate rises for `warm_up` steps and then falls to zero as a cosine."""
    rise = optim.linear_schedule(0.0, rate, max(1, warm_up))
    fall = optim.cosine_decay(rate, max(1, steps - warm_up))
    schedule = optim.join_schedules([rise, fall], [max(1, warm_up)])
    return AdamW(schedule, betas=list(BETAS), weight_decay=weight_decay, bias_correction=True)


def lay_out(model: nn.Module, optimizer: AdamW) -> None:
    """Lays weights and moments, zeros at first, out as the gradients come; once, before the first step of a run."""
    optimizer.init(model.trainable_parameters())
    weights: Any = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten(list(columns_first(model, dict(weights)).items())))
    moments: Any = tree_flatten(optimizer.state)
    optimizer.state = tree_unflatten(list(columns_first(model, dict(moments)).items()))
    mx.eval(model.parameters(), optimizer.state)


Losses = tuple[mx.array, ...]


def gradients(
    model: nn.Module, loss: Callable[[Any], Losses], parts: Sequence[Any], *, dtype: mx.Dtype
) -> tuple[list[float], Any]:
    """The mean losses over equal parts of a batch and the gradients of the first: one part after another.

    With a `dtype` other than the weights' the model computes in it; weights and gradients stay as they are.
    """
    master = model.trainable_parameters()

    def compute(parameters: Any, part: Any) -> Losses:
        model.update(tree_map(lambda x: x.astype(dtype), parameters))
        return loss(part)

    step = mx.value_and_grad(compute)
    total, values = None, []
    try:
        for part in parts:
            found, gradient = step(master, part)
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            mx.eval(found, total)
            values.append([number(one) for one in found])
    finally:
        model.update(master)
    count = len(values)
    means = [sum(column) / count for column in zip(*values, strict=True)]
    return means, total if count == 1 else tree_map(lambda x: x / count, total)


def clipped(gradient: Any) -> Any:
    """Gradients of a length of at most `MAX_NORM` together."""
    squares: Any = tree_flatten(_each_on_its_core(lambda x: mx.square(x).sum(), gradient))
    length = mx.sqrt(sum(one for _, one in squares))
    factor = mx.minimum(MAX_NORM / (length + 1e-6), 1.0)
    mx.eval(factor)  # MLX keeps more cores busy with one pass through all gradients at a time
    return _each_on_its_core(lambda x: x * factor, gradient)


def _each_on_its_core(work: Callable[[mx.array], mx.array], tree: Any) -> Any:
    """`work` on each array, those of one size and place on the same core as in `AdamW`."""
    arrays: Any = tree_flatten(tree)
    balance = Balance(x for _, x in arrays)

    def one(x: mx.array) -> mx.array:
        with balance.stream_for(x):
            return work(x)

    return tree_map(one, tree)


def number(scalar: mx.array) -> float:
    """The value of an array of one element."""
    return float(scalar.item())  # type: ignore[arg-type]


def check_finite(means: Sequence[float], step: int, *, state: str) -> None:
    """Raises ValueError for a loss that is no number."""
    if not all(map(math.isfinite, means)):
        raise ValueError(
            f"the loss is {means[0]} at step {step}; nothing of that step was kept. Continue from {state} with a lower "
            "--learning-rate or more --warm-up"
        )
