"""The training loop of `fit`, `pretrain` and `lit`: accumulate, average over ranks, clip, update, evaluate, keep, save.

Everything random in a step is drawn from the seed and the step's number, so a run that was killed and resumed ends in
the same bits as one that was not. What it needs to go on lies in OUTPUT.training, in one file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlx_aimv2.checkpoint.read import read_safetensors
from mlx_aimv2.conversion.folder import write_safetensors
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.files import UNFINISHED
from mlx_aimv2.train.optimizer import Arrays, Optimizer, Table, clipped, flat, groups_of, warm_up_cosine
from mlx_aimv2.train.settings import MAX_COUNT
from mlx_aimv2.untrusted_json import are_numbers, misfit, parse

Losses: TypeAlias = Callable[[Any, Any, mx.array], dict[str, mx.array]]
"""`model, batch, random key -> {"loss": (), …}`: "loss" is minimised, the rest is reported."""

Batches: TypeAlias = Callable[[int], tuple[Any, int]]
"""`number -> batch, number of the next example` that would be read after that batch."""

STATE_FILE = "state.safetensors"

PARTS = ("model", "optimizer", "kept")
"""Beginnings of the names of its tensors: parameters, moments, and the parameters that the run will end with."""

MAX_AVERAGE = 0.999
"""Share of the running average that stays at each step; early on less, so that the start does not linger."""

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
    """Evaluations without a better score before training stops; 0 never stops early."""
    seed: int = 0


@dataclass(frozen=True)
class Watch:
    """What is done beside training: a score to go by (higher is better), and what is told to whoever watches."""

    evaluate: Callable[[Any], float] | None = None
    after_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None
    say: Callable[[str], None] = lambda line: None
    advance: Callable[[int], None] = lambda steps: None


@dataclass
class Progress:
    """How far training is: steps, best score and its step, evaluations since, every evaluation, each rank's example."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    stale: int = 0
    losses: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


class Step:
    """One update of a model: accumulate, average over ranks, clip, AdamW."""

    def __init__(self, model: nn.Module, losses: Losses, plan: Plan, ranks: Ranks | None = None) -> None:
        """Takes the model's trainable parameters and lays them out as training likes it."""
        self.model, self.plan, self.ranks = model, plan, ranks or Ranks()
        self.groups = groups_of(model, plan.groups)
        rate = warm_up_cosine(plan.learning_rate, steps=plan.steps, warm_up=plan.warm_up)
        self.optimizer = Optimizer(model, self.groups, schedule=rate, weight_decay=plan.weight_decay, betas=plan.betas)
        self._differentiated = mx.value_and_grad(self._computed)
        self._losses = losses

    def __call__(self, step: int, batches: Batches) -> tuple[dict[str, float], int]:
        """Step `step`, from 0, on its batches: mean losses, and the number of the next example.

        Raises LossError where the loss is not finite; the weights are then as they were.
        """
        self.model.train()
        means, gradients, position = self._accumulated(step, batches)
        if not all(map(math.isfinite, means.values())):
            raise LossError(f"the loss is {means['loss']} at step {step + 1}")
        self.optimizer.update(self.model, clipped(gradients, self.plan.clip, self.groups))
        self._evaluate()
        return means, position

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
                rng = np.random.default_rng([plan.seed, number, ranks.rank])
                mx.random.seed(int(rng.integers(1 << 32)))  # dropout draws from here
                key = mx.random.key(int(rng.integers(1 << 32)))
                batch, position = batches(number)
                (loss, others), gradients = self._differentiated(weights, batch, key)
                del batch  # or it would stay in memory while the gradients are computed
                total = gradients if total is None else tree_map(mx.add, total, gradients)
                mx.eval(loss, others, total)  # what is left out keeps all that it was computed from in memory
                numbers: Any = {name: one.item() for name, one in {"loss": loss, **others}.items()}
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


def training_folder(output: Path) -> Path:
    """The folder beside a result in which the state of its run lies."""
    return output.with_name(f"{output.name}.training")


def check_training_folder(output: Path, *, resume: bool) -> Path:
    """OUTPUT.training. Raises FileExistsError where a run was stopped, FileNotFoundError where none can be resumed."""
    folder = training_folder(output)
    there = (folder / STATE_FILE).is_file()
    if there and not resume:
        raise FileExistsError(f"{folder} holds a run that was stopped: go on with --resume, or remove that folder")
    if resume and not there:
        raise FileNotFoundError(f"nothing to resume: {folder} has no {STATE_FILE}; leave --resume out")
    return folder


class StateFile:
    """`state.safetensors` in a folder, for one `identity`: all that must be the same when the run goes on."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Raises ValueError where the folder holds the state of another run, and says in what it differs."""
        self.folder, self.path = folder, folder / STATE_FILE
        self.identity = json.loads(json.dumps(identity))
        self.progress: dict[str, Any] | None = None
        if not self.path.is_file():
            return
        _, before, self.progress = self._read()
        if differences := [
            f"{name.replace('_', '-')} {before.get(name)}, now {self.identity.get(name)}"
            for name in sorted(before.keys() | self.identity.keys())
            if before.get(name) != self.identity.get(name)
        ]:
            raise ValueError(
                f"{folder} was begun with {'; '.join(differences)}: resume with the same, or remove that folder"
            )

    def save(self, parts: Mapping[str, Arrays], progress: Mapping[str, Any]) -> None:
        """Writes beside the file and takes its name when everything is on disk; a full disk leaves the one before."""
        tensors = {f"{part}.{name}": array for part in PARTS for name, array in parts.get(part, {}).items()}
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(dict(progress))}
        beside = self.folder / f".{STATE_FILE}{UNFINISHED}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(beside, tensors, metadata=metadata)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            kept = "the one before is kept: make room and go on with --resume" if self.path.is_file() else "make room"
            raise OSError(f"{self.path} cannot be written ({error.strerror or error}); {kept}") from None

    def load(self, wanted: Arrays) -> dict[str, Arrays]:
        """The arrays by part and name. Raises ValueError where they are not those of a model with these parameters."""
        parts, (tensors, _, _) = {part: Arrays() for part in PARTS}, self._read()
        for name, array in tensors.items():
            part, _, path = name.partition(".")
            parts[part][path] = array
        shapes = {name: array.shape for name, array in wanted.items()}
        moments = {f"{name}.{moment}": shape for name, shape in shapes.items() for moment in ("m", "v")}
        expected = {"model": shapes, "optimizer": moments, "kept": shapes if parts["kept"] else {}}
        found = {part: {name: array.shape for name, array in arrays.items()} for part, arrays in parts.items()}
        if found != expected or not all(mx.issubdtype(array.dtype, mx.floating) for array in tensors.values()):
            raise ValueError(f"{self.folder} is of another model: remove it and begin anew")
        mx.eval(parts)
        return parts

    def _read(self) -> tuple[Arrays, dict[str, Any], dict[str, Any]]:
        """The tensors of the file, and identity and progress of the run that wrote it."""
        try:
            tensors, about = read_safetensors(self.path)
            identity, progress = (parse(about[name], name) for name in ("identity", "progress"))
            is_whole = isinstance(identity, dict) and {name.partition(".")[0] for name in tensors} <= set(PARTS)
            if not is_whole or misfit(progress, {"positions": list}) or not are_numbers(progress["positions"]):
                raise ValueError("not what `save` writes")
            return tensors, identity, progress
        except (KeyError, ValueError):
            message = f"{self.path} is damaged, or of another version: remove {self.folder} and begin anew"
            raise ValueError(message) from None


def saved_weights(output: Path, *, prefix: str) -> Arrays:
    """The parameters in OUTPUT.training whose paths begin so; none where there is no state."""
    file = training_folder(output) / STATE_FILE
    tensors = read_safetensors(file)[0] if file.is_file() else {}
    return {key.removeprefix("model."): array for key, array in tensors.items() if key.startswith(f"model.{prefix}")}


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
    on with. Raises LossError at a loss that is not finite: then `state` holds what was saved last.
    """
    ranks, watch = ranks or Ranks(), watch or Watch()
    step = Step(model, losses, plan, ranks)
    kept, done = flat(model.trainable_parameters()), Progress()
    if state is not None and state.progress is not None:
        kept, done = _resumed(model, step.optimizer, state, plan)
        watch.advance(done.step)

    def evaluated() -> None:
        nonlocal kept
        model.eval()
        score = watch.evaluate(model) if watch.evaluate is not None and ranks.rank == 0 else 0.0
        if _is_best(ranks.size * ranks.mean({"score": score})["score"], done, plan, watch.say):
            kept = flat(model.trainable_parameters())

    def saved() -> None:
        if state is not None and ranks.rank == 0:
            own = {} if plan.keep == "last" else kept
            parts = {"model": flat(model.trainable_parameters()), "optimizer": step.optimizer.moments, "kept": own}
            state.save(parts, asdict(done))

    if watch.evaluate is not None and not done.history:
        evaluated()
        saved()
    with _telling(plan, state, watch.say):
        while done.step < plan.steps and not _is_over(done, plan):
            means, position = step(done.step, batches)
            done.step += 1
            done.losses += means["loss"]
            if plan.keep == "average":
                kept = _averaged(kept, model, done.step)
            watch.advance(1)
            watch.after_step(done.step, means)
            is_last = done.step == plan.steps
            if watch.evaluate is not None and (is_due(done.step, plan.eval_every) or is_last):
                evaluated()
            if is_due(done.step, plan.save_every or plan.eval_every) or is_last:
                done.positions = ranks.each(position)
                saved()
    if plan.keep != "last":
        model.update(tree_unflatten(list(kept.items())))
    model.eval()
    return done


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps, 0 for never, is done after this one."""
    return every > 0 and step % every == 0


def _resumed(model: nn.Module, optimizer: Optimizer, state: StateFile, plan: Plan) -> tuple[Arrays, Progress]:
    """Puts back what was saved; returns the kept parameters and the progress."""
    saved, new = state.progress or {}, asdict(Progress())
    kinds, wanted = ({name: type(value) for name, value in one.items()} for one in (saved, new))
    is_whole = kinds == wanted and not any(misfit(entry, {"step": int}) for entry in saved["history"])
    if not is_whole or not 0 <= saved["step"] <= MAX_COUNT:
        raise ValueError(f"{state.path} is damaged, or of another version: remove {state.folder} and begin anew")
    parts, done = state.load(flat(model.trainable_parameters())), Progress(**saved)
    model.update(tree_unflatten(list(parts["model"].items())))
    optimizer.lay_out(model, parts["optimizer"], step=done.step)
    return parts["kept" if plan.keep != "last" else "model"], done


def _is_best(score: float, done: Progress, plan: Plan, say: Callable[[str], None]) -> bool:
    """Notes an evaluation; whether it is the best so far: of equal ones the later, which has seen more."""
    since = done.step - (done.history[-1]["step"] if done.history else 0)
    loss, done.losses = done.losses / max(1, since), 0.0
    done.history.append({"step": done.step, "loss": loss, "score": score})
    is_better, is_best = score > done.best_score, score >= done.best_score
    done.stale = 0 if is_better else done.stale + 1
    if is_best:
        done.best_score, done.best_step = score, done.step
    trained = f"loss {loss:.4f}, " if done.step else ""
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


@contextmanager
def _telling(plan: Plan, state: StateFile | None, say: Callable[[str], None]) -> Iterator[None]:
    """Says what is kept, and how to go on, where the loss is not a number or the user stops the run."""
    try:
        yield
    except (LossError, KeyboardInterrupt) as error:
        kept = ""
        if state is not None and state.path.is_file():
            kept = f"{state.folder} keeps the state, go on with --resume"
        if isinstance(error, LossError):
            less = f"less than --learning-rate {plan.learning_rate:g}"
            raise LossError(f"{error}: stopped; {f'{kept} and' if kept else 'try'} {less}") from None
        if kept:
            say(f"stopped; {kept}")
        raise
