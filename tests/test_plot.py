"""Maps of features show what the features say: components, cosines, places."""

import numpy as np
import pytest

from mlx_aimv2 import plot

ROWS, COLUMNS, WIDTH = 3, 5, 7


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS * COLUMNS, WIDTH))


@pytest.mark.parametrize("shape", [(13, 5), (5, 13)], ids=["tall", "wide"])
def test_components_are_those_of_the_singular_values(shape):
    features = np.random.default_rng(1).normal(size=shape)
    left, spread, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(
        np.abs(plot.principal_components(features, 3)), np.abs(left[:, :3] * spread[:3]), atol=1e-9
    )


def test_the_sign_of_a_component_does_not_depend_on_the_order_of_tokens():
    features = tokens()
    np.testing.assert_allclose(
        plot.principal_components(features[::-1], 3)[::-1], plot.principal_components(features, 3), atol=1e-9
    )


def test_components_have_a_fixed_sign_and_those_that_do_not_exist_are_zero():
    line = np.outer(np.arange(5.0), [1, -8, 4])  # turned round, because its largest weight is negative
    coordinates = plot.principal_components(line, 3)
    np.testing.assert_allclose(coordinates, np.outer(np.arange(5) - 2, [-9, 0, 0]), atol=1e-9)
    assert not plot.principal_components(np.ones((4, 3)), 2).any()


def test_each_token_is_one_square_in_reading_order():
    features = np.zeros((ROWS * COLUMNS, WIDTH))
    features[1 * COLUMNS + 4] = 9  # one token unlike all others
    levels = np.asarray(plot.pca_map(features, (ROWS, COLUMNS), cell=4)).astype(int)
    assert levels.shape == (ROWS * 4, COLUMNS * 4, 3)
    other = np.abs(levels - levels[0, 0]).max(axis=2) > 0
    assert other[4:8, 16:20].all()
    assert other.sum() == 16


def test_equal_tokens_make_a_grey_map():
    assert set(np.asarray(plot.pca_map(np.ones((6, 4)), (2, 3))).ravel()) == {128}


def test_similarities_are_cosines_with_the_chosen_token():
    features = tokens()
    cosines = plot.similarities(features, (ROWS, COLUMNS), (1, 3))
    one, other = features[1 * COLUMNS + 3], features[2 * COLUMNS + 0]
    assert cosines[1, 3] == pytest.approx(1)
    assert cosines[2, 0] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_the_brightest_square_is_the_patch_itself_and_it_is_framed():
    image = plot.similarity_map(tokens(), (ROWS, COLUMNS), (2, 1), cell=20)
    levels = np.asarray(image).astype(int)
    assert tuple(levels[2 * 20, 1 * 20]) == plot.PAPER
    middles = levels[10::20, 10::20].sum(axis=2)
    assert np.unravel_index(middles.argmax(), middles.shape) == (2, 1)


@pytest.mark.parametrize("patch", [(3, 0), (0, 5), (-1, 0)])
def test_a_patch_outside_the_grid_is_named(patch):
    with pytest.raises(ValueError, match=rf"no patch {patch[0]},{patch[1]}: .* its 3 rows and 5 columns is 2,4"):
        plot.similarities(tokens(), (ROWS, COLUMNS), patch)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"3 x 4 has 12 tokens \(N, D\), got an array \(15, 7\)"):
        plot.pca_map(tokens(), (3, 4))


def test_heat_grows_lighter_all_the_way():
    lightness = plot.heat(np.linspace(0, 1, 50)) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > 0).all()


def test_lines_go_from_corner_to_corner_of_their_chart_and_a_constant_one_lies_at_its_foot():
    points = np.linspace(0, 1, 7)
    chart = np.asarray(plot.curves({"rising": (points, 5 * points), "flat": (points, 0 * points)}, x="step", y="loss"))
    first, second = (np.array(plot.class_colour(number)) for number in range(2))
    (left, top), (width, height) = (80, 16), plot.CHART
    assert (chart[top + height // 2, left + width // 2] == first).all()
    assert (chart[top + 2, left + width - 2] == first).all()
    assert (chart[top + height, left + width // 2] == second).all()
    alone = plot.curves({"flat": (points, 0 * points)}, x="step", y="loss", bounds=(0, -1, 1, 1))
    assert (np.asarray(alone)[top + height // 2, left + width // 3] == first).all()
