"""The training loop of `fit`, `pretrain` and `lit`: accumulate, average over ranks, clip, update, evaluate, keep, save.

Everything random in a step is drawn from the seed and the step's number, so a run that was killed and resumed ends in
the same bits as one that was not. What it needs to go on lies in OUTPUT.training, in one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlx_aimv2.backend import compiled
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.train.optimizer import (
    Arrays,
    Optimizer,
    Table,
    clipped,
    first_not_finite,
    flat,
    groups_of,
    warm_up_cosine,
)
from mlx_aimv2.train.state import KEPT, Progress, StateFile

Losses: TypeAlias = Callable[[Any, Any, mx.array], dict[str, mx.array]]
"""`model, batch, random key -> {"loss": (), …}`: "loss" is minimised, the rest is reported."""

Batches: TypeAlias = Callable[[int], tuple[Any, int]]
"""`number -> batch, number of the next example` that would be read after that batch."""

MAX_AVERAGE = 0.999
"""Share of the running average that stays at each step; early on less, so that the start does not linger."""

EXPLODED = 100.0
"""Times the first loss, and one more: weights of a larger loss will not recover at any rate."""

UPDATED_TOGETHER = 1 << 27
"""Numbers of weights and moments that are updated at a time: 512 MB in float32."""


class LossError(ValueError):
    """The loss is not a number any more."""


@dataclass(frozen=True)
class Plan:
    """How a model is trained. `steps` are updates; with `accumulate` each takes so many batches."""

    steps: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    warm_up: int = 0
    min_rate: float = 0.0
    """The learning rate of the last step."""
    clip: float = 3.0
    groups: Table = ()
    """Factors of rate and decay by path pattern (`optimizer.groups_of`)."""
    accumulate: int = 1
    dtype: str | None = None
    """What the model computes in; the weights that are trained stay as they are. None computes in the weights' own."""
    keep: Literal["best", "average", "last"] = "best"
    """The weights that the run ends with: those of the best score, their running average, or the last."""
    eval_every: int = 0
    """Steps between evaluations, of which there is one more at the start; 0 for none."""
    save_every: int = 0
    """Steps between two states, 0 with every evaluation."""
    patience: int = 0
    """Evaluations after the warm-up, none with a better score or a val loss as low as ever, before training stops;
    0 never stops early."""
    models: int = 1
    """Trained side by side, their losses summed: what is told is the mean."""
    seed: int = 0


@dataclass(frozen=True)
class Watch:
    """What is done beside training: a score to go by (higher is better), and what is told to whoever watches."""

    evaluate: Callable[[Any], float | tuple[float, float]] | None = None
    """The score, and the val loss if there is one."""
    after_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None
    say: Callable[[str], None] = lambda line: None
    on_progress: Callable[[int], None] = lambda steps: None


class Step:
    """One update of a model: accumulate, average over ranks, clip, AdamW.

    Loss and gradient are one compiled function, clip and AdamW another, as in mlx-lm's trainer (`backend.compiled`).
    What must see the weights as they were stands between the two: ranks, a loss that is no number, saving.
    """

    def __init__(self, model: nn.Module, losses: Losses, plan: Plan, ranks: Ranks | None = None) -> None:
        """Takes the model's trainable parameters and lays them out as training likes it."""
        self.model, self.plan, self.ranks = model, plan, ranks or Ranks()
        self.groups = groups_of(model, plan.groups)
        self.rate = warm_up_cosine(plan.learning_rate, steps=plan.steps, warm_up=plan.warm_up, min_rate=plan.min_rate)
        self.optimizer = Optimizer(
            model, self.groups, schedule=self.rate, weight_decay=plan.weight_decay, betas=plan.betas
        )
        self._losses = losses
        mx.eval(model.parameters())  # what is not, would be computed in every compiled step
        self._differentiate = compiled(self._differentiated, [mx.random.state])
        self._update = compiled(
            lambda gradients: self.optimizer.update(model, clipped(gradients, plan.clip, self.groups)),
            [model, [part.state for part, _ in self.optimizer.parts]],
        )

    def __call__(
        self, step: int, batches: Batches, before_update: Callable[[float], None] = lambda loss: None
    ) -> tuple[dict[str, float], int]:
        """Step `step`, from 0, on its batches: mean losses, and the number of the next example.

        Raises LossError where the loss is not finite; the weights are then as they were. `before_update` is told
        a finite one.
        """
        self.model.train()
        means, gradients, position = self._accumulated(step, batches)
        if not all(map(math.isfinite, means.values())):
            raise LossError(f"the loss is {means['loss']} at step {step + 1}")
        before_update(means["loss"])
        self._update(gradients)
        self._evaluate()
        return means, position

    def _differentiated(self, weights: Any, batch: Any, key: mx.array, total: Any) -> tuple[dict[str, mx.array], Any]:
        """The losses of a batch, and `total` with its gradients."""
        (loss, others), gradients = mx.value_and_grad(self._computed)(weights, batch, key)
        total = gradients if total is None else tree_map(mx.add, total, gradients)
        return {"loss": loss, **others}, total

    def _computed(self, parameters: Any, batch: Any, key: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss to differentiate, and the others; computed in the plan's dtype, if it has one."""
        if self.plan.dtype is not None:
            dtype = getattr(mx, self.plan.dtype)
            parameters = tree_map(lambda x: x.astype(dtype), parameters)
        self.model.update(parameters)
        others = self._losses(self.model, batch, key)
        return others.pop("loss"), others

    def _accumulated(self, step: int, batches: Batches) -> tuple[dict[str, float], Arrays, int]:
        """Mean losses and mean gradients of a step's batches over all ranks, and the number of the next example."""
        plan, ranks, weights = self.plan, self.ranks, self.model.trainable_parameters()
        total: Any = None
        values: list[dict[str, float]] = []
        position = 0
        try:
            for number in range(step * plan.accumulate, (step + 1) * plan.accumulate):
                seed, key = drawn(plan.seed, number, ranks.rank)
                mx.random.seed(seed)  # dropout draws from here
                batch, position = batches(number)
                losses, total = self._differentiate(weights, batch, key, total)
                del batch  # or it would stay in memory while the gradients are computed
                mx.eval(losses, total)  # what is left out keeps all that it was computed from in memory
                numbers: Any = {name: one.item() for name, one in losses.items()}
                values.append(numbers)
        finally:
            self.model.update(weights)
        means = {name: sum(one[name] for one in values) / len(values) for name in values[0]}
        if plan.accumulate > 1:
            total = tree_map(lambda gradient: gradient / plan.accumulate, total)
        if ranks.size > 1:
            total, means = nn.average_gradients(total, group=ranks.group), ranks.mean(means)
        return means, flat(total), position

    def _evaluate(self) -> None:
        """Computes an update some weights at a time, so that never all old ones stand beside the new ones."""
        moments = self.optimizer.moments
        together: list[mx.array] = []
        for path, weight in flat(self.model.trainable_parameters()).items():
            together += [weight, moments[f"{path}.m"], moments[f"{path}.v"]]
            if sum(x.size for x in together) > UPDATED_TOGETHER:
                mx.eval(together)
                together = []
        mx.eval(self.model.parameters(), moments)


def drawn(seed: int, number: int, rank: int) -> tuple[int, mx.array]:
    """What is random in a rank's batch of a number: a seed, and the key that the loss gets."""
    first, second = (int(x) for x in np.random.default_rng([seed, number, rank]).integers(1 << 32, size=2))
    return first, mx.random.key(second)


def train(
    model: nn.Module,
    losses: Losses,
    batches: Batches,
    plan: Plan,
    *,
    state: StateFile | None = None,
    ranks: Ranks | None = None,
    watch: Watch | None = None,
) -> Progress:
    """Trains the trainable parameters of `model` and leaves in it those that `plan.keep` says.

    `batches(i)` gives batch i of this rank. With `state` everything is saved now and then, and found there it is gone
    on with. What is saved is the last good state: weights whose loss, in the step after, was a number and no huge one.
    Raises LossError where a loss, or what an update made of the weights, is not finite.
    """
    ranks, watch = ranks or Ranks(), watch or Watch()
    step = Step(model, losses, plan, ranks)
    kept, done, is_pending = flat(model.trainable_parameters()), Progress(), False
    if state is not None and state.progress is not None:
        done, parts = state.progress, state.load(kept)
        model.update(tree_unflatten(list(parts["model"].items())))
        step.optimizer.lay_out(model, parts["optimizer"], step=done.step)
        kept = parts["kept" if plan.keep != "last" else "model"]

    def evaluated() -> None:
        nonlocal kept
        model.eval()
        found = watch.evaluate(model) if watch.evaluate is not None and ranks.rank == 0 else (0.0, 0.0)
        told = dict(zip(("score", "val_loss"), found if isinstance(found, tuple) else (found,), strict=False))
        told = {name: ranks.size * value for name, value in ranks.mean(told).items()}
        if _is_best(told | {"rate": float(step.rate(mx.array(done.step)))}, done, plan, watch.say):
            kept = flat(model.trainable_parameters())

    def save_pending(loss: float = 0.0) -> None:
        nonlocal is_pending
        done.first_loss = done.first_loss if done.step else loss
        is_wanted, is_pending = is_pending and loss <= EXPLODED * (1 + done.first_loss), False
        if not is_wanted:
            return
        parts = {"model": flat(model.trainable_parameters()), "optimizer": step.optimizer.moments}
        parts["kept"] = {} if plan.keep == "last" else kept
        for arrays in parts.values():
            if (name := first_not_finite(arrays)) is not None:
                raise LossError(f"{name} is not finite after step {done.step}")
        if state is not None and ranks.rank == 0:
            state.save(parts, done)

    try:
        if watch.evaluate is not None and not done.history:
            evaluated()
            is_pending = True
        while done.step < plan.steps and not _is_over(done, plan):
            means, position = step(done.step, batches, save_pending)
            done.step += 1
            done.losses += means["loss"] / plan.models
            if plan.keep == "average":
                kept = _averaged(kept, model, done.step)
            watch.on_progress(done.step)
            if ranks.rank == 0:
                watch.after_step(done.step, means)
            is_last = done.step == plan.steps
            if watch.evaluate is not None and (is_due(done.step, plan.eval_every) or is_last):
                evaluated()
            if is_due(done.step, plan.save_every or plan.eval_every) or is_last:
                done.positions = ranks.each(position)
                is_pending = True
        save_pending()
    except KeyboardInterrupt:
        with suppress(LossError):
            save_pending()
        if state is not None and state.path.is_file():
            watch.say(f"stopped; {state.folder} {KEPT}")
        raise
    except LossError as error:
        raise LossError(f"{error}: stopped; {_advice(plan, done, state)}") from None
    if plan.keep != "last":
        model.update(tree_unflatten(list(kept.items())))
    model.eval()
    return done


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps, 0 for never, is done after this one."""
    return every > 0 and step % every == 0


def _is_best(told: dict[str, float], done: Progress, plan: Plan, say: Callable[[str], None]) -> bool:
    """Notes an evaluation; whether it is the best so far: of equal ones the later, which has seen more."""
    score, val_loss = told["score"], told.get("val_loss", math.inf)
    since = done.step - (done.history[-1]["step"] if done.history else 0)
    loss, done.losses = done.losses / max(1, since), 0.0
    done.history.append({"step": done.step, "loss": loss, **told})
    is_better, is_best = score > done.best_score, score >= done.best_score
    is_learning = is_better or val_loss <= done.best_loss < math.inf or done.step <= plan.warm_up
    done.stale, done.best_loss = 0 if is_learning else done.stale + 1, min(val_loss, done.best_loss)
    if is_best:
        done.best_score, done.best_step = score, done.step
    trained = f"loss {loss:.4f}, " if done.step else ""
    trained += f"val loss {val_loss:.4f}, " if "val_loss" in told else ""
    say(
        f"step {done.step:,} of {plan.steps:,}: {trained}val {100 * score:.2f} %"
        f"{', the best so far' if is_better and done.step else ''}"
    )
    if _is_over(done, plan) and done.step < plan.steps:
        say(f"stopped early: no better for {plan.patience} evaluations; step {done.best_step:,} is kept")
    return is_best


def _is_over(done: Progress, plan: Plan) -> bool:
    return plan.patience > 0 and done.stale >= plan.patience


def _averaged(average: Arrays, model: nn.Module, step: int) -> Arrays:
    """The running average of the weights after a step."""
    share = min(MAX_AVERAGE, (1 + step) / (10 + step))
    new = {name: share * average[name] + (1 - share) * x for name, x in flat(model.trainable_parameters()).items()}
    mx.eval(new)
    return new


def _advice(plan: Plan, done: Progress, state: StateFile | None) -> str:
    """What to do about a loss that is not a number."""
    rates = {group.rate for _, group in plan.groups if group.clip_with}  # of heads that are tried side by side
    less = f"less than --learning-rate {plan.learning_rate * min(rates, default=1.0):g}"
    if done.step == 0:
        return "nothing was learned yet, so the rate is not to blame: check the images and the encoder"
    if state is None or not state.path.is_file():
        return f"try {less}"
    if len(rates) < 2:
        return f"{state.folder} {KEPT} and {less}"
    return f"remove {state.folder} and start again with {less}"
