"""Pixels equal those of transformers' Pillow-based CLIP image processor, on real photographs."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
data = pytest.importorskip("skimage.data")

from PIL import Image  # noqa: E402
from transformers.image_utils import load_image  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from mlx_aimv2.images.preprocessing import published, to_clip  # noqa: E402
from mlx_aimv2.images.processor import Aimv2Processor  # noqa: E402

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket")  # square and landscape, 300 to 640 pixels


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)())


def reference(image: Image.Image, settings: dict) -> np.ndarray:
    pixels = CLIPImageProcessorPil(**settings)(image, return_tensors="np")["pixel_values"]
    return np.asarray(pixels[0]).transpose(1, 2, 0)


def difference(image: Image.Image, settings: dict, folder) -> float:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processed = Aimv2Processor.from_folder(folder).pixels(image)
    wanted = reference(image, settings)
    assert processed.shape == wanted.shape
    return float(np.abs(processed - wanted).max())


@pytest.mark.parametrize("size", [224, 336, 448, None])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_landscape_portrait_larger_and_smaller(tmp_path, name, size):
    whole = photograph(name)
    for image in (
        whole,
        whole.transpose(Image.Transpose.ROTATE_90),
        whole.resize((whole.width * 3 + 1, whole.height * 3 + 2)),
        whole.resize((157, 101)),
        whole.resize((101, 157)),
        whole.crop((0, 40, whole.width, 71)),  # a ribbon
        whole.crop((40, 0, 59, whole.height)),
    ):
        assert difference(image, to_clip(published(size)), tmp_path) <= 1e-6, image.size


def test_every_size_around_the_target_rounds_alike(tmp_path):
    whole = photograph("coffee")
    for width in range(215, 236):
        for height in (223, 224, 225, 337, 449):
            image = whole.crop((0, 0, width, height)) if height < 400 else whole.resize((width, height))
            assert difference(image, to_clip(published(224)), tmp_path) <= 1e-6, image.size


@pytest.mark.parametrize(
    "change",
    [
        {"size": 70, "crop_size": 56},
        {"size": {"height": 90, "width": 71}},
        {"do_center_crop": False},
        {"do_resize": False},  # the crop falls inside the photograph
        {"do_resize": False, "crop_size": {"height": 777, "width": 333}},  # and reaches beyond it
        {"size": {"shortest_edge": 43}, "crop_size": {"height": 64, "width": 58}},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": 1.0},
        *({"resample": number} for number in range(6)),
    ],
    ids=str,
)
def test_every_setting(tmp_path, change):
    settings = to_clip(published(224)) | change
    # Without rescaling the numbers reach 255 / 0.26, so float32 has that much less to give.
    allowed = 1e-6 if settings["do_rescale"] else 1e-4
    for name in ("cat", "rocket"):
        assert difference(photograph(name), settings, tmp_path) <= allowed


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA", "HSV"])
def test_every_colour_mode(tmp_path, mode):
    image = photograph("cat").convert(mode)
    if "A" in mode:
        image.putalpha(photograph("cat").convert("L"))
    assert difference(image, to_clip(published(224)), tmp_path) <= 1e-6


def test_a_palette_with_transparency(tmp_path):
    image = photograph("cat").quantize(37)
    for transparency in (5, bytes(range(0, 255, 7))):
        image.info["transparency"] = transparency
        assert difference(image, to_clip(published(224)), tmp_path) <= 1e-6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_of_a_turned_camera_is_what_load_image_gives(tmp_path, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    file = tmp_path / "phone.jpg"
    photograph("coffee").save(file, exif=tag)
    processed = Aimv2Processor(published(224)).pixels(file)
    assert np.abs(processed - reference(load_image(str(file)), to_clip(published(224)))).max() <= 1e-6


def test_arrays_are_what_images_are(tmp_path):
    array = data.coffee()
    processed = Aimv2Processor(published(224)).pixels(array)
    assert np.abs(processed - reference(array, to_clip(published(224)))).max() <= 1e-6


@pytest.mark.parametrize("size", [336, None])
def test_what_we_save_transformers_reads(tmp_path, size):
    processed = Aimv2Processor(published(size))
    processed.save_to(tmp_path)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    image = photograph("rocket")
    wanted = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    assert np.abs(processed.pixels(image) - wanted).max() <= 1e-6


def test_what_transformers_saves_we_read(tmp_path):
    CLIPImageProcessorPil(size=336, crop_size=336, resample=2).save_pretrained(tmp_path)
    steps = Aimv2Processor.from_folder(tmp_path).preprocessing
    assert (steps.resize, steps.crop, steps.resample) == (336, (336, 336), 2)


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": None},
        {"do_center_crop": None},
        {"do_rescale": None},
        {"do_normalize": None},
        {"do_convert_rgb": None},
        {"size": 70, "crop_size": 56, "default_to_square": True},
        {"size": 70, "crop_size": 56, "default_to_square": False},
        {"size": 70, "crop_size": 56, "default_to_square": None},
        {"size": {"shortest_edge": 70}, "crop_size": 56, "default_to_square": True},
        {"size": 70, "crop_size": 56, "use_square_size": False},
        {"size": [90, 71], "crop_size": [56, 42]},
    ],
    ids=str,
)
def test_a_file_with_nulls_and_squares_means_what_it_means_to_transformers(tmp_path, change):
    settings = to_clip(published(224)) | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image = photograph("rocket")
    # A null counts as not said; transformers 5.24 leaves that step out, so the file without the field is compared.
    said = {name: value for name, value in settings.items() if value is not None}
    is_null = len(said) < len(settings)
    processor = CLIPImageProcessorPil(**said) if is_null else CLIPImageProcessorPil.from_pretrained(tmp_path)
    wanted = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    found = Aimv2Processor.from_folder(tmp_path).pixels(image)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-6
