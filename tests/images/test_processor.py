"""Every image becomes the pixels that the checkpoint asks for: sizes and batches."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.images.preprocessing import Preprocessing, published
from mlx_aimv2.images.processor import Aimv2Processor
from tests.pixels import levels, noise, normalised

FIXED = Aimv2Processor(published(42))
NATIVE = Aimv2Processor(published(None))


@pytest.mark.parametrize(("height", "width"), [(97, 61), (61, 97), (42, 42), (31, 19), (300, 43), (53, 211)])
def test_pixels_are_resized_bicubically_cropped_from_the_centre_and_normalised(height, width):
    image = noise(height, width, 3)
    tall, wide = (42 * height // width, 42) if width <= height else (42, 42 * width // height)
    resized = np.array(Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC))
    top, left = (tall - 42) // 2, (wide - 42) // 2
    wanted = normalised(resized[top : top + 42, left : left + 42])
    assert np.abs(FIXED.pixels(image) - wanted).max() < 1e-6


def test_pixels_are_float32_and_contiguous():
    for processor in (FIXED, NATIVE):
        pixels = processor.pixels(noise(61, 97, 3))
        assert pixels.dtype == np.float32
        assert pixels.flags.c_contiguous


def test_a_native_checkpoint_keeps_every_pixel():
    image = noise(59, 83, 3)
    assert np.abs(NATIVE.pixels(image) - normalised(image)).max() < 1e-6


def test_a_crop_beyond_the_edge_is_black_and_an_odd_remainder_goes_to_the_top_and_left():
    crop_only = Aimv2Processor(Preprocessing(resize=None, crop=(20, 20)))
    image = np.full((15, 31, 3), 255, np.uint8)
    got = levels(crop_only.pixels(image))
    assert (got[:3] == 0).all() and (got[3:18] == 255).all() and (got[18:] == 0).all()


@pytest.mark.parametrize("filter", Image.Resampling)
def test_the_filter_is_the_one_that_is_asked_for(filter):
    image = noise(61, 97, 3)
    wanted = np.array(Image.fromarray(image).resize((29, 19), filter))
    assert (
        levels(Aimv2Processor(Preprocessing(resize=(19, 29), crop=None, resample=filter)).pixels(image)) == wanted
    ).all()


def test_a_resize_to_height_and_width_ignores_the_shape():
    squash = Aimv2Processor(Preprocessing(resize=(29, 43), crop=None))
    image = noise(61, 97, 3)
    wanted = np.array(Image.fromarray(image).resize((43, 29), Image.Resampling.BICUBIC))
    assert (levels(squash.pixels(image)) == wanted).all()


def test_steps_switched_off_leave_the_levels_as_they_are():
    plain = replace(published(None), rescale_factor=None, image_mean=None, image_std=None)
    image = noise(17, 23, 3)
    assert (Aimv2Processor(plain).pixels(image) == image).all()


# Batches


def test_a_single_image_gives_a_batch_of_one():
    assert FIXED(noise(61, 97, 3)).shape == (1, 42, 42, 3)


def test_a_batch_keeps_its_order(tmp_path):
    files = []
    for number in range(7):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (50, 47), (number * 30, 0, 0)).save(files[-1])
    reds = levels(np.array(FIXED(files)))[:, 5, 5, 0]
    assert reds.tolist() == [number * 30 for number in range(7)]


def test_a_batch_may_be_one_array_of_several_images():
    images = np.stack([noise(61, 97, 3, seed=seed) for seed in (1, 2)])
    assert np.abs(np.array(FIXED(images))[1] - FIXED.pixels(images[1])).max() == 0


def test_images_of_different_final_sizes_are_named(tmp_path):
    Image.new("RGB", (31, 29)).save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"29x31 \(.*cat\.png, image 0\), 37x41 \(.*ndarray.*, image 2\)"):
        NATIVE([tmp_path / "cat.png", noise(29, 31, 3), noise(37, 41, 3)])


def test_a_bad_image_among_good_ones_is_counted_out(tmp_path):
    with pytest.raises(ValueError, match="image 2: image of 0 bytes is empty"):
        FIXED([noise(61, 97, 3), noise(97, 61, 3), b""])
    with pytest.raises(FileNotFoundError, match=r"image 1: .*nowhere\.jpg does not exist"):
        FIXED([noise(61, 97, 3), tmp_path / "nowhere.jpg"])


def test_pixels_may_be_made_in_many_threads(tmp_path):
    files = []
    for number, kind in enumerate(["png", "webp", "gif", "tiff", "bmp", "jpg", "ppm"] * 3):
        files.append(tmp_path / f"{number}.{kind}")
        Image.fromarray(noise(61, 97, 3, seed=number)).save(files[-1])
    wanted = [FIXED.pixels(file) for file in files]
    with ThreadPoolExecutor(7) as pool:
        for found, alone in zip(pool.map(FIXED.pixels, files), wanted, strict=True):
            assert (found == alone).all()


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="no image"):
        FIXED([])
