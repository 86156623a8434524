"""Attention for training on many tokens: the gradients of attention, with no scores kept for them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2 import layers, long_attention
from mlx_aimv2.backend import run_blocks, x86
from mlx_aimv2.pretrain.objective import prefix_mask
from tests.exact import EPS

B, H, N, D = 2, 3, 37, 8
NEAR = 16 * EPS
"""As a share of the largest of each tensor: less than 2e-6."""


@pytest.fixture(params=["plain", "one thread", "threads"])
def machine(request, three_cores, monkeypatch):
    """A GPU's way, or an x86 CPU's with a BLAS of one thread or of several; chunks of five queries."""
    if request.param == "plain":
        monkeypatch.setattr(x86, "on_x86_cpu", lambda: False)
    else:
        three_cores(blas_threads=1 if request.param == "one thread" else 3, MIN_SHARD_TOKENS=1)
    for module in (layers, x86):
        monkeypatch.setattr(module, "LONG", 11)
    monkeypatch.setattr(long_attention, "CHUNK", 5 * N)
    return request.param


def normal(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def exact(q, k, v, slope, allowed):
    """The gradients of `(attention * slope).sum()` in float64."""
    q, k, v, slope = (np.array(x, np.float64) for x in (q, k, v, slope))
    scores = np.where(allowed, q @ k.swapaxes(-1, -2) / np.sqrt(D), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = slope @ v.swapaxes(-1, -2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) / np.sqrt(D)
    return of_scores @ k, of_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ slope


MASKS = {
    "all": lambda: ({}, np.ones((N, N), bool)),
    "causal": lambda: ({"causal": True}, np.tri(N, dtype=bool)),
    "prefix": lambda: (
        {"mask": prefix_mask(mx.array([4, 23]), N)},
        np.array(prefix_mask(mx.array([4, 23]), N))[:, None],
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_its_gradients_are_those_of_attention(machine, kind):
    options, allowed = MASKS[kind]()
    q, k, v, slope = (normal(B, N, H, D, seed=seed).transpose(0, 2, 1, 3) for seed in range(4))
    attend = x86.trained_attention if machine != "plain" else long_attention.long_attention
    found = mx.grad(lambda *x: (attend(*x, **options) * slope).sum(), argnums=(0, 1, 2))(q, k, v)
    assert mx.allclose(attend(q, k, v, **options), layers.attention(q, k, v, **options), atol=NEAR)
    for one, wanted in zip(found, exact(q, k, v, slope, allowed), strict=True):
        assert np.abs(np.array(one, np.float64) - wanted).max() <= NEAR * np.abs(wanted).max()


def slopes(block, x, options, *, checkpoint=False):
    """The gradients of a block's weights and input."""

    def value(weights, x):
        block.update(weights)
        run = lambda x: next(run_blocks([block], x, **options))  # noqa: E731
        return (nn.utils.checkpoint(block, run) if checkpoint else run)(x).square().sum()

    weights = block.trainable_parameters()
    found = dict(tree_flatten(list(mx.grad(value, argnums=(0, 1))(weights, x))))
    block.update(weights)
    return found


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_a_block_learns_from_many_tokens_as_from_few(machine, kind, checkpoint, monkeypatch):
    options, _ = MASKS[kind]()
    mx.random.seed(7)
    block, x = layers.Block(H * D, 29, H, 1e-5), normal(B, N, H * D, seed=9)
    called = []
    original = long_attention.long_attention
    for module in (layers, x86):
        monkeypatch.setattr(
            module, "long_attention", lambda *x, **more: (called.append(len(x)), original(*x, **more))[1]
        )
    long = slopes(block, x, options, checkpoint=checkpoint)
    assert called
    for module in (layers, x86):
        monkeypatch.setattr(module, "LONG", N + 1)
    called.clear()
    short = slopes(block, x, options, checkpoint=checkpoint)
    assert not called and long.keys() == short.keys()
    for name, wanted in short.items():
        assert mx.abs(long[name] - wanted).max() <= 4 * NEAR * mx.abs(wanted).max(), name


def test_no_scores_are_kept(monkeypatch):
    monkeypatch.setattr(long_attention, "CHUNK", 16 * 1024)
    q, k, v = (normal(1, 4, 1024, D, seed=seed) for seed in range(3))

    def peak(attention):
        mx.eval(q, k, v)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(lambda *x: attention(*x).sum(), argnums=(0, 1, 2))(q, k, v))
        return mx.get_peak_memory() - before

    assert peak(long_attention.long_attention) < peak(layers.attention) / 8


def test_half_precision_stays_so(machine):
    q, k, v = (normal(B, H, N, D, seed=seed).astype(mx.float16) for seed in range(3))
    found = mx.grad(lambda *x: long_attention.long_attention(*x).sum(), argnums=(0, 1, 2))(q, k, v)
    wanted = mx.grad(lambda *x: layers.attention(*x).sum(), argnums=(0, 1, 2))(q, k, v)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == mx.float16
        assert mx.allclose(one, other, atol=16 * 2**-11)


@pytest.mark.parametrize(("size", "is_forced"), [(128, True), (7, False)])
def test_metal_is_forced_to_take_its_kernel_where_it_has_one(monkeypatch, size, is_forced):
    taken = []
    plain = mx.fast.scaled_dot_product_attention

    def attend(*x, force_fused=False, **more):
        taken.append(force_fused)
        return plain(*x, **more)

    gpu = type("Device", (), {"type": mx.DeviceType.gpu})()
    q = normal(1, 1, 12, size, seed=1)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    long_attention._attend(q, q, q, causal=False, mask=None)
    assert taken == [is_forced]
