"""MLX's AdamW by groups of parameters, which a table of path patterns chooses: frozen, at what rate, how decayed.

The table is big_vision's way to say it: `[(pattern, Group(…)), …]`; the first pattern that matches a whole path counts.
Layer decay, the candidates of a probe and a frozen trunk are entries of such tables.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_aimv2.backend import Balance, columns_first

Arrays: TypeAlias = dict[str, mx.array]

Rate: TypeAlias = Callable[..., mx.array]
"""`step, factor -> ()`: the learning rate at a step, which counts from 0, of a group of such a factor."""


@dataclass(frozen=True)
class Group:
    """What holds for a parameter: factors of learning rate and weight decay, and whose gradients it is clipped with."""

    rate: float = 1.0
    decay: float = 1.0
    clip_with: str = ""


FROZEN = Group(rate=0.0)

Table: TypeAlias = Sequence[tuple[str, Group]]


def freeze(model: nn.Module, table: Table) -> None:
    """Freezes the parameters whose group learns at rate 0; what is frozen already stays so."""
    for path, module in model.named_modules():
        own = [name for name, value in module.items() if isinstance(value, mx.array)]
        module.freeze(recurse=False, keys=[name for name in own if not _group(f"{path}.{name}", table).rate])


def groups_of(model: nn.Module, table: Table) -> dict[str, Group]:
    """The group of each trainable parameter by its path. Those of fewer than two axes (norms, biases) do not decay."""
    groups = {}
    for path, array in flat(model.trainable_parameters()).items():
        group = _group(path, table)
        groups[path] = group if array.ndim >= 2 else Group(group.rate, 0.0, group.clip_with)
    return groups


def _group(path: str, table: Table) -> Group:
    path = path.lstrip(".")
    return next((group for pattern, group in table if re.fullmatch(pattern, path)), Group())


def layer_decay(depth: int, decay: float) -> list[tuple[str, Group]]:
    """Each layer of `encoder` learns `decay` times as fast as the one after it (BEiT; Bao et al. 2022).

    Patches and positions are the first layer, then come the blocks; what follows learns at the full rate.
    """
    layers = [r"encoder\.(patch_embed|pos_embed).*", *(rf"encoder\.blocks\.{i}\..*" for i in range(depth))]
    return [(pattern, Group(rate=decay ** (depth + 1 - i))) for i, pattern in enumerate(layers)]


class AdamW(optim.AdamW):
    """MLX's AdamW; where MLX uses one core for all parameters, each is computed on the core that has least to do."""

    balance: Balance

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """One parameter after the step; its moments go into `state`."""
        with self.balance.stream_for(gradient):
            return super().apply_single(gradient, parameter, state)


class Optimizer:
    """An AdamW for the parameters of each group (Loshchilov and Hutter 2019), biases towards zero corrected."""

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Group],
        *,
        schedule: Rate,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        """Takes the model's trainable parameters. Decay is of the rate: `p *= 1 - rate * weight_decay`."""
        alike: dict[tuple[float, float], list[str]] = defaultdict(list)
        for path, group in groups.items():
            alike[group.rate, group.decay].append(path)

        def times(factor: float) -> Rate:
            return lambda step: schedule(step, factor)

        self.parts = [
            (AdamW(times(rate), betas=list(betas), weight_decay=weight_decay * decay, bias_correction=True), paths)
            for (rate, decay), paths in alike.items()
        ]
        weights = flat(model.trainable_parameters())
        for part, paths in self.parts:
            part.init({path: weights[path] for path in paths})
        self.lay_out(model)

    @property
    def moments(self) -> Arrays:
        """First and second moments by path, `{"blocks.0.norm1.weight.m": …, "….v": …}`."""
        return flat({path: part.state[path] for part, paths in self.parts for path in paths})

    def lay_out(self, model: nn.Module, moments: Arrays | None = None, *, step: int = 0) -> None:
        """Lays weights and moments out as the gradients come, where that is faster; goes on with moments of a step."""
        model.update(tree_unflatten(list(columns_first(model, flat(model.trainable_parameters())).items())))
        moments = columns_first(model, self.moments if moments is None else moments)
        for part, paths in self.parts:
            part.state["step"] = mx.array(step, mx.uint64)
            for path in paths:
                part.state[path] = {name: moments[f"{path}.{name}"] for name in ("m", "v")}

    def update(self, model: nn.Module, gradients: Arrays) -> None:
        """Gives the model's parameters a step, not evaluated yet."""
        balance, weights, new = Balance(gradients.values()), flat(model.trainable_parameters()), dict[str, mx.array]()
        for part, paths in self.parts:
            part.balance = balance
            new |= part.apply_gradients({path: gradients[path] for path in paths}, weights)
        model.update(tree_unflatten(list(new.items())))


def clipped(gradients: Arrays, max_norm: float, groups: Mapping[str, Group]) -> Arrays:
    """Gradients of a length of at most `max_norm`, those of one clip group together; the length is float32's."""
    squares: dict[str, list[mx.array]] = defaultdict(list)
    for path, square in _each_on_its_core(lambda _, x: mx.square(x.astype(mx.float32)).sum(), gradients).items():
        squares[groups[path].clip_with].append(square)
    lengths = {key: mx.sqrt(mx.stack(some).sum()) for key, some in squares.items()}
    factors = {key: mx.minimum(max_norm / (length + 1e-6), 1.0) for key, length in lengths.items()}
    with suppress(ValueError):  # within mx.compile, which does not evaluate
        mx.eval(factors)  # MLX keeps more cores busy with one pass through all gradients at a time
    return _each_on_its_core(lambda path, x: x * factors[groups[path].clip_with], gradients)


def _each_on_its_core(work: Callable[[str, mx.array], mx.array], arrays: Arrays) -> Arrays:
    """`work` on each array, those of one size and place on the same core as in `AdamW`."""
    balance = Balance(arrays.values())
    done = {}
    for path, x in arrays.items():
        with balance.stream_for(x):
            done[path] = work(path, x)
    return done


def warm_up_cosine(rate: float, *, steps: int, warm_up: int, min_rate: float = 0.0) -> Rate:
    """The learning rate: it rises linearly for `warm_up` steps to `factor * rate`, then falls as half a cosine.

    It falls to `min_rate`, whatever the factor.
    """

    def schedule(step: mx.array, factor: float = 1.0) -> mx.array:
        step = step.astype(mx.float32)
        risen = (step + 1) / max(1, warm_up)
        fallen = 0.5 * (1 + mx.cos(mx.pi * (step - warm_up) / max(1, steps - warm_up)))
        above = factor * (rate * mx.where(step < warm_up, risen, fallen))
        return above + min_rate * mx.where(step < warm_up, 0.0, 1 - fallen)

    return schedule


def flat(tree: Any) -> Arrays:
    """The arrays of a tree by their paths."""
    return dict(tree_flatten(tree))


def first_not_finite(arrays: Arrays) -> str | None:
    """The name of the first array that holds a NaN or an infinity, None where all are numbers."""
    finite = {name: mx.isfinite(array).all() for name, array in arrays.items()}
    mx.eval(finite)
    return next((name for name, is_finite in finite.items() if not is_finite.item()), None)
