"""Training on x86 keeps the cores busy without changing its result."""

import contextlib
import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2.backend import x86
from mlx_aimv2.cli import main
from mlx_aimv2.learn import fit
from mlx_aimv2.train.optimizer import Group, clipped
from tests.small_training import CaptionWorkshop, Workshop, arrays, moved, weights, write_captions

SIZES = {"tables": 41, "a": 13, "b": 11, "c": 7, "d": 5, "e": 3}


def tables(seed):
    keys = mx.random.split(mx.random.key(seed), len(SIZES))
    return {name: mx.random.normal((size, 2), key=key) for (name, size), key in zip(SIZES.items(), keys, strict=True)}


def test_arrays_go_to_the_core_that_was_given_least_the_largest_first(three_cores):
    three_cores(blas_threads=1)
    own, taken = x86.streams(), {}
    balance = x86.Balance(tables(1).values())
    for name, x in tables(1).items():
        with balance.stream_for(x):
            taken[name] = own.index(mx.default_stream(mx.cpu))
    assert taken == {"tables": 0, "a": 1, "b": 2, "c": 2, "d": 1, "e": 1}
    backwards = x86.Balance(reversed(tables(1).values()))
    with backwards.stream_for(tables(1)["e"]):
        assert own.index(mx.default_stream(mx.cpu)) == 1, "whatever their order"


def test_a_gpu_is_left_alone(three_cores, monkeypatch):
    three_cores(blas_threads=1)
    monkeypatch.setattr(x86, "on_x86_cpu", lambda: False)
    before = mx.default_stream(mx.default_device())
    with x86.Balance([mx.zeros(3)]).stream_for(mx.zeros(3)):
        assert mx.default_stream(mx.default_device()) == before


def strides(x):
    mx.eval(x)
    return np.array(x, copy=False).strides


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer, self.other = nn.Embedding(7, 5), nn.Linear(5, 3), [nn.Linear(3, 2, bias=False)]

    def __call__(self, ids):
        return self.other[0](self.layer(self.table(ids))).sum()


def flat(tree):
    return dict(tree_flatten(tree))


def test_weights_lie_in_memory_as_their_gradients_do(three_cores):
    three_cores(blas_threads=1)
    model = Small()
    before = flat(model.parameters())
    laid_out = x86.columns_first(model, before)
    assert all(mx.array_equal(x, before[name]) for name, x in laid_out.items())
    moments = x86.columns_first(model, {f"{name}.m": x for name, x in before.items()})
    gradients = flat(mx.grad(lambda p: (model.update(p), model(mx.array([3, 1])))[1])(model.trainable_parameters()))
    for name in ("table.weight", "layer.weight", "other.0.weight"):
        assert strides(laid_out[name]) == strides(moments[f"{name}.m"]) == strides(gradients[name])
    assert strides(laid_out["layer.weight"]) == (4, 12)


def test_elsewhere_weights_stay_as_they_lie(monkeypatch):
    monkeypatch.setattr(x86, "on_x86_cpu", lambda: False)
    model = Small()
    weights = flat(model.parameters())
    assert all(x is weights[name] for name, x in x86.columns_first(model, weights).items())


@pytest.mark.parametrize(("batch", "shards"), [(6, 3), (4, 1), (2, 1)])
def test_each_core_takes_its_images_through_everything_if_they_share_out_evenly(three_cores, batch, shards):
    three_cores(blas_threads=1)
    seen = []

    def work(x, y):
        seen.append(mx.default_stream(mx.cpu) in x86.streams())
        assert not any(seen) or x86.Shards.of((x.shape[0], 300)).streams == [None], "a shard is not cut again"
        return x.sum(axis=(1, 2)), y + 1

    x, y = mx.random.normal((batch, 16, 16)), mx.arange(batch)
    sums, numbers = x86.by_images(work, x, y)
    assert seen == ([True] * shards if shards > 1 else [False])
    assert numbers.tolist() == list(range(1, batch + 1))
    assert mx.allclose(sums, x.sum(axis=(1, 2)), atol=1e-5)


@pytest.mark.parametrize("chunk", [x86.CHUNK, 37])
def test_cross_entropy_and_its_gradient_are_mlxs(monkeypatch, chunk):
    monkeypatch.setattr(x86, "CHUNK", chunk)
    logits = 9 * mx.random.normal((3, 5, 17), key=mx.random.key(4))
    logits[0, 0, 3] = 200.0  # no overflow, and -127 as the power of two
    targets = mx.random.randint(0, 17, (3, 5), key=mx.random.key(5))
    weights = mx.random.normal((3, 5), key=mx.random.key(6))

    def both(function):
        return mx.value_and_grad(lambda x: (weights * function(x, targets)).sum())(logits)

    (value, gradient), (wanted, expected) = both(x86.cross_entropy), both(nn.losses.cross_entropy)
    assert x86.cross_entropy(logits, targets).shape == (3, 5)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert mx.allclose(gradient, expected, atol=1e-6)
    half = x86.cross_entropy(logits.astype(mx.float16), targets)
    assert half.dtype == mx.float32 and bool(mx.isfinite(half).all())


@pytest.mark.parametrize(
    ("before", "is_x86", "within", "after"),
    [
        (x86.MLX_CACHE_LIMIT, True, 4_096_000, x86.CACHE_LIMIT),
        (x86.CACHE_LIMIT, True, 4_096_000, x86.CACHE_LIMIT),
        (x86.MLX_CACHE_LIMIT, False, x86.MLX_CACHE_LIMIT, x86.MLX_CACHE_LIMIT),
        (123, True, 123, 123),
    ],
)
def test_training_keeps_freed_memory_half_of_the_machines_at_most(monkeypatch, before, is_x86, within, after):
    monkeypatch.setattr(x86, "on_x86_cpu", lambda: is_x86)
    monkeypatch.setattr(x86.os, "sysconf", {"SC_PHYS_PAGES": 2000, "SC_PAGE_SIZE": 4096}.__getitem__)
    monkeypatch.setenv("MLX_BFS_MAX_WIDTH", "7")
    limit = mx.set_cache_limit(before)
    try:
        with x86.prepared():
            assert mx.set_cache_limit(before) == within
        assert mx.set_cache_limit(limit) == after
    finally:
        mx.set_cache_limit(limit)


@pytest.mark.parametrize("kind", ["attentive", "lora", "full"])
def test_fit_on_three_cores_gives_what_it_gives_on_this_machine(three_cores, tmp_path, kind):
    shop = Workshop(tmp_path)
    settings = {"iters": 2, "batch_size": 6, "learning_rate": 1e-4}
    alone = shop.head("classify", kind, **settings)
    three_cores(blas_threads=1, MIN_SHARD_TOKENS=1)
    shared = shop.new()
    cache = shop.folder / "cache"
    fit(shop.data["classify"], shop.encoder, shared, fine_tune_type=kind, cache=cache, **settings)
    for file in alone.glob("*.safetensors"):
        went = moved(arrays(file), arrays(shared / file.name))
        assert max(went.values()) < 1e-4, file.name


@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_the_others_on_three_cores_give_what_they_give_on_this_machine(three_cores, tmp_path, verb):
    shop = CaptionWorkshop(tmp_path)
    alone = shop.weights(verb, "--batch-size", 6)
    three_cores(blas_threads=1, MIN_SHARD_TOKENS=1)
    shared = shop.new()
    assert main([*shop.words(verb, "--batch-size", 6), "-o", str(shared)]) == 0
    assert max(moved(alone, weights(shared)).values()) < 1e-4


@pytest.mark.parametrize(("given", "wanted"), [(None, str(x86.SIGHT)), ("7", "7")])
def test_the_users_own_width_of_sight_stays(three_cores, monkeypatch, given, wanted):
    three_cores(blas_threads=1)
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: x86.MLX_CACHE_LIMIT)
    monkeypatch.delenv("MLX_BFS_MAX_WIDTH", raising=False)
    if given is not None:
        monkeypatch.setenv("MLX_BFS_MAX_WIDTH", given)
    with x86.prepared():
        pass
    assert os.environ["MLX_BFS_MAX_WIDTH"] == wanted


CALLS = {
    "fit": ("fit('nowhere', 'nowhere', 'out')", x86.SIGHT),
    "pretrain": ("main(['pretrain', 'data', '-o', 'out'])", x86.WIDE_SIGHT),
    "lit": ("main(['lit', 'nowhere', '--encoder', 'nowhere', '-o', 'out'])", x86.WIDE_SIGHT),
}
"""Trainings that end at once in a user's mistake."""


@pytest.mark.parametrize("name", CALLS)
def test_trainings_look_wide_before_anything_is_computed(name, tmp_path):
    code = f"""
import contextlib, os
from mlx_aimv2.backend import x86
from mlx_aimv2.cli import main
from mlx_aimv2.learn import fit
x86.on_x86_cpu = lambda: True
with contextlib.suppress(OSError):
    {CALLS[name][0]}
print(os.environ.get("MLX_BFS_MAX_WIDTH"))
"""
    write_captions(tmp_path / "data")  # fewer than a batch
    environment = {name: value for name, value in os.environ.items() if name != "MLX_BFS_MAX_WIDTH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(CALLS[name][1])]


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_mac_memory_is_wired_while_a_training_runs(monkeypatch, fails):
    limits = [7]
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 4096})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: limits.append(limit) or limits[-2])
    with contextlib.suppress(ZeroDivisionError), x86.prepared():
        assert limits[-1] == 4096
        if fails:
            raise ZeroDivisionError
    assert limits[-1] == 7


def test_gradients_are_cut_to_one_length_together(three_cores):
    gradients, groups = {name: 3 * x for name, x in tables(1).items()}, {name: Group() for name in SIZES}
    wanted, length = optim.clip_grad_norm(gradients, 1.0)
    assert length.item() > 1
    three_cores(blas_threads=1)
    found = clipped(gradients, 1.0, groups)
    rtol = 100 * np.finfo(np.float32).eps
    assert all(bool(mx.allclose(found[name], wanted[name], rtol=rtol)) for name in SIZES)
    short = {name: 1e-3 * x for name, x in gradients.items()}
    assert all(mx.array_equal(clipped(short, 1.0, groups)[name], short[name]) for name in SIZES)
