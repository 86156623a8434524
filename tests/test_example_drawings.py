"""Contact sheets and the plane of the demo show every image, and keep neighbours together."""

import numpy as np
import pytest
from PIL import Image

from examples import demo_picture
from mlx_aimv2 import plot
from mlx_aimv2.plot import below, contact_sheet
from mlx_aimv2.serve import plane

ROWS, COLUMNS, WIDTH = 3, 5, 7


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS * COLUMNS, WIDTH))


def test_a_contact_sheet_holds_every_image_in_its_frame():
    images = [[Image.new("RGB", (8, 8), (0, 0, 250))] * 3, [Image.new("RGB", (8, 4), (250, 0, 0))] * 2]
    frames = [[(0, 200, 0)] * 3, [None] * 2]
    canvas = contact_sheet(images, frames=frames, captions=[["a"] * 3, ["b"] * 2], side=40, gap=10)
    levels = np.asarray(canvas)
    count = {
        name: (levels == colour).all(axis=2).sum()
        for name, colour in {"blue": (0, 0, 250), "red": (250, 0, 0), "green": (0, 200, 0)}.items()
    }
    assert count["blue"] == 3 * 40 * 40
    assert count["red"] == 2 * 40 * 20
    assert count["green"] > 0


def test_points_are_drawn_where_they_lie_with_up_as_up():
    images = [Image.new("RGB", (4, 4), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    canvas = demo_picture.scatter(np.array([[0, 0], [1, 1]]), images, size=(60, 40))
    levels = np.asarray(canvas)
    assert tuple(levels[33, 6]) == (200, 0, 0)
    assert tuple(levels[5, 53]) == (0, 0, 200)


def test_images_stand_beside_and_below_each_other():
    a, b = Image.new("RGB", (5, 7)), Image.new("RGB", (11, 3))
    assert plot.beside([a, b], gap=2).size == (18, 7)
    assert below([a, b], gap=2).size == (11, 12)
    assert [plot.to_height(one, 14).size for one in (a, b)] == [(10, 14), (51, 14)]


def test_the_plane_keeps_neighbours_together():
    chance = np.random.default_rng(4)
    centres = chance.normal(size=(3, 11)) * 5
    features = np.concatenate([centre + chance.normal(size=(13, 11)) for centre in centres])
    place = plane.neighbour_plane(features, neighbours=5)
    groups = np.repeat(np.arange(3), 13)
    far = np.linalg.norm(place[:, None] - place, axis=2) + 1e9 * np.eye(len(place))
    assert (groups[far.argmin(axis=1)] == groups).all()
    np.testing.assert_array_equal(place, plane.neighbour_plane(features, neighbours=5))


def test_the_perplexity_of_each_feature_is_as_asked():
    given = plane._conditional(tokens(), 4.0)
    perplexity = np.exp(-(given * np.log(np.maximum(given, 1e-300))).sum(axis=1))
    np.testing.assert_allclose(perplexity, 4.0, rtol=1e-6)


def test_nearness_is_mutual():
    near = plane._nearness(tokens(), 4.0)
    assert near.sum() == pytest.approx(1)
    np.testing.assert_allclose(near, near.T)


def test_two_features_make_no_plane():
    with pytest.raises(ValueError, match="at least 3 features, got 2"):
        plane.neighbour_plane(np.ones((2, 5)))
