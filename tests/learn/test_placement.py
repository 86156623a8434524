"""Boxes, masks and pixels of an image stay together wherever it lies on its canvas."""

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.learn import dense
from mlx_aimv2.train.augment import jittered


def boxed(size=(67, 101), box=(40, 13, 71, 43)):
    """A black image with one white box."""
    levels = np.zeros((*size, 3), np.uint8)
    levels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(levels), np.array([box], float)


def test_the_whole_image_fills_the_canvas():
    place = dense.plain((67, 101), (56, 70))
    assert place.boxes([[0, 0, 101, 67]]).tolist() == [[0, 0, 70, 56]]
    image, _ = boxed()
    drawn = place.draw(image, fill=(9, 9, 9), resample=Image.Resampling.NEAREST)
    assert drawn.size == (70, 56)
    assert set(np.unique(np.asarray(drawn))) == {0, 255}


def test_a_training_image_is_drawn_larger_or_smaller_and_a_little_out_of_shape():
    fit = dense.plain((67, 101), (56, 70))
    scales = [dense.random((67, 101), (56, 70), np.random.default_rng(seed)) for seed in range(200)]
    across, down = (
        np.array([getattr(one, name) / getattr(fit, name) for one in scales]) for name in ("scale_x", "scale_y")
    )
    for found, (low, high) in (
        (np.sqrt(across * down), dense.ZOOM),
        (across / down, (1 / dense.STRETCH, dense.STRETCH)),
    ):
        assert low < found.min() < (1 + low) / 2 and (1 + high) / 2 < found.max() < high


def test_boxes_come_back_from_the_canvas():
    place = dense.plain((67, 101), (56, 70))
    box = np.array([[3.0, 5, 61, 47]])
    np.testing.assert_allclose(place.back(place.boxes(box)), box, atol=1e-9)
    assert place.back(np.array([[-5.0, -5, 900, 900]])).tolist() == [[0, 0, 101, 67]]


@pytest.mark.parametrize("seed", range(11))
def test_a_box_lies_where_its_pixels_lie(seed):
    image, box = boxed()
    place = dense.random((67, 101), (113, 131), np.random.default_rng(seed), flip=True)
    drawn = place.draw(image, fill=(0, 0, 0), resample=Image.Resampling.NEAREST)
    mask = place.draw(image.convert("L"), fill=0, resample=Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(drawn)[..., 0], np.asarray(mask))
    rows, columns = np.nonzero(np.asarray(mask) > 127)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    wanted = place.boxes(box)[0].clip(0, [131, 113, 131, 113])
    np.testing.assert_allclose(found, wanted, atol=1.5)


def test_flipping_changes_sides_and_happens_only_when_asked_for():
    places = [dense.random((7, 11), (7, 11), np.random.default_rng(seed), flip=True) for seed in range(40)]
    assert 8 < sum(place.mirrored for place in places) < 32
    assert not any(dense.random((7, 11), (7, 11), np.random.default_rng(s)).mirrored for s in range(40))
    place = dense.Placement((7, 11), (7, 11), 1, 1, mirrored=True)
    assert place.boxes([[1, 2, 4, 5]]).tolist() == [[7, 2, 10, 5]]


def test_the_same_rng_gives_the_same_place_and_colours():
    image, _ = boxed()
    first, second = (np.asarray(jittered(image, 0.3, np.random.default_rng(3))) for _ in range(2))
    assert (first == second).all()
    assert dense.random((7, 11), (5, 5), np.random.default_rng(1)) == dense.random(
        (7, 11), (5, 5), np.random.default_rng(1)
    )


def test_what_lies_outside_the_image_is_filled():
    place = dense.Placement((10, 10), (20, 20), 1, 1, 5, 7)
    drawn = np.asarray(place.draw(Image.new("L", (10, 10), 3), fill=255, resample=Image.Resampling.NEAREST))
    assert (drawn[7:17, 5:15] == 3).all()
    assert (drawn == 255).sum() == 300
