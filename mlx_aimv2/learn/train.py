"""The training loop of all tasks: accumulate, average over ranks, clip, update, evaluate, keep the best, save, go on.

Everything random in a step is drawn from the seed and the step's number, so a run that was killed and resumed ends in
the same bits as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.learn.optimizer import AdamW, Arrays, Group, Groups, clipped, cosine
from mlx_aimv2.learn.state import StateFile
from mlx_aimv2.x86_training import columns_first

Batch = dict[str, mx.array]

Forward = Callable[[Any, Batch, mx.array], mx.array]
"""Losses of a batch: `model, {name: (B, …)}, random key -> (B,)`."""


class LossError(ValueError):
    """The loss is not a number any more."""


@dataclass(frozen=True)
class Settings:
    """How a model is trained. `steps` are updates; with `accumulate` each takes so many batches."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.05
    warm_up: int = 0
    clip: float = 3.0
    accumulate: int = 1
    eval_every: int = 100
    patience: int = 0
    """Evaluations without a better score before training stops; 0 never stops early."""
    seed: int = 0


@dataclass
class Progressed:
    """How far training is: steps done, the best score and its step, evaluations since, and every evaluation."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    stale: int = 0
    losses: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    model: nn.Module,
    forward: Forward,
    batches: Callable[[int], Batch],
    *,
    settings: Settings,
    evaluate: Callable[[nn.Module], float],
    groups: Groups = lambda path: Group(),
    state: StateFile | None = None,
    ranks: Ranks | None = None,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Progressed:
    """Trains the trainable parameters of `model` and leaves the best ones in it.

    `batches(i)` gives batch i as a function of i alone; `forward` its losses (B,), whose mean is minimised;
    `evaluate(model)` a score, higher is better, at the start, every `eval_every` steps and at the end. With `state`
    everything is saved at every evaluation, and found there it is gone on with. Raises LossError at a loss that is not
    finite: then `state` holds the last evaluation.
    """
    ranks = ranks or Ranks()
    optimizer = AdamW(weight_decay=settings.weight_decay)
    done = Progressed()
    best: Arrays = _copy(_trainable(model))
    if state is not None and (found := state.load(_trainable(model))) is not None:
        _put(model, found.parameters)
        optimizer.first, optimizer.second, optimizer.steps = found.first, found.second, found.progress["step"]
        best, done = found.best, Progressed(**found.progress)
        advance(done.step)
    _put(model, columns_first(model, _trainable(model)))
    optimizer.first, optimizer.second = (columns_first(model, x) for x in (optimizer.first, optimizer.second))
    gradient_of = nn.value_and_grad(model, lambda batch, key: forward(model, batch, key).mean())
    if not done.history:
        best = _evaluated(model, evaluate, done, best, settings, ranks, say)
        _save(state, model, optimizer, best, done, ranks)
    while done.step < settings.steps and not _is_over(done, settings):
        model.train()
        loss, gradients = _accumulated(gradient_of, batches, done.step, settings, ranks)
        if not math.isfinite(loss):
            raise LossError(f"the loss is {loss} at step {done.step + 1}")
        rate = settings.learning_rate * cosine(done.step, steps=settings.steps, warm_up=settings.warm_up)
        parameters = _trainable(model)
        updated = optimizer.updated(parameters, clipped(gradients, settings.clip, groups), rate, groups)
        _put(model, updated)
        mx.eval(updated, optimizer.first, optimizer.second)
        done.step += 1
        done.losses += loss
        advance(1)
        if done.step % settings.eval_every == 0 or done.step == settings.steps:
            best = _evaluated(model, evaluate, done, best, settings, ranks, say)
            _save(state, model, optimizer, best, done, ranks)
    _put(model, best)
    model.eval()
    return done


def _save(
    state: StateFile | None, model: nn.Module, optimizer: AdamW, best: Arrays, done: Progressed, ranks: Ranks
) -> None:
    if state is not None and ranks.rank == 0:
        state.save(_trainable(model), optimizer.first, optimizer.second, best, asdict(done))


def _is_over(done: Progressed, settings: Settings) -> bool:
    return settings.patience > 0 and done.stale >= settings.patience


def _accumulated(
    gradient_of: Callable[..., tuple[mx.array, Any]],
    batches: Callable[[int], Batch],
    step: int,
    settings: Settings,
    ranks: Ranks,
) -> tuple[float, Arrays]:
    """Mean loss and mean gradients of a step's batches over all ranks."""
    total: Any = None
    loss = 0.0
    for part in range(settings.accumulate):
        number = step * settings.accumulate + part
        chance = np.random.default_rng([settings.seed, number, ranks.rank])
        mx.random.seed(int(chance.integers(1 << 32)))  # dropout draws from here
        key = mx.random.key(int(chance.integers(1 << 32)))
        value, gradients = gradient_of(batches(number), key)
        total = gradients if total is None else tree_map(mx.add, total, gradients)
        mx.eval(value, total)
        loss += float(value.item()) / settings.accumulate  # type: ignore[arg-type]
    if settings.accumulate > 1:
        total = tree_map(lambda gradient: gradient / settings.accumulate, total)
    if ranks.size > 1:
        total, loss = nn.average_gradients(total), _mean(loss, ranks)
    flat: Any = tree_flatten(total)
    return loss, dict(flat)


def _evaluated(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    done: Progressed,
    best: Arrays,
    settings: Settings,
    ranks: Ranks,
    say: Callable[[str], None],
) -> Arrays:
    """Scores the model as it is now and returns the parameters of the best score so far."""
    model.eval()
    score = evaluate(model) if ranks.rank == 0 else 0.0
    if ranks.size > 1:
        score = _mean(score, ranks) * ranks.size
    since = done.step - (done.history[-1]["step"] if done.history else 0)
    loss, done.losses = done.losses / max(1, since), 0.0
    done.history.append({"step": done.step, "loss": loss, "score": score})
    is_better = score > done.best_score
    done.stale = 0 if is_better else done.stale + 1
    if score >= done.best_score:  # of equal ones the later: it has seen more
        best = _copy(_trainable(model))
        done.best_score, done.best_step = score, done.step
    trained = f"loss {loss:.4f}, " if done.step else ""
    say(
        f"step {done.step:,} of {settings.steps:,}: {trained}val {100 * score:.2f} %"
        f"{', the best so far' if is_better and done.step else ''}"
    )
    if _is_over(done, settings) and done.step < settings.steps:
        say(f"stopped early: no better for {settings.patience} evaluations; step {done.best_step:,} is kept")
    return best


def _mean(value: float, ranks: Ranks) -> float:
    return float(mx.distributed.all_sum(mx.array(value)).item()) / ranks.size  # type: ignore[arg-type]


def _trainable(model: nn.Module) -> Arrays:
    flat: Any = tree_flatten(model.trainable_parameters())
    return dict(flat)


def _put(model: nn.Module, arrays: Arrays) -> None:
    model.update(tree_unflatten(list(arrays.items())))


def _copy(arrays: Arrays) -> Arrays:
    return dict(arrays)  # arrays never change: an update makes new ones
