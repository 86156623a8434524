"""A compiled training step, as a GPU's is: equal to the eager one to the bit, and few kernels."""

import io
import re
import shutil
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2 import backend, layers
from mlx_aimv2.backend import x86
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.learn import lora
from mlx_aimv2.learn.classify.head import MeanHead
from mlx_aimv2.learn.learner import Learner
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.train.loop import LossError, Plan, Step

VIEWS = {"Broadcast", "Reshape", "Squeeze", "ExpandDims", "Transpose"}
"""Operations that launch nothing."""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for a CPU by g++")


@pytest.fixture
def set_compiled(monkeypatch):
    """A function that sets whether steps are compiled; blocks run as on a GPU."""

    def become(is_compiled):
        monkeypatch.setattr(backend, "compiles", lambda: is_compiled)

    monkeypatch.setattr(x86, "on_x86_cpu", lambda: False)
    return become


def trained(kind="full", *, checkpoint=False, dropout=0.0, accumulate=1, drop_path=0.0, steps=5):
    """Losses of the steps, and all weights and moments after them."""
    mx.random.seed(3)
    encoder = Aimv2VisionModel(Aimv2VisionConfig(22, 13, 1, 2, image_size=42))
    if kind != "full":
        lora.add_adapters(encoder, kind, num_layers=1, rank=2, dropout=dropout)
    model = Learner(encoder, MeanHead(22, 3))

    def batch(number):
        pixels = np.random.default_rng(number % 3).normal(size=(4, 42, 42, 3)).astype(np.float32)
        return {"pixels": mx.array(pixels), "label": mx.array([0, 1, 2, 1])}, number

    def losses(model, batch, key):
        outputs = model(batch["pixels"], checkpoint=checkpoint, drop_path=drop_path, key=key)
        return {"loss": nn.losses.cross_entropy(outputs["logits"], batch["label"], reduction="mean")}

    plan = Plan(steps=steps, learning_rate=1e-3, weight_decay=0.05, clip=1.0, accumulate=accumulate)
    step = Step(model, losses, plan)
    told = [step(number, batch)[0]["loss"] for number in range(steps)]
    return told, dict(tree_flatten(model.parameters())) | step.optimizer.moments


RUNS = {
    "plain": {},
    "checkpointed": {"checkpoint": True},
    "accumulated": {"accumulate": 2},
    "dropout": {"kind": "lora", "dropout": 0.5},
    "dora": {"kind": "dora"},
    "many tokens": {"checkpoint": True},
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_five_compiled_steps_equal_five_others_to_the_bit(set_compiled, monkeypatch, name):
    if name == "many tokens":
        monkeypatch.setattr(layers, "LONG", 5)
    set_compiled(False)
    losses, weights = trained(**RUNS[name])
    set_compiled(True)
    found, others = trained(**RUNS[name])
    assert found == losses
    assert len(set(losses)) == len(losses)
    assert weights.keys() == others.keys()
    assert [path for path, x in weights.items() if not mx.array_equal(x, others[path])] == []


def launches(arrays) -> Counter:
    """The operations behind arrays that launch a kernel, by name."""
    dot = io.StringIO()
    mx.export_to_dot(dot, arrays)
    names = Counter(re.findall(r'label ="(\w+)"[^\]]*rectangle', dot.getvalue()))
    return Counter({name: count for name, count in names.items() if name not in VIEWS})


def updated(*, clip: bool) -> Counter:
    """The launches of AdamW over the tensors of large."""
    model = Aimv2VisionModel(Aimv2VisionConfig(4, 3, 24, 2, image_size=14))
    step = Step(model, lambda *_: {}, Plan(steps=5, learning_rate=1e-3, weight_decay=0.05))
    gradients = {name: mx.ones_like(x) for name, x in tree_flatten(model.trainable_parameters())}
    mx.eval(gradients, step.optimizer.moments)
    assert len(gradients) == 173
    state = [model, [part.state for part, _ in step.optimizer.parts]]
    alone = backend.compiled(lambda gradients: step.optimizer.update(model, gradients), state)
    (step._update if clip else alone)(gradients)
    return launches([x for _, x in tree_flatten(model.parameters())])


def test_the_compiled_update_is_one_kernel_for_a_tensor_and_two_for_the_norm(set_compiled):
    set_compiled(False)
    eager = updated(clip=True)
    set_compiled(True)
    adamw, with_norm = updated(clip=False), updated(clip=True)
    scalars = 2 * 5  # rate, step and corrections, of what is decayed and of what is not
    assert max(adamw.values()) == 173
    assert adamw.total() == 173 + scalars
    assert with_norm["Square"] == 173
    assert with_norm.total() == 3 * 173 + scalars + 3 <= 536
    assert eager.total() > 5 * with_norm.total()


def test_a_function_is_compiled_for_so_many_shapes_and_computed_for_others(set_compiled, monkeypatch):
    set_compiled(True)
    traced, counts = [], mx.zeros(())

    def compile_(function, **_):
        return lambda *x: (traced.append(x[0].shape), function(*x))[1]

    monkeypatch.setattr(mx, "compile", compile_)
    monkeypatch.setattr(backend, "MAX_TRACES", 3)
    function = backend.compiled(lambda x, other: x.sum(), [counts])
    for size in (1, 2, 1, 3, 4, 5, 2):
        assert function(mx.ones(size), None).item() == size
    assert traced == [(1,), (2,), (1,), (3,), (2,)]


@needs_compiler
@pytest.mark.slow
def test_a_loss_that_is_no_number_leaves_the_weights_of_a_compiled_step(set_compiled):
    set_compiled(True)
    model = nn.Linear(2, 1)
    before = np.array(model.weight)
    step = Step(model, lambda model, x, key: {"loss": model(x).sum()}, Plan(1, 0.1, 0.0))
    with pytest.raises(LossError, match="the loss is nan at step 1"):
        step(0, lambda number: (mx.array([[1.0, float("nan")]]), 1))
    assert np.array_equal(np.array(model.weight), before)
    step(0, lambda number: (mx.array([[1.0, 2.0]]), 1))
    assert not np.array_equal(np.array(model.weight), before)
