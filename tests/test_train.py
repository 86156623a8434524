"""The loop: what was killed and resumed equals what was not, a loss that is no number stops it, AdamW is MLX's."""

import contextlib
import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.learn import fit
from mlx_aimv2.train.batches import Batches, Shuffled
from mlx_aimv2.train.loop import LossError, Plan, Watch, train
from mlx_aimv2.train.optimizer import (
    FROZEN,
    Group,
    Optimizer,
    clipped,
    freeze,
    groups_of,
    layer_decay,
    warm_up_cosine,
)
from mlx_aimv2.train.state import Progress, StateFile, training_run
from tests.labelled import CHECKPOINT, write_digits


def plan(**changes) -> Plan:
    return Plan(**{"steps": 11, "learning_rate": 0.1, "weight_decay": 0.05, "eval_every": 3, "warm_up": 2} | changes)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = mx.array([[1.0, -2.0, 0.5]])


class Numbered:
    """Batches that are a function of their number."""

    def __init__(self, make):
        self.make = make

    def __call__(self, number):
        return self.make(number), 5 * (number + 1)

    def close(self):
        pass


def batch(number: int) -> dict[str, mx.array]:
    x = np.random.default_rng(number).normal(size=(5, 3)).astype(np.float32)
    return {"x": mx.array(x), "y": mx.array(x @ np.array([3.0, 1.0, -1.0], np.float32))}


def losses(model, batch, key):
    noise = 0.01 * mx.random.normal((5,), key=key)
    return {"loss": mx.square((batch["x"] * model.weight).sum(axis=1) - batch["y"] + noise).mean()}


def score(model) -> float:
    return -float(mx.abs(model.weight - mx.array([[3.0, 1.0, -1.0]])).max().item())


def run(*, make=batch, evaluate=score, losses=losses, state=None, model=None, **changes):
    model = model or Line()
    done = train(model, losses, Numbered(make), plan(**changes), state=state, watch=Watch(evaluate=evaluate))
    return model.weight.tolist(), done


def killed_at(step):
    def make(number):
        if number == step:
            raise KeyboardInterrupt
        return batch(number)

    return make


@pytest.mark.parametrize("keep", ["best", "average", "last"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_run_that_is_killed_and_resumed_equals_one_that_is_not(tmp_path, keep, dtype):
    options = {"keep": keep, "dtype": dtype, "save_every": 2}
    whole, done = run(state=StateFile(tmp_path / "whole", {}), **options)
    with pytest.raises(KeyboardInterrupt):
        run(make=killed_at(7), state=StateFile(tmp_path / "killed", {"a": 1}), **options)
    again, resumed = run(state=StateFile(tmp_path / "killed", {"a": 1}), **options)
    assert again == whole
    assert resumed == done


def test_the_best_state_is_kept_and_training_stops_early():
    scores = iter([0.1, 0.5, 0.9, 0.3, 0.2, 0.8])
    seen = []

    def evaluate(model):
        seen.append(model.weight.tolist())
        return next(scores)

    kept, done = run(evaluate=evaluate, steps=90, patience=2)
    assert (done.best_step, done.step) == (6, 12)
    assert kept == seen[2]


@pytest.mark.parametrize(
    ("losses", "warm_up", "steps"),
    [
        ([5, 4, 3, 3, 3, 3, 3], 0, 18),  # as low as the lowest, to the end
        ([5, 4, 6, 6, 6, 6, 6], 0, 9),
        ([5, 6, 6, 6, 6, 6, 6], 9, 15),  # what the warm-up does counts nothing
    ],
)
def test_early_stopping_goes_by_the_val_loss_too(losses, warm_up, steps):
    told = iter(losses)
    _, done = run(evaluate=lambda model: (0.5, float(next(told))), steps=18, patience=2, warm_up=warm_up)
    assert done.step == steps
    assert [entry["val_loss"] for entry in done.history] == losses[: len(done.history)]


def test_a_resumed_run_is_as_patient_as_one_that_was_not_stopped(tmp_path):
    """Of scores that are all alike the first one alone is better than what was before."""
    options = {"evaluate": lambda model: 0.5, "patience": 3}
    with pytest.raises(KeyboardInterrupt):
        run(make=killed_at(7), state=StateFile(tmp_path, {}), **options)
    _, done = run(state=StateFile(tmp_path, {}), **options)
    assert (done.step, done.stale) == (9, 3)


def test_the_progress_of_a_resumed_run_begins_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(make=killed_at(7), state=StateFile(tmp_path, {}))
    counts = []
    watch = Watch(evaluate=score, on_progress=counts.append)
    train(Line(), losses, Numbered(batch), plan(), state=StateFile(tmp_path, {}), watch=watch)
    assert counts == [7, 8, 9, 10, 11]


class WithAnother(Ranks):
    """Rank 0 of two, whose other one has a loss that is larger by one and no score."""

    size = 2

    def mean(self, values):
        return {name: value / 2 if name == "score" else value + 0.5 for name, value in values.items()}


def test_losses_are_means_over_the_ranks_and_the_score_is_that_of_the_first():
    def trained(ranks):
        logged = []
        watch = Watch(evaluate=score, after_step=lambda step, means: logged.append(means["loss"]))
        done = train(Line(), losses, Numbered(batch), plan(), ranks=ranks, watch=watch)
        return logged, [entry["score"] for entry in done.history]

    (alone, scores), (together, scores_together) = trained(Ranks()), trained(WithAnother())
    assert together == pytest.approx([loss + 0.5 for loss in alone])
    assert scores_together == pytest.approx(scores)


def test_the_history_holds_the_mean_loss_up_to_each_evaluation_the_last_step_among_them():
    means = []
    watch = Watch(evaluate=score, after_step=lambda step, losses: means.append(losses["loss"]))
    done = train(Line(), losses, Numbered(batch), plan(steps=7), watch=watch)
    assert [entry["step"] for entry in done.history] == [0, 3, 6, 7]
    wanted = [np.mean(part) for part in (means[:3], means[3:6], means[6:])]
    assert [entry["loss"] for entry in done.history[1:]] == pytest.approx(wanted)


def test_every_batch_draws_noise_of_its_own():
    drawn = []

    def noting(model, batch, key):
        drawn.append((mx.random.uniform().item(), mx.random.uniform(key=key).item()))
        return losses(model, batch, key)

    run(losses=noting, steps=3, accumulate=2, evaluate=None)
    assert [len(set(values)) for values in zip(*drawn, strict=True)] == [6, 6]


def test_the_average_runs_along_and_the_last_is_what_the_last_step_left():
    weights = []

    def after_step(step, means):
        weights.append(model.weight)

    def trained(keep):
        nonlocal model
        weights.clear()
        model = Line()
        train(model, losses, Numbered(batch), plan(keep=keep), watch=Watch(after_step=after_step))
        return model.weight

    model = Line()
    assert mx.array_equal(trained("last"), weights[-1])
    average = Line().weight
    found = trained("average")
    for step, weight in enumerate(weights, start=1):
        share = min(0.999, (1 + step) / (10 + step))
        average = share * average + (1 - share) * weight
    assert mx.allclose(found, average, rtol=8 * np.finfo(np.float32).eps)


def test_a_long_average_keeps_999_parts_of_1000_at_each_step(tmp_path):
    options = {"keep": "average", "evaluate": None, "learning_rate": 0.0, "save_every": 1}
    run(state=StateFile(tmp_path, {}), steps=1, **options)
    state = StateFile(tmp_path, {})
    parts = state.load({"weight": mx.zeros((1, 3))})
    state.save(parts | {"kept": {"weight": mx.zeros((1, 3))}}, replace(state.progress, step=20_000))
    kept, _ = run(state=StateFile(tmp_path, {}), steps=20_001, **options)
    np.testing.assert_allclose(kept, 0.001 * np.array(Line().weight), rtol=1e-3)


def test_a_loss_that_is_no_number_stops_and_says_the_step(tmp_path):
    def poisoned(model, batch, key):
        is_broken = np.array(batch["x"]).sum() == broken
        return {"loss": losses(model, batch, key)["loss"] * (mx.nan if is_broken else 1)}

    broken = np.array(batch(7)["x"]).sum()
    with pytest.raises(LossError, match=r"the loss is nan at step 8: stopped; .* continue with --resume and less than"):
        run(state=StateFile(tmp_path, {}), losses=poisoned)
    kept = StateFile(tmp_path, {})
    assert kept.progress.step == 6
    assert np.isfinite(np.array(kept.load({"weight": mx.zeros((1, 3))})["model"]["weight"])).all()


def test_a_state_of_other_settings_or_another_model_is_refused(tmp_path):
    run(state=StateFile(tmp_path, {"batch_size": 4}))
    with pytest.raises(ValueError, match="was started with batch-size 4, now 8: resume with the same"):
        StateFile(tmp_path, {"batch_size": 8})
    with pytest.raises(ValueError, match="was started with seed None, now 3"):
        StateFile(tmp_path, {"batch_size": 4, "seed": 3})
    with pytest.raises(ValueError, match="is from another model"):
        StateFile(tmp_path, {"batch_size": 4}).load({"other": mx.zeros((1, 3))})
    with pytest.raises(ValueError, match="is from another model"):
        StateFile(tmp_path, {"batch_size": 4}).load({"weight": mx.zeros((1, 4))})
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged, or from another version: remove"):
        StateFile(tmp_path, {})


def test_what_was_stopped_is_resumed_or_removed_and_nothing_else_is_resumed(tmp_path):
    output = tmp_path / "head"
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: .*head.training has no state"):
        training_run(output, resume=True).__enter__()
    with training_run(output, resume=False) as folder:
        StateFile(folder, {}).save({}, Progress())
    with pytest.raises(FileExistsError, match="has a stopped run: continue with --resume, or remove"):
        training_run(output, resume=False).__enter__()
    output.mkdir()
    with pytest.raises(FileExistsError, match="head as it already exists"):
        training_run(output, resume=True).__enter__()


def test_one_run_at_a_time_has_a_target(tmp_path):
    with training_run(tmp_path / "head", resume=False):
        with pytest.raises(FileExistsError, match=r"head.training: another process is writing there"):
            training_run(tmp_path / "head", resume=False).__enter__()
        with training_run(tmp_path / "other", resume=False):
            pass


def test_a_run_that_fails_without_a_state_leaves_only_what_is_not_its_own(tmp_path):
    folder = tmp_path / "head.training"
    for others in ([], ["notes.txt"]):
        with contextlib.suppress(KeyError), training_run(tmp_path / "head", resume=False):
            folder.mkdir()
            for name in ("tokenizer.json", "log.jsonl", *others):
                (folder / name).touch()
            raise KeyError
        assert folder.exists() == bool(others)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_accumulated_halves_equal_one_whole_batch():
    def halves(number):
        step, part = divmod(number, 2)
        return {name: array[2 * part : 2 * part + 2] for name, array in batch(step).items()}

    def wholes(number):
        return {name: array[:4] for name, array in batch(number).items()}

    def plain(model, batch, key):
        return {"loss": mx.square((batch["x"] * model.weight).sum(axis=1) - batch["y"]).mean()}

    results = [
        np.array(run(make=make, losses=plain, accumulate=parts, evaluate=None)[0])
        for make, parts in ((wholes, 1), (halves, 2))
    ]
    np.testing.assert_allclose(*results, rtol=100 * np.finfo(np.float32).eps)


def test_the_model_computes_in_another_dtype_and_its_weights_stay_as_they_are():
    seen = []

    def noting(model, batch, key):
        seen.append(model.weight.dtype)
        return losses(model, batch, key)

    model = Line()
    run(model=model, losses=noting, dtype="bfloat16")
    assert set(seen) == {mx.bfloat16}
    assert model.weight.dtype == mx.float32


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)
        self.frozen = nn.Linear(2, 3)


RATES = [(r"b\..*", Group(rate=2.0)), (r"frozen\..*", FROZEN)]


def parameters(model):
    return dict(tree_flatten(model.trainable_parameters()))


def tenth(step, factor):
    return mx.array(0.1 * factor)


def test_adamw_decays_matrices_alone_takes_each_groups_rate_and_leaves_what_is_frozen():
    model = Two()
    freeze(model, RATES)
    model.update({"a": {"weight": mx.ones((3, 2)), "bias": mx.ones(3)}, "b": {"weight": mx.ones((3, 2))}})
    groups = groups_of(model, RATES)
    assert sorted(groups) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    optimizer = Optimizer(model, groups, schedule=tenth, weight_decay=0.5, betas=(0.9, 0.999))
    optimizer.update(model, {name: mx.zeros_like(x) for name, x in parameters(model).items()})
    new = parameters(model)
    assert new["a.weight"][0, 0].item() == pytest.approx(0.95)
    assert new["b.weight"][0, 0].item() == pytest.approx(0.9)
    assert new["a.bias"][0].item() == 1


def test_adamw_by_groups_is_mlxs_adamw():
    model = Two()
    freeze(model, RATES)
    mine, theirs = model, parameters(model)
    groups = groups_of(model, RATES)
    optimizer = Optimizer(model, groups, schedule=tenth, weight_decay=0.3, betas=(0.9, 0.95))
    others = {
        name: optim.AdamW(
            0.2 if name[0] == "b" else 0.1,
            betas=[0.9, 0.95],
            weight_decay=0.3 if theirs[name].ndim == 2 else 0.0,
            bias_correction=True,
        )
        for name in theirs
    }
    for step in range(5):
        gradients = {name: mx.random.normal(x.shape, key=mx.random.key(step)) for name, x in theirs.items()}
        optimizer.update(mine, gradients)
        theirs = {
            name: others[name].apply_gradients({"x": gradients[name]}, {"x": x})["x"] for name, x in theirs.items()
        }
    for name, x in parameters(mine).items():
        assert mx.array_equal(x, theirs[name])


def test_gradients_are_clipped_together_with_those_of_their_group():
    gradients = {"a.x": mx.array([3.0]), "a.y": mx.array([4.0]), "b.x": mx.array([0.5])}
    new = clipped(gradients, 1.0, {path: Group(clip_with=path[0]) for path in gradients})
    assert [round(new[path].item(), 4) for path in gradients] == [0.6, 0.8, 0.5]


def test_the_rate_rises_linearly_to_its_peak_and_falls_as_half_a_cosine():
    rate = warm_up_cosine(7.0, steps=10, warm_up=2)
    rates = [rate(mx.array(step)).item() for step in range(10)]
    fallen = [3.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    np.testing.assert_allclose(rates, [3.5, 7.0, *fallen], rtol=100 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("factor", [1, 3])
def test_the_rate_falls_to_its_minimum_whatever_the_factor(factor):
    rate = warm_up_cosine(7.0, steps=10, warm_up=2, min_rate=2.0)
    rates = [rate(mx.array(step), factor).item() for step in range(11)]
    peak = 7 * factor
    fallen = [2 + (peak - 2) * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    np.testing.assert_allclose(rates, [peak / 2, peak, *fallen], rtol=100 * np.finfo(np.float32).eps)


def test_layers_learn_the_slower_the_nearer_to_the_pixels():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed, self.norm, self.pos_embed = nn.Linear(1, 1), nn.RMSNorm(3), mx.zeros((2, 3))
            self.blocks = [nn.Linear(1, 1) for _ in range(3)]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = Encoder(), nn.Linear(1, 1)

    groups = groups_of(Whole(), layer_decay(3, 0.5))
    rates = {path.rpartition(".")[0]: group.rate for path, group in groups.items()}
    assert rates == {
        "encoder": 1 / 16,
        "encoder.patch_embed": 1 / 16,
        "encoder.blocks.0": 1 / 8,
        "encoder.blocks.1": 1 / 4,
        "encoder.blocks.2": 1 / 2,
        "encoder.norm": 1,
        "head": 1,
    }


def test_a_batch_is_a_function_of_its_number_and_ranks_share_it():
    def make(item):
        number, rng = item
        return {"target": np.array(number), "drawn": rng.random(3)}

    def batch(number, **keywords):
        made = Batches(Shuffled(range(13), batch_size=4, seed=5, **keywords), make)
        try:
            return {name: np.array(array) for name, array in made(number)[0].items()}
        finally:
            made.close()

    whole = batch(7)
    halves = [batch(7, rank=rank, ranks=2) for rank in range(2)]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))
    epochs = [np.concatenate([batch(number)["target"] for number in range(first, first + 3)]) for first in (3, 6)]
    assert [len(set(epoch)) for epoch in epochs] == [12, 12]
    assert epochs[0].tolist() != epochs[1].tolist()
    drawn = [tuple(row) for number in (6, 7) for row in batch(number)["drawn"]]
    assert len(set(drawn)) == 8, "every example of every batch is changed in a way of its own"
    with pytest.raises(ValueError, match="--batch-size 4 does not divide by 3 ranks"):
        batch(0, ranks=3)


@pytest.mark.slow
def test_fit_that_is_killed_and_resumed_gives_the_same_head_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    digits = write_digits(tmp_path / "digits")
    keywords = {"fine_tune_type": "full", "iters": 6, "batch_size": 4, "steps_per_eval": 2, "drop_path": 0.3}
    fit(digits, CHECKPOINT, tmp_path / "whole", **keywords)
    original = Batches.__call__

    def killed(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(Batches, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(digits, CHECKPOINT, tmp_path / "killed", **keywords)
    assert not (tmp_path / "killed").exists()
    monkeypatch.undo()
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileExistsError, match="has a stopped run: continue with --resume"):
        fit(digits, CHECKPOINT, tmp_path / "killed", **keywords)
    fit(digits, CHECKPOINT, tmp_path / "killed", resume=True, **keywords)
    for file in ("head.safetensors", "encoder.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_fit_says_what_to_do_about_a_loss_that_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    digits = write_digits(tmp_path / "digits")
    monkeypatch.setattr(
        "mlx_aimv2.learn.classify.head.loss", lambda outputs, targets: outputs["logits"].sum(axis=1) * mx.nan
    )
    with pytest.raises(
        ValueError, match=r"nan at step 1: stopped; nothing was learned yet, so the rate is not to blame"
    ):
        fit(digits, CHECKPOINT, tmp_path / "head", fine_tune_type="lora", iters=2, batch_size=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "digits"]
