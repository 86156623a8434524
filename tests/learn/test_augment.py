"""Random changes of images: the same for the same chance, of the size asked for."""

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import bundled
from mlx_aimv2.images import to_rgb
from mlx_aimv2.train import augment

PHOTOGRAPH = bundled.photographs()[0]


def test_the_same_chance_gives_the_same_image_and_another_one_another():
    def levels(seed):
        changed = augment.Augmentation(operations=2)
        return np.asarray(changed(to_rgb(PHOTOGRAPH), (41, 53), np.random.default_rng(seed)))

    assert levels(1).shape == (41, 53, 3)
    np.testing.assert_array_equal(levels(1), levels(1))
    assert np.abs(levels(1).astype(int) - levels(2)).mean() > 5


@pytest.mark.parametrize("name", augment.TABLE)
@pytest.mark.parametrize("strength", [-1.0, 1.0])
def test_an_operation_keeps_size_and_mode(name, strength):
    image = Image.open(PHOTOGRAPH).convert("RGB").resize((53, 41)).point(lambda level: 30 + 0.7 * level)
    changed = augment.TABLE[name](image, strength)
    assert (changed.size, changed.mode) == ((53, 41), "RGB")
    assert name == "identity" or np.abs(np.asarray(changed).astype(int) - np.asarray(image)).mean() > 0.5


@pytest.mark.parametrize(
    "name", ["rotate", "posterize", "colour", "contrast", "shear x", "shear y", "translate x", "translate y"]
)
def test_an_operation_of_no_strength_changes_nothing(name):
    image = Image.open(PHOTOGRAPH).convert("RGB").resize((53, 41))
    np.testing.assert_allclose(np.asarray(augment.TABLE[name](image, 0.0)), np.asarray(image), atol=1)


def test_a_crop_has_the_height_and_width_asked_for():
    image = Image.new("RGB", (31, 23))
    assert augment.Augmentation()(image, (19, 29), np.random.default_rng(0)).size == (29, 19)


def test_operations_go_to_either_side():
    """Of an even grey only a change of brightness moves the middle, half of the time to the dark."""
    image = Image.new("RGB", (41, 41), (100, 100, 100))
    seen = {augment.rand_augment(image, 1, np.random.default_rng(seed)).getpixel((20, 20)) for seed in range(99)}
    assert min(seen) < (100, 100, 100) < max(seen)


def test_operations_are_as_strong_and_as_frequent_as_is_said(monkeypatch):
    strengths = []
    for name in augment.TABLE:
        monkeypatch.setitem(augment.TABLE, name, lambda image, strength: strengths.append(abs(strength)) or image)
    rng, image = np.random.default_rng(0), Image.new("RGB", (3, 2))
    augment.rand_augment(image, 4000, rng, probability=0.5, strength=(0.9, 0.05))
    assert len(strengths) == pytest.approx(2000, abs=150)
    assert np.mean(strengths) == pytest.approx(0.9, abs=0.01) and np.std(strengths) == pytest.approx(0.05, abs=0.01)


def test_each_operation_is_drawn(monkeypatch):
    drawn = []
    for name in augment.TABLE:
        monkeypatch.setitem(augment.TABLE, name, lambda image, strength, name=name: drawn.append(name) or image)
    augment.rand_augment(Image.new("RGB", (3, 2)), 500, np.random.default_rng(0))
    assert set(drawn) == set(augment.TABLE)


def test_colours_are_changed_to_either_side():
    """Of an even grey it is the brightness that changes."""
    image, changed = Image.new("RGB", (41, 41), (100, 100, 100)), augment.Augmentation(min_area=1, jitter=0.5)
    seen = [changed(image, (5, 5), np.random.default_rng(seed)).getpixel((2, 2))[0] for seed in range(40)]
    assert min(seen) < 70 and max(seen) > 130


def test_the_middle_is_taken_where_no_crop_fits():
    """Of an image that is far too wide."""
    image = Image.new("RGB", (400, 20))
    image.paste((255, 255, 255), (180, 0, 220, 20))
    changed = augment.Augmentation(min_area=1)(image, (7, 7), np.random.default_rng(0))
    assert np.asarray(changed).min() == 255


def test_only_flip_mirrors():
    half = Image.new("RGB", (40, 40))
    half.paste((255, 255, 255), (20, 0, 40, 40))

    def brighter_sides(flip):
        changed = augment.Augmentation(flip=flip)
        images = (changed(half, (8, 8), np.random.default_rng(seed)) for seed in range(20))
        return {"left" if image.getpixel((0, 4))[0] > image.getpixel((7, 4))[0] else "right" for image in images}

    assert brighter_sides(False) == {"right"}
    assert brighter_sides(True) == {"left", "right"}
