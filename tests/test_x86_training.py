"""Training on x86 keeps the cores busy without changing its result."""

import os
import subprocess
import sys

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_aimv2 import x86
from mlx_aimv2.learn.optimizer import AdamW, Group
from mlx_aimv2.pretrain import optimise

SIZES = {"tables": 41, "a": 13, "b": 11, "c": 7, "d": 5, "e": 3}


def arrays(seed):
    keys = mx.random.split(mx.random.key(seed), len(SIZES))
    return {name: mx.random.normal((size, 2), key=key) for (name, size), key in zip(SIZES.items(), keys, strict=True)}


def test_no_shard_waits_for_what_the_default_stream_adds_up(three_cores):
    three_cores(blas_threads=1)
    own = x86.streams()
    assert len(own) == 3
    assert mx.default_stream(mx.cpu) not in own


def test_parameters_go_to_the_core_that_was_given_least(three_cores):
    three_cores(blas_threads=1)
    balance, own = x86.Balance(), x86.streams()
    taken = []
    for x in arrays(1).values():
        with balance.stream_for(x):
            taken.append(own.index(mx.default_stream(mx.cpu)))
    assert taken == [0, 1, 2, 2, 1, 1]


def test_a_gpu_is_left_alone(three_cores, monkeypatch):
    three_cores(blas_threads=1)
    monkeypatch.setattr(x86, "on_x86_cpu", lambda: False)
    before = mx.default_stream(mx.default_device())
    with x86.Balance().stream_for(mx.zeros(3)):
        assert mx.default_stream(mx.default_device()) == before


def test_adamw_on_several_cores_is_mlxs(three_cores):
    wanted, parameters = optim.AdamW(1e-2, betas=list(optimise.BETAS), bias_correction=True), arrays(1)
    expected = parameters
    three_cores(blas_threads=1)
    own = optimise.AdamW(1e-2, betas=list(optimise.BETAS), bias_correction=True)
    for step in range(3):
        gradient = arrays(10 + step)
        expected = wanted.apply_gradients(gradient, expected)
        parameters = own.apply_gradients(gradient, parameters)
    assert all(mx.array_equal(parameters[name], expected[name]) for name in SIZES)


def test_fine_tunings_adamw_is_the_same_on_several_cores(three_cores):
    def after_three_steps():
        optimizer, parameters = AdamW(weight_decay=0.1), arrays(1)
        for step in range(3):
            parameters = optimizer.updated(parameters, arrays(10 + step), 1e-2, lambda path: Group())
        return parameters

    alone = after_three_steps()
    mx.eval(alone)
    three_cores(blas_threads=1)
    assert all(mx.array_equal(found, alone[name]) for name, found in after_three_steps().items())


def test_gradients_are_cut_to_one_length_together(three_cores):
    gradient = {name: 3 * x for name, x in arrays(1).items()}
    wanted, length = optim.clip_grad_norm(gradient, optimise.MAX_NORM)
    assert length.item() > optimise.MAX_NORM
    three_cores(blas_threads=1)
    found = optimise.clipped(gradient)
    assert all(bool(mx.allclose(found[name], wanted[name], rtol=1e-6)) for name in SIZES)
    short = {name: 1e-3 * x for name, x in gradient.items()}
    assert all(mx.array_equal(optimise.clipped(short)[name], short[name]) for name in SIZES)


@pytest.mark.parametrize(("given", "wanted"), [(None, str(x86.SIGHT)), ("7", "7")])
def test_the_users_own_width_of_sight_stays(three_cores, monkeypatch, given, wanted):
    three_cores(blas_threads=1)
    monkeypatch.delenv("MLX_BFS_MAX_WIDTH", raising=False)
    if given is not None:
        monkeypatch.setenv("MLX_BFS_MAX_WIDTH", given)
    x86.widen_sight()
    assert os.environ["MLX_BFS_MAX_WIDTH"] == wanted


CALLS = {
    "fit": "fit('nowhere', 'nowhere', 'out')",
    "pretrain": "pretrain([], '.', settings=None)",
    "lit": "cli.main(['lit', 'nowhere', '--encoder', 'nowhere', '-o', 'out'])",
}
"""Trainings that end at once in a user's mistake."""


@pytest.mark.parametrize("name", CALLS)
def test_trainings_look_wide_before_anything_is_computed(name, tmp_path):
    code = f"""
import contextlib, os
from mlx_aimv2 import cli, x86
from mlx_aimv2.learn import fit
from mlx_aimv2.pretrain.train import pretrain
x86.on_x86_cpu = lambda: True
with contextlib.suppress(OSError):
    {CALLS[name]}
print(os.environ.get("MLX_BFS_MAX_WIDTH"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "MLX_BFS_MAX_WIDTH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(x86.SIGHT)]
