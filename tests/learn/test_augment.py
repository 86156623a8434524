"""Random changes of images: the same for the same chance, of the size asked for."""

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import bundled
from mlx_aimv2.learn import augment

PHOTOGRAPH = bundled.photographs()[0]


def test_the_same_chance_gives_the_same_image_and_another_one_another():
    def levels(seed):
        return np.asarray(augment.augmented(PHOTOGRAPH, np.random.default_rng(seed), size=(41, 53), flip=True))

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


@pytest.mark.parametrize("name", ["rotate", "colour", "contrast", "shear x", "shear y", "translate x", "translate y"])
def test_an_operation_of_no_strength_changes_nothing(name):
    image = Image.open(PHOTOGRAPH).convert("RGB").resize((53, 41))
    np.testing.assert_allclose(np.asarray(augment.TABLE[name](image, 0.0)), np.asarray(image), atol=1)


def test_a_crop_is_a_part_of_the_image_in_its_share_of_the_area():
    ramp = np.add.outer(np.arange(100), np.arange(150)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp, ramp], axis=-1))
    for seed in range(20):
        crop = np.asarray(augment.random_crop(image, np.random.default_rng(seed), size=(100, 150)))[..., 0]
        slopes = (
            np.diff(crop[10:-10, 10:-10].astype(float), axis=0).mean(),
            np.diff(crop[10:-10, 10:-10].astype(float), axis=1).mean(),
        )
        assert 0.45 <= slopes[0] * slopes[1] <= 1.02


def test_only_flip_mirrors(monkeypatch):
    monkeypatch.setattr(augment, "rand_augment", lambda image, chance: image)
    half = Image.new("RGB", (40, 40))
    half.paste((255, 255, 255), (20, 0, 40, 40))

    def brighter_sides(flip):
        images = (augment.augmented(half, np.random.default_rng(seed), size=(8, 8), flip=flip) for seed in range(20))
        return {"left" if image.getpixel((0, 4))[0] > image.getpixel((7, 4))[0] else "right" for image in images}

    assert brighter_sides(False) == {"right"}
    assert brighter_sides(True) == {"left", "right"}
