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

PARAMETERS = {
    "large": ((1024, 2816, 8), {224: 309_197_824, 336: 309_525_504, 448: 309_984_256, None: 308_935_680}),
    "huge": ((1536, 4096, 12), {224: 680_851_968, 336: 681_343_488, 448: 682_031_616}),
    "1B": ((2048, 5632, 16), {224: 1_234_958_336, 336: 1_235_613_696, 448: 1_236_531_200}),
    "3B": ((3072, 8192, 24), {224: 2_720_658_432, 336: 2_721_641_472, 448: 2_723_017_728}),
}


def randomised(config: Aimv2VisionConfig) -> Aimv2VisionModel:
    mx.random.seed(7)
    model = Aimv2VisionModel(config)
    model.load_weights([(name, mx.random.normal(p.shape) * 0.3) for name, p in tree_flatten(model.parameters())])
    return model


def pixels(height: int, width: int, count: int = 2) -> mx.array:
    return mx.random.normal((count, height, width, 3), key=mx.random.key(height + width))


@pytest.mark.parametrize(
    ("sizes", "image_size", "count"),
    [(sizes, size, count) for sizes, counts in PARAMETERS.values() for size, count in counts.items()],
)
def test_parameter_counts_are_those_of_the_released_checkpoints(sizes, image_size, count):
    config = Aimv2VisionConfig(sizes[0], sizes[1], 24, sizes[2], image_size=image_size, is_native=image_size is None)
    parameters = tree_flatten(Aimv2VisionModel(config).parameters())
    assert sum(array.size for _, array in parameters) == count


def test_shapes():
    output = randomised(FIXED)(pixels(42, 42), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 9, 60)
    assert [state.shape for state in output.hidden_states] == [(2, 9, 60)] * 4
    assert output.pooler_output is None


def test_hidden_states_are_given_only_when_asked_for():
    assert randomised(FIXED)(pixels(42, 42)).hidden_states is None


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


def test_an_image_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"42 x 42.*28 x 56"):
        randomised(FIXED)(pixels(28, 56))


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"13 x 56.*one patch of 14 x 14"):
        randomised(NATIVE)(pixels(13, 56))


def test_channels_first_is_refused():
    with pytest.raises(ValueError, match=r"\(images, height, width, 3\), got \(2, 3, 42, 42\)"):
        randomised(FIXED)(pixels(42, 42).transpose(0, 3, 1, 2))


def test_a_vision_model_asked_for_text_names_the_checkpoint_that_has_it():
    with pytest.raises(ValueError, match="apple/aimv2-large-patch14-224-lit"):
        randomised(FIXED).encode_text(mx.array([[1]]))


def test_the_mean_of_large_features_in_half_precision_does_not_overflow_on_the_way():
    model = randomised(NATIVE)
    model.norm.weight = mx.full(60, 3000.0)
    model.set_dtype(mx.float16)
    image = pixels(14 * 17, 14 * 19)
    mean = np.array(model(image).last_hidden_state).astype(np.float64).mean(axis=1)
    found = np.array(model.encode_image(image))
    assert found.dtype == np.float16
    assert np.abs(found - mean).max() <= 2.0**-11 * np.abs(mean).max()
