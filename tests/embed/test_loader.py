"""The decoder turns any file into pixels or into the reason why it has none."""

import os

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.embed.loader import Decoder
from tests.image_files import image


@pytest.mark.parametrize("size", [(14 * 40, 14 * 30), (14 * 90 + 9, 14 * 17 + 3), (14 * 33, 14 * 33)])
def test_large_images_are_scaled_down_in_their_shape(tmp_path, native, size):
    decoded = Decoder(native[1], max_patches=300)(str(image(tmp_path / "a.png", size)))
    rows, columns = decoded.levels.shape[0] / 14, decoded.levels.shape[1] / 14
    assert 300 * 0.75 < rows * columns <= 300
    assert columns / rows == pytest.approx(size[0] / size[1], rel=0.2)
    assert rows == int(rows)
    assert columns == int(columns)


def test_a_ribbon_that_cannot_be_scaled_down_is_reported(tmp_path, native):
    decoded = Decoder(native[1], max_patches=300)(str(image(tmp_path / "a.png", (14 * 2000, 15))))
    assert decoded.failure == "has 15x28000 pixels: scaled to 300 patches it is narrower than one patch"


def test_images_within_the_limit_keep_every_pixel(tmp_path, native):
    file = image(tmp_path / "a.png", (14 * 12, 14 * 11))
    decoded = Decoder(native[1], max_patches=132)(str(file))
    np.testing.assert_array_equal(decoded.levels, np.array(Image.open(file)))


def test_an_image_right_at_the_limit_is_not_scaled(tmp_path, native):
    file = image(tmp_path / "a.png", (14 * 12 + 9, 14 * 11 + 5))
    decoded = Decoder(native[1], max_patches=132)(str(file))
    np.testing.assert_array_equal(decoded.levels, np.array(Image.open(file))[: 14 * 11, : 14 * 12])


def test_a_pipe_that_came_after_the_listing_does_not_stop_the_run(tmp_path, fixed):
    os.mkfifo(tmp_path / "a.jpg")
    assert Decoder(fixed[1])(str(tmp_path / "a.jpg")).failure == "is a named pipe, not an image"


def test_whatever_a_decoder_raises_is_that_images_failure(tmp_path, fixed, monkeypatch):
    def broken(data, **_):
        raise RuntimeError("decoder\nexploded")

    monkeypatch.setattr("mlx_aimv2.embed.loader.open_image", broken)
    assert Decoder(fixed[1])(str(image(tmp_path / "a.jpg", (9, 9)))).failure == "decoder exploded"
