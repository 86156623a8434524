"""Attention and SwiGLU, as `layers` and as `x86` compute them, against float64."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import layers
from mlx_aimv2.backend import x86
from tests.exact import EPS, roundings

pytestmark = pytest.mark.rounding

B, H, N, D, INNER = 2, 3, 7, 5, 11
NEAR = 32 * EPS
"""Ten times float32's own error here, on several kernels of OpenBLAS."""


@pytest.fixture(params=[layers, x86], ids=["layers", "x86"])
def ops(request):
    return request.param


@pytest.fixture(
    params=[(1, 4), (29, 4), (150, 4), (1 << 20, 4), (29, 1), (1 << 20, 1)],
    ids=["rows", "queries", "heads", "cores", "queries on one core", "whole"],
)
def chunks(request, three_cores):
    """How the work is cut: by rows, some queries of a head, some heads at a time, a chunk for each core, not at all."""
    three_cores(blas_threads=request.param[1], CHUNK=request.param[0], MIN_SHARED=1)


def normal(*shape: int, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(scale=spread, size=shape)


def exact_attention(q, k, v, causal=False):
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(q.shape[-2], k.shape[-2], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def exact_swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def single(*arrays: np.ndarray) -> list[mx.array]:
    return [mx.array(array.astype(np.float32)) for array in arrays]


def far(found: mx.array, exact: np.ndarray) -> float:
    """The largest difference as a share of the largest value."""
    return EPS * roundings(found.astype(mx.float32), exact)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_softmax_of_scaled_products(ops, causal):
    q, k, v = (normal(B, H, N, D + i, spread=3)[..., :D] for i in range(3))
    found = ops.attention(*single(q, k, v), causal=causal)
    assert found.shape == (B, H, N, D)
    assert far(found, exact_attention(q, k, v, causal)) <= NEAR


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_chunks_is_attention(chunks, causal):
    q, k, v = (normal(B, H, N, D + i, spread=3)[..., :D] for i in range(3))
    assert far(x86.attention(*single(q, k, v), causal=causal), exact_attention(q, k, v, causal)) <= NEAR


def test_fewer_queries_than_keys_attend_to_all(chunks):
    q, k, v = normal(B, H, 4, D), normal(B, H, N, D), normal(B, H, N, D + 1)[..., :D]
    assert far(x86.attention(*single(q, k, v)), exact_attention(q, k, v)) <= NEAR


@pytest.mark.parametrize("level", [-3e7, -5e5, 5e5, 3e7])
def test_scores_far_from_zero_are_weighed_by_their_differences(level):
    q, k, v = np.ones((1, 1, 1, 1)), np.array([0.0, 8.0, 16.0]).reshape(1, 1, 3, 1) + level, normal(1, 1, 3, 1)
    assert far(x86.attention(*single(q, k, v)), exact_attention(q, k, v)) <= 1e-2  # float32 holds such scores to 1


@pytest.mark.parametrize("level", [-2e7, 1.2e7, 2e7, 1e9])
def test_scores_far_from_zero_and_from_each_other_leave_the_largest(level):
    k, v = np.array([0.0, -400.0, -200.0]).reshape(1, 1, 3, 1) + level, normal(1, 1, 3, 1)
    assert far(x86.attention(*single(np.ones((1, 1, 1, 1)), k, v)), v[:, :, :1]) <= NEAR


@pytest.mark.parametrize("part", ["queries", "keys", "values", "gate", "up"])
def test_what_is_not_a_number_stays_so(ops, part):
    inputs = dict(zip(("queries", "keys", "values"), single(*(normal(1, 1, N, D) for _ in range(3))), strict=True))
    gates = dict(zip(("gate", "up"), single(normal(1, N, D), normal(1, N, D)), strict=True))
    for given in (inputs, gates):
        if part in given:
            given[part] = mx.where(mx.arange(N)[:, None] == 2, float("nan"), given[part])
    found = ops.attention(**inputs) if part in inputs else ops.swiglu(**gates)
    assert np.isnan(np.array(found)).any()


def test_one_query_attends_to_all_tokens(ops):
    q, k, v = normal(B, H, 1, D), normal(B, H, N, D), normal(B, H, N, D + 1)[..., :D]
    found = ops.attention(*single(q, k, v))
    assert found.shape == (B, H, 1, D)
    assert far(found, exact_attention(q, k, v)) <= NEAR


def test_attention_takes_views_of_one_matrix(ops):
    joint = normal(B, N, 3, H, D)
    q, k, v = joint.transpose(2, 0, 3, 1, 4)
    views = mx.array(joint.astype(np.float32)).transpose(2, 0, 3, 1, 4)
    assert far(ops.attention(*views), exact_attention(q, k, v)) <= NEAR


def test_scores_beyond_the_range_of_exp_are_no_trouble(ops):
    q, k, v = normal(B, H, N, D, spread=100), normal(B, H, N, D, spread=99), normal(B, H, N, D)
    assert far(ops.attention(*single(q, k, v)), exact_attention(q, k, v)) <= 1e-4


def test_swiglu_is_the_silu_of_one_times_the_other(ops):
    gate, up = normal(B, N, INNER, spread=4), normal(B, N, INNER + 1)[..., :INNER]
    assert far(ops.swiglu(*single(gate, up)), exact_swiglu(gate, up)) <= NEAR


def test_swiglu_in_chunks_is_swiglu(chunks):
    gate, up = normal(B, N, INNER, spread=4), normal(B, N, INNER + 1)[..., :INNER]
    found = x86.swiglu(*single(gate, up))
    assert found.shape == (B, N, INNER)
    assert far(found, exact_swiglu(gate, up)) <= NEAR


def test_powers_of_two_are_right_to_their_last_digits():
    x = np.random.default_rng(0).uniform(-126, 127, 100_003).astype(np.float32)
    assert np.abs(np.array(x86.exp2(mx.array(x))) / 2.0 ** x.astype(np.float64) - 1).max() <= 4 * EPS


def test_gates_far_from_zero_stay_finite(ops):
    gate, up = single(np.array([[[-200.0, -89.0, 0.0, 89.0, 200.0]]]), np.ones((1, 1, 5)))
    assert np.allclose(np.array(ops.swiglu(gate, up)), [0, 0, 0, 89, 200], atol=1e-30)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_in_is_half_out_rounded_once(dtype):
    halves = [mx.array(normal(B, H, N, D + i).astype(np.float32)).astype(dtype)[..., :D] for i in range(3)]
    q, k, v = (np.array(half.astype(mx.float32)) for half in halves)
    digit = mx.finfo(dtype).eps / 2
    found, product = x86.attention(*halves), x86.swiglu(*halves[:2])
    assert found.dtype == product.dtype == dtype
    assert far(found, exact_attention(q, k, v)) <= 1.01 * digit
    assert far(product, exact_swiglu(q, k)) <= 1.01 * digit


def test_half_products_beyond_the_range_of_half_are_not_lost_on_the_way():
    gate, up = mx.array([[-8.0]], mx.float16), mx.array([[20000.0]], mx.float16)  # their product overflows float16
    assert far(x86.swiglu(gate, up), exact_swiglu(np.array([[-8.0]]), np.array([[20000.0]]))) <= 1e-3


def test_every_thread_may_use_them(chunks):
    q, k, v = (normal(B, H, N, D + i)[..., :D] for i in range(3))
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: np.array(x86.attention(*single(q, k, v))), range(4)):
            assert far(mx.array(found), exact_attention(q, k, v)) <= NEAR


def slope(function, x):
    return np.array(mx.grad(lambda x: (function(x) ** 2).sum())(x))


def check_derivatives(ops):
    q, k, v, gate, up = single(*(normal(B, H, N, D + i)[..., :D] for i in range(5)))
    softmax = lambda q, k, v: mx.softmax(q @ k.swapaxes(-1, -2) / D**0.5, axis=-1) @ v  # noqa: E731
    for place, x in enumerate((q, k, v)):
        others = [array for array in (q, k, v) if array is not x]
        found, wanted = (
            slope(lambda x, f=f, place=place, others=others: f(*others[:place], x, *others[place:]), x)
            for f in (ops.attention, softmax)
        )
        assert far(mx.array(found), wanted) <= 4 * NEAR
    found, wanted = slope(lambda x: ops.swiglu(x, up), gate), slope(lambda x: x * mx.sigmoid(x) * up, gate)
    assert far(mx.array(found), wanted) <= 4 * NEAR


def test_they_have_their_derivatives(ops):
    check_derivatives(ops)


def test_chunks_have_their_derivatives(chunks):
    check_derivatives(x86)


def test_forward_derivatives_of_one_chunk():
    gate, up = single(normal(N, D), normal(N, D + 1)[:, :D])
    (found,), (wanted,) = (
        mx.jvp(lambda x, f=f: f(x, up), [gate], [mx.ones_like(gate)])[1]
        for f in (x86.swiglu, lambda x, y: x * mx.sigmoid(x) * y)
    )
    assert far(found, wanted) <= 4 * NEAR


def test_no_images_give_no_features(ops):
    nothing = mx.zeros((0, H, N, D))
    assert ops.attention(nothing, nothing, nothing).shape == (0, H, N, D)
    assert ops.swiglu(nothing[0:0, 0], nothing[0:0, 0]).shape == (0, N, D)


def test_compiling_them_changes_nothing(ops, monkeypatch):
    q, k, v = single(*(normal(B, H, N, D + i)[..., :D] for i in range(3)))
    assert far(mx.compile(ops.attention)(q, k, v), ops.attention(q, k, v)) <= NEAR


@pytest.mark.parametrize("place", [0, 1], ids=["gate", "up"])
def test_in_training_swiglu_has_its_derivatives_by_hand(place):
    both = single(normal(B, N, INNER, spread=4), normal(B, N, INNER + 1)[..., :INNER])
    found, wanted = (
        mx.grad(lambda gate, up, f=f: (f(gate, up) ** 2).sum(), argnums=place)(*both)
        for f in (lambda gate, up: x86.swiglu(gate, up, training=True), lambda gate, up: gate * mx.sigmoid(gate) * up)
    )
    assert far(found, wanted) <= NEAR
