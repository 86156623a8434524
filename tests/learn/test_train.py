"""The loop: what was killed and resumed equals what was not, a loss that is no number stops it, AdamW is torch's."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from labelled import CHECKPOINT, write_digits

from mlx_aimv2.learn import fine_tune, fit, train
from mlx_aimv2.learn.batches import Batches
from mlx_aimv2.learn.data import Sample
from mlx_aimv2.learn.optimizer import AdamW, Group, clipped, cosine, layer_wise
from mlx_aimv2.learn.state import StateFile
from mlx_aimv2.learn.train import LossError, Settings


def settings(**changes) -> Settings:
    return Settings(**{"steps": 11, "learning_rate": 0.1, "eval_every": 3, "warm_up": 2} | changes)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = mx.array([[1.0, -2.0, 0.5]])


def batches(number: int) -> dict[str, mx.array]:
    x = np.random.default_rng(number).normal(size=(5, 3)).astype(np.float32)
    return {"x": mx.array(x), "y": mx.array(x @ np.array([3.0, 1.0, -1.0], np.float32))}


def forward(model, batch, key):
    noise = 0.01 * mx.random.normal((5,), key=key)
    return mx.square((batch["x"] * model.weight).sum(axis=1) - batch["y"] + noise)


def score(model) -> float:
    return -float(mx.abs(model.weight - mx.array([[3.0, 1.0, -1.0]])).max().item())


def run(model=None, **keywords):
    model = model or Line()
    done = train.train(model, keywords.pop("forward", forward), batches, evaluate=score, **keywords)
    return model.weight.tolist(), done


def test_a_run_that_is_killed_and_resumed_equals_one_that_is_not(tmp_path):
    whole, done = run(settings=settings())

    def killed(number):
        if number == 7:
            raise KeyboardInterrupt
        return batches(number)

    state = StateFile(tmp_path, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        train.train(Line(), forward, killed, settings=settings(), evaluate=score, state=state)
    again, resumed = run(settings=settings(), state=state)
    assert again == whole
    assert resumed == done


def test_the_best_state_is_kept_and_training_stops_early():
    scores = iter([0.1, 0.5, 0.9, 0.3, 0.2, 0.8])
    seen = []
    model = Line()

    def evaluate(model):
        seen.append(model.weight.tolist())
        return next(scores)

    done = train.train(model, forward, batches, settings=settings(steps=90, patience=2), evaluate=evaluate)
    assert (done.best_step, done.step) == (6, 12)
    assert model.weight.tolist() == seen[2]


def test_a_loss_that_is_no_number_stops_and_says_the_step(tmp_path):
    state = StateFile(tmp_path, {})

    def poisoned(model, batch, key):
        return forward(model, batch, key) * (mx.nan if np.array(batch["x"]).sum() == broken else 1)

    broken = np.array(batches(7)["x"]).sum()
    with pytest.raises(LossError, match="the loss is nan at step 8"):
        run(settings=settings(), state=state, forward=poisoned)
    kept = state.load({"weight": mx.zeros((1, 3))})
    assert kept.progress["step"] == 6
    assert np.isfinite(np.array(kept.parameters["weight"])).all()


def test_a_state_of_other_settings_or_another_model_is_refused(tmp_path):
    run(settings=settings(), state=StateFile(tmp_path, {"batch_size": 4}))
    with pytest.raises(ValueError, match="was begun with batch-size 4, now it is 8"):
        run(settings=settings(), state=StateFile(tmp_path, {"batch_size": 8}))
    with pytest.raises(ValueError, match="is of another model"):
        StateFile(tmp_path, {"batch_size": 4}).load({"other": mx.zeros((1, 3))})
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged: remove"):
        StateFile(tmp_path, {}).load({})


def test_a_state_that_cannot_be_written_is_one_line_and_leaves_the_last_one(tmp_path, monkeypatch):
    state = StateFile(tmp_path, {})
    run(settings=settings(), state=state)
    before = state.path.read_bytes()

    def full(*arguments, **keywords):
        raise RuntimeError("[save_safetensors] No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match=r"cannot be written to .*No space left"):
        state.save({}, {}, {}, {}, {})
    assert state.path.read_bytes() == before


def test_accumulated_halves_equal_one_whole_batch():
    def halves(number):
        step, part = divmod(number, 2)
        return {name: array[2 * part : 2 * part + 2] for name, array in batches(step).items()}

    def wholes(number):
        return {name: array[:4] for name, array in batches(number).items()}

    def plain(model, batch, key):
        return mx.square((batch["x"] * model.weight).sum(axis=1) - batch["y"])

    results = []
    for make, accumulate in ((wholes, 1), (halves, 2)):
        model = Line()
        train.train(model, plain, make, settings=settings(accumulate=accumulate), evaluate=lambda model: 0.0)
        results.append(np.array(model.weight))
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_adamw_decays_matrices_alone_and_takes_each_groups_rate():
    optimizer = AdamW(weight_decay=0.5)
    parameters = {"a.w": mx.ones((2, 2)), "b.w": mx.ones((2, 2)), "a.bias": mx.ones((2,))}
    gradients = {name: mx.zeros_like(array) for name, array in parameters.items()}
    new = optimizer.updated(parameters, gradients, 0.1, lambda path: Group(2.0 if path[0] == "b" else 1.0))
    assert new["a.w"][0, 0].item() == pytest.approx(0.95)
    assert new["b.w"][0, 0].item() == pytest.approx(0.9)
    assert new["a.bias"][0].item() == 1


def test_gradients_are_clipped_together_with_those_of_their_group():
    gradients = {"a.x": mx.array([3.0]), "a.y": mx.array([4.0]), "b.x": mx.array([0.5])}
    new = clipped(gradients, 1.0, lambda path: Group(clip_with=path[0]))
    assert [round(new[name].item(), 4) for name in gradients] == [0.6, 0.8, 0.5]


def test_the_schedule_rises_and_falls():
    rates = [cosine(step, steps=10, warm_up=2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_layers_learn_the_slower_the_nearer_to_the_pixels():
    group = layer_wise(3, 0.5)
    paths = ["encoder.patch_embed.proj.weight", "encoder.blocks.0.attn.qkv.weight", "encoder.blocks.2.norm1.weight"]
    assert [group(path).learning_rate for path in [*paths, "encoder.norm.weight", "head.x"]] == [
        1 / 16,
        1 / 8,
        0.5,
        1,
        1,
    ]


def test_a_batch_is_a_function_of_its_number_and_ranks_share_it():
    samples = [Sample(f"{i}", bytes(32), i) for i in range(13)]

    def make(sample, chance):
        return {"target": np.array(sample.target), "chance": chance.random(3)}

    def batch(number, **keywords):
        made = Batches(samples, make, batch_size=4, seed=5, **keywords)
        try:
            return {name: np.array(array) for name, array in made(number).items()}
        finally:
            made.close()

    whole = batch(7)
    halves = [batch(7, rank=rank, ranks=2) for rank in range(2)]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))
    epoch = np.concatenate([batch(number)["target"] for number in range(3, 6)])
    assert len(set(epoch)) == 12
    with pytest.raises(ValueError, match="--batch-size 4 does not divide by 3 ranks"):
        batch(0, ranks=3)


@pytest.mark.slow
def test_fit_that_is_killed_and_resumed_gives_the_same_head_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    digits = write_digits(tmp_path / "digits")
    keywords = {"fine_tune_type": "full", "iters": 6, "batch_size": 4, "steps_per_eval": 2, "drop_path": 0.3}
    fit(digits, CHECKPOINT, tmp_path / "whole", **keywords)
    original = fine_tune.Batches.__call__

    def killed(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(fine_tune.Batches, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(digits, CHECKPOINT, tmp_path / "killed", **keywords)
    assert not (tmp_path / "killed").exists()
    monkeypatch.undo()
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileExistsError, match="holds a run that was stopped: go on with --resume"):
        fit(digits, CHECKPOINT, tmp_path / "killed", **keywords)
    fit(digits, CHECKPOINT, tmp_path / "killed", resume=True, **keywords)
    for file in ("head.safetensors", "encoder.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_fit_says_what_to_do_about_a_loss_that_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    digits = write_digits(tmp_path / "digits")
    monkeypatch.setattr(
        "mlx_aimv2.learn.classify.loss", lambda outputs, targets: outputs["logits"].sum(axis=1) * mx.nan
    )
    with pytest.raises(
        ValueError, match=r"nan at step 1: stopped; the state .* --resume and less than --learning-rate"
    ):
        fit(digits, CHECKPOINT, tmp_path / "head", fine_tune_type="lora", iters=2, batch_size=4)
    assert (tmp_path / "head.training" / "state.safetensors").is_file()
    assert not (tmp_path / "head").exists()


def test_adamw_is_mlxs_with_its_moments_unbiased():
    optimizer = AdamW(weight_decay=0.3)
    other = optim.AdamW(0.1, betas=[0.9, 0.999], weight_decay=0.3, bias_correction=True)
    mine, theirs = ({"w": mx.array([[1.0, -2.0, 0.5]])} for _ in range(2))
    for step in range(5):
        gradients = {"w": mx.random.normal((1, 3), key=mx.random.key(step))}
        mine = optimizer.updated(mine, gradients, 0.1, lambda path: Group())
        theirs = other.apply_gradients(gradients, theirs)
        np.testing.assert_allclose(np.array(mine["w"]), np.array(theirs["w"]), rtol=1e-5, atol=1e-5)
