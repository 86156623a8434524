"""The vision model does what its docstrings say, on sizes that are different primes or near them."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel
from mlx_aimv2.layers import sincos_positions
from tests.exact import NEAR, roundings

pytestmark = pytest.mark.rounding

FIXED = Aimv2VisionConfig(60, 77, 3, 5, image_size=42)
NATIVE = Aimv2VisionConfig(60, 77, 3, 5, is_native=True)


def randomised(config: Aimv2VisionConfig) -> Aimv2VisionModel:
    mx.random.seed(7)
    model = Aimv2VisionModel(config)
    model.load_weights([(name, mx.random.normal(p.shape) * 0.3) for name, p in tree_flatten(model.parameters())])
    return model


def pixels(height: int, width: int, count: int = 2) -> mx.array:
    return mx.random.normal((count, height, width, 3), key=mx.random.key(height + width))


def test_shapes():
    output = randomised(FIXED)(pixels(42, 42), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 9, 60)
    assert [state.shape for state in output.hidden_states] == [(2, 9, 60)] * 4
    assert output.pooler_output is None
    assert randomised(FIXED)(pixels(42, 42)).hidden_states is None  # given only when asked for


def test_patches_run_along_rows():
    model = randomised(NATIVE)
    image = np.array(pixels(42, 28, 1))
    changed = image.copy()
    changed[:, 14:28, 0:14] += 1  # second row, first column: the third patch of two columns
    difference = np.abs(np.array(model.patch_embed(mx.array(image)) - model.patch_embed(mx.array(changed))))
    assert list(np.flatnonzero(difference.max(axis=(0, 2)))) == [2]


def test_the_patch_embedding_equals_a_convolution():
    embed = randomised(NATIVE).patch_embed
    image = pixels(42, 28)
    convolved = embed.norm(embed.proj(image).reshape(2, 6, 60))
    assert roundings(embed(image), convolved) <= NEAR


def test_a_native_model_drops_what_does_not_fill_a_patch():
    model = randomised(NATIVE)
    image = pixels(55, 41)
    assert mx.array_equal(model(image).last_hidden_state, model(image[:, :42, :28]).last_hidden_state)


def test_native_positions_code_the_column_first_as_sines_then_cosines():
    table = sincos_positions(3, 5, 8)
    row, column = 2, 4
    slow = 10000**-0.5
    wanted = [np.sin(column), np.sin(column * slow), np.cos(column), np.cos(column * slow)]
    wanted += [np.sin(row), np.sin(row * slow), np.cos(row), np.cos(row * slow)]
    assert np.allclose(table[row * 5 + column], wanted, atol=1e-6)
    assert table.dtype == np.float32


def test_encode_image_is_the_mean_over_the_tokens():
    model = randomised(FIXED)
    mean = model(pixels(42, 42)).last_hidden_state.mean(axis=1)
    assert roundings(model.encode_image(pixels(42, 42)), mean) <= NEAR
    assert roundings(mx.linalg.norm(model.encode_image(pixels(42, 42), normalize=True), axis=1), mx.ones(2)) <= NEAR


def test_an_image_alone_gives_what_it_gives_in_a_batch():
    model = randomised(FIXED)
    batch = model.encode_image(pixels(42, 42, 5))
    alone = mx.concatenate([model.encode_image(pixels(42, 42, 5)[i : i + 1]) for i in range(5)])
    assert roundings(batch, alone) <= NEAR


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (FIXED, pixels(28, 56), r"42 x 42.*28 x 56"),
        (NATIVE, pixels(13, 56), r"13 x 56.*one patch of 14 x 14"),
        (FIXED, pixels(42, 42).transpose(0, 3, 1, 2), r"\(images, height, width, 3\), got \(2, 3, 42, 42\)"),
    ],
    ids=["another size", "smaller than a patch", "channels first"],
)
def test_pixels_that_do_not_fit_are_refused_with_what_would(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        randomised(config)(wrong)


def test_the_mean_of_large_features_in_half_precision_does_not_overflow_on_the_way():
    model = randomised(NATIVE)
    model.norm.weight = mx.full(60, 3000.0)
    model.set_dtype(mx.float16)
    image = pixels(14 * 17, 14 * 19)
    mean = np.array(model(image).last_hidden_state).astype(np.float64).mean(axis=1)
    found = np.array(model.encode_image(image))
    assert found.dtype == np.float16
    assert np.abs(found - mean).max() <= 2.0**-11 * np.abs(mean).max()
