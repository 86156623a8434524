"""Does every image become the pixels that the checkpoint's files ask for, and every bad one a clear line?"""

import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, from_clip, published, to_clip
from mlx_aimv2.processor import Aimv2Processor

FIXED = Aimv2Processor(published(42))
NATIVE = Aimv2Processor(published(None))


def noise(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    """Blotches rather than white noise, so that a filter has something to keep."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 5 + 2, width // 5 + 2, 4), np.uint8)
    whole = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return whole[..., : channels[0]] if channels else whole[..., 0]


def normalised(levels: np.ndarray) -> np.ndarray:
    return (levels / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)


def levels(pixels: np.ndarray) -> np.ndarray:
    """Back from pixels to the 0 to 255 they came from."""
    return np.rint((pixels * np.array(CLIP_STD) + np.array(CLIP_MEAN)) * 255).astype(int)


def stored(folder: Path, fields: dict, name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(json.dumps(fields))
    return folder


def png(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds no pixel of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Sizes


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
        for ours, alone in zip(pool.map(FIXED.pixels, files), wanted, strict=True):
            assert (ours == alone).all()


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="no image"):
        FIXED([])


# Sources


def test_path_string_bytes_open_file_pil_image_and_array_give_the_same_pixels(tmp_path):
    array = noise(61, 97, 3)
    file = tmp_path / "cat.png"
    Image.fromarray(array).save(file)
    wanted = FIXED.pixels(array)
    with file.open("rb") as stream, Image.open(file) as image:
        for source in (file, str(file), file.read_bytes(), bytearray(file.read_bytes()), stream, image):
            assert (FIXED.pixels(source) == wanted).all(), type(source)


def test_the_users_own_image_and_array_stay_as_they_were():
    array = noise(61, 97, 3)
    array.flags.writeable = False
    image = Image.fromarray(array).convert("RGBA")
    FIXED.pixels(array)
    FIXED.pixels(image)
    assert image.mode == "RGBA" and image.size == (97, 61)


@pytest.mark.parametrize(
    ("array", "level"),
    [
        (np.full((17, 19), 77, np.uint8), 77),
        (np.full((17, 19, 1), 77, np.uint8), 77),
        (np.full((17, 19, 3), 77, np.uint8), 77),
        (np.full((17, 19), 77 * 257, np.uint16), 77),
        (np.full((17, 19, 3), 77 * 256, np.uint16), 77),
        (np.full((17, 19, 3), 77 * 257, ">u2"), 77),
        (np.full((17, 19, 3), 77, np.int64), 77),
        (np.full((17, 19), 77 * 257, np.int32), 77),
        (np.full((17, 19), True), 255),
        (np.full((17, 19, 3), 77 / 255, np.float32), 77),
        (np.full((17, 19, 3), 77 / 255, np.float64), 77),
        (np.full((17, 19, 4), [77, 77, 77, 255], np.uint8), 77),
        (np.full((17, 19, 4), [0, 0, 0, 0], np.uint8), 255),
        (np.full((17, 19, 4), [0.0, 0.0, 0.0, 0.0], np.float32), 255),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else None,
)
def test_arrays_of_every_kind_keep_their_levels(array, level):
    assert (levels(NATIVE.pixels(array)) == level).all()


def test_floats_are_rounded_to_the_nearest_level():
    every = np.arange(256, dtype=np.float64).reshape(16, 16) / 255
    for kind in (np.float32, np.float64):
        assert (levels(NATIVE.pixels(every.astype(kind)))[..., 0] == np.arange(256).reshape(16, 16)).all()
    assert (levels(NATIVE.pixels(np.full((17, 19), 76.6 / 255))) == 77).all()


@pytest.mark.parametrize(
    ("array", "line"),
    [
        (np.zeros((3, 17, 19), np.uint8), r"colours first: give array\.transpose\(1, 2, 0\)"),
        (np.zeros((17, 19, 2), np.uint8), "shape 17x19x2"),
        (np.zeros(17, np.uint8), "shape 17;"),
        (np.zeros((0, 19, 3), np.uint8), "no pixels"),
        (np.full((17, 19, 3), 200.0), "float64 from 200.0 to 200.0"),
        (np.full((17, 19, 3), -0.5), "from -0.5"),
        (np.full((17, 19, 3), np.nan), "from nan"),
        (np.full((17, 19, 3), 70000), "int64 from 70000"),
        (np.full((17, 19, 3), 1j), "complex"),
        (np.full((17, 19), "a"), "<U1"),
    ],
)
def test_arrays_of_unclear_range_or_shape_are_refused(array, line):
    with pytest.raises(ValueError, match=line):
        NATIVE.pixels(array)


# Colours


def test_grey_palette_one_bit_and_cmyk_images_become_rgb(tmp_path):
    image = Image.fromarray(noise(31, 37, 3))
    for mode, suffix in (("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg")):
        file = tmp_path / f"{mode}.{suffix}"
        image.convert(mode).save(file)
        with Image.open(file) as opened:
            wanted = np.array(opened.convert("RGB"))
        assert (levels(NATIVE.pixels(file)) == wanted).all(), mode


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (19, 17), (0, 0, 0, 0))
    if mode == "PA":
        image = image.convert("RGB").convert("P")
        image.putalpha(0)
    else:
        image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    assert image.mode == mode
    assert (levels(NATIVE.pixels(image)) == 255).all()


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path):
    image = Image.new("P", (19, 17), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    for name, transparency in (("one.gif", 1), ("one.png", 1), ("table.png", b"\xff\x00")):
        image.save(tmp_path / name, transparency=transparency)
        assert (levels(NATIVE.pixels(tmp_path / name)) == 255).all(), name


def test_the_transparent_colour_of_an_rgb_png_becomes_white(tmp_path):
    Image.new("RGB", (19, 17), (9, 8, 7)).save(tmp_path / "one.png", transparency=(9, 8, 7))
    assert (levels(NATIVE.pixels(tmp_path / "one.png")) == 255).all()


def test_half_transparent_colours_are_mixed_with_white():
    image = np.full((17, 19, 4), [10, 200, 90, 51], np.uint8)  # 51 / 255 is a fifth
    assert levels(NATIVE.pixels(image))[3, 3].tolist() == [206, 244, 222]


def test_grey_of_16_bits_keeps_its_high_byte(tmp_path):
    deep = noise(17, 19).astype(np.uint16) * 257
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert (levels(NATIVE.pixels(tmp_path / name))[..., 0] == deep >> 8).all()


def test_a_dark_grey_png_of_16_bits_stays_dark_in_pillows_that_widen_it():
    image = Image.fromarray(np.full((17, 19), 200, np.int32))
    assert image.mode == "I"
    image.format = "PNG"
    assert (levels(NATIVE.pixels(image)) == 0).all()


def test_floating_point_images_go_from_0_to_1(tmp_path):
    Image.fromarray(noise(17, 19).astype(np.float32) / 255).save(tmp_path / "float.tif")
    assert (levels(NATIVE.pixels(tmp_path / "float.tif"))[..., 1] == noise(17, 19)).all()
    with pytest.raises(ValueError, match="float from 0 to 1"):
        NATIVE.pixels(Image.fromarray(noise(17, 19).astype(np.float32)))


def test_of_an_animated_image_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (19, 17), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.png", "moving.webp", "moving.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert levels(NATIVE.pixels(tmp_path / name))[8, 8].tolist() == [255, 0, 0], name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright_as_its_exif_tag_says(tmp_path, orientation):
    upright = noise(17, 29, 3)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    tag = Image.Exif()
    tag[0x0112] = orientation
    for name in ("turned.png", "turned.webp"):
        Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / name, exif=tag, lossless=True)
        with Image.open(tmp_path / name) as opened:
            assert (levels(NATIVE.pixels(tmp_path / name)) == upright).all()
            assert (levels(NATIVE.pixels(opened)) == upright).all()


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 60))).save(tmp_path / "phone.heic", quality=-1)
    assert np.abs(levels(NATIVE.pixels(tmp_path / "phone.heic")) - [200, 30, 60]).max() <= 2


def test_the_limit_of_pixels_holds_for_heic_too(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 48))).save(tmp_path / "phone.heic")
    with pytest.raises(ValueError, match="64x48 pixels, more than"):
        NATIVE(tmp_path / "phone.heic", max_pixels=1000)


def test_heic_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"HEIC.*pip install 'mlx-aimv2\[heic\]'"):
        NATIVE.pixels(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


# Bad images


def test_a_missing_file_a_folder_and_an_address_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg does not exist"):
        FIXED(tmp_path / "nowhere.jpg")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        FIXED(tmp_path)
    with pytest.raises(ValueError, match=r"https://example\.org/cat\.jpg is an address: download"):
        FIXED("https://example.org/cat.jpg")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is empty"),
        (b"These are the words of a letter.\n" * 9, "is not an image"),
        (b"\xff\xd8\xff\xe0 nothing more", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "is a broken PNG"),
        (png(50, 40), "cannot be read"),
        (png(0, 40), "is a broken PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image"),
    ],
    ids=["empty", "text", "jpeg", "png", "png without pixels", "zero wide", "eps"],
)
def test_a_file_that_holds_no_image_is_named(tmp_path, content, line):
    (tmp_path / "cat.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=line) as caught:
        FIXED(tmp_path / "cat.jpg")
    assert str(tmp_path / "cat.jpg") in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=line):
        FIXED(content)


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "tiff", "bmp"])
def test_a_truncated_image_is_named(tmp_path, kind):
    whole = io.BytesIO()
    Image.fromarray(noise(97, 61, 3)).save(whole, kind)
    file = tmp_path / f"half.{kind}"
    file.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ValueError, match=rf"half\.{kind} "):
        FIXED(file)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(40_000, 40_000))
    with pytest.raises(ValueError, match=r"bomb\.png has 40000x40000 pixels, more than 178,956,970: .*--max-pixels"):
        FIXED(tmp_path / "bomb.png")


def test_the_limit_of_pixels_may_be_set_and_is_else_where_pillow_refuses(monkeypatch, tmp_path):
    Image.new("RGB", (500, 470)).save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match="500x470 pixels, more than 234,999"):
        FIXED(tmp_path / "cat.png", max_pixels=500 * 470 - 1)
    assert FIXED(tmp_path / "cat.png", max_pixels=500 * 470).shape == (1, 42, 42, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500 * 470 // 2 - 1)
    with pytest.raises(ValueError, match="more than 234,998"):
        FIXED(tmp_path / "cat.png")
    assert FIXED(tmp_path / "cat.png", max_pixels=500 * 470).shape == (1, 42, 42, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert FIXED(tmp_path / "cat.png").shape == (1, 42, 42, 3)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0x40 pixels: nothing to see"):
        FIXED(Image.new("RGB", (0, 40)))


def test_a_single_pixel_is_refused():
    for processor in (FIXED, NATIVE):
        with pytest.raises(ValueError, match="single pixel"):
            processor(np.zeros((1, 1, 3), np.uint8))


def test_a_ribbon_that_would_grow_beyond_memory_is_refused():
    with pytest.raises(ValueError, match=r"too narrow.*42x8400000"):
        FIXED.pixels(np.zeros((1, 200_000, 3), np.uint8))
    assert FIXED.pixels(np.zeros((1, 500, 3), np.uint8)).shape == (42, 42, 3)


def test_a_native_image_below_one_patch_is_refused():
    assert NATIVE.pixels(noise(14, 15, 3)).shape == (14, 15, 3)
    with pytest.raises(ValueError, match="13x900 pixels, less than one patch of 14x14"):
        NATIVE.pixels(noise(13, 900, 3))


def test_something_else_is_refused():
    for thing in (None, 7, {"image": 1}, [b"nested"]):
        with pytest.raises(ValueError, match="an image is a path, bytes"):
            FIXED([thing])


# Settings


def test_without_any_file_apples_preprocessing_is_taken_with_a_remark(tmp_path):
    with pytest.warns(UserWarning, match=r"no preprocessor_config\.json.*centre crop 336x336"):
        fixed = Aimv2Processor.from_folder(tmp_path, config=Aimv2VisionConfig(image_size=336))
    with pytest.warns(UserWarning, match="keep their size"):
        native = Aimv2Processor.from_folder(tmp_path, config=Aimv2VisionConfig(is_native=True))
    assert (fixed.preprocessing, native.preprocessing) == (published(336), published(None))
    assert (fixed.is_native, native.is_native) == (False, True)


def test_without_any_file_or_config_the_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
        Aimv2Processor.from_folder(tmp_path)


CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 70},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 56, "width": 42},
    "do_rescale": True,
    "rescale_factor": 0.5,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def test_every_field_of_preprocessor_config_counts(tmp_path):
    assert Aimv2Processor.from_folder(stored(tmp_path, CLIP)).preprocessing == Preprocessing(
        resize=70, crop=(56, 42), resample=2, rescale_factor=0.5, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6)
    )


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"size": 70, "crop_size": 56}, {"resize": 70, "crop": (56, 56)}),
        ({"size": {"height": 70, "width": 84}}, {"resize": (70, 84)}),
        ({"size": {"shortest_edge": 70, "longest_edge": None}}, {"resize": 70}),
        ({"do_resize": False}, {"resize": None}),
        ({"do_center_crop": False}, {"crop": None}),
        ({"do_rescale": False}, {"rescale_factor": None}),
        ({"do_normalize": False}, {"image_mean": None, "image_std": None}),
        ({"image_mean": 0.5}, {"image_mean": (0.5, 0.5, 0.5)}),
        ({"size": None, "crop_size": None}, {"resize": 224, "crop": (224, 224)}),
    ],
)
def test_spellings_of_preprocessor_config(change, wanted):
    whole = from_clip(CLIP, Path("preprocessor_config.json"))
    assert from_clip(CLIP | change, Path("preprocessor_config.json")) == replace(whole, **wanted)


def test_transformers_5_keeps_the_same_in_processor_config(tmp_path):
    file = stored(tmp_path, {"image_processor": CLIP, "processor_class": "CLIPProcessor"}, "processor_config.json")
    assert Aimv2Processor.from_folder(file).preprocessing.crop == (56, 42)


def test_a_processor_config_without_settings_is_refused_or_passed_over(tmp_path):
    with pytest.raises(ValueError, match=r"processor_config\.json: image_processor must be a JSON object"):
        Aimv2Processor.from_folder(stored(tmp_path, {"image_processor": "CLIP"}, "processor_config.json"))
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
        Aimv2Processor.from_folder(stored(tmp_path, {"processor_class": "CLIPProcessor"}, "processor_config.json"))


TIMM = {
    "input_size": [3, 56, 56],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
}


@pytest.mark.parametrize(("change", "resize"), [({}, 62), ({"crop_pct": 1.0}, 56), ({"crop_mode": "squash"}, (62, 62))])
def test_timms_pretrained_cfg_is_read(tmp_path, change, resize):
    stored(tmp_path, {"architecture": "aimv2_large_patch14_224", "pretrained_cfg": TIMM | change}, "config.json")
    assert Aimv2Processor.from_folder(tmp_path).preprocessing == Preprocessing(
        resize=resize, crop=(56, 56), resample=2, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6)
    )


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"resample": 9}, "resample must be one of nearest"),
        ({"resample": True}, "resample must be"),
        ({"size": {"longest_edge": 224}}, "size must be a number"),
        ({"size": 0}, "size must be in whole pixels above 0"),
        ({"crop_size": {"height": 224, "width": 22.5}}, "crop_size.width must be in whole pixels"),
        ({"do_resize": "yes"}, "do_resize must be true or false"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean must be a number"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be above 0"),
        ({"rescale_factor": 0}, "rescale_factor must be above 0"),
        ({"do_pad": True}, "do_pad is set"),
        ({"image_processor_type": "SiglipImageProcessor"}, "asks for SiglipImageProcessor"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, fields, line):
    with pytest.raises(ValueError, match=line) as caught:
        Aimv2Processor.from_folder(stored(tmp_path, fields))
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"interpolation": "random"}, "interpolation must be one of"),
        ({"crop_pct": 1.2}, "crop_pct must be above 0 and at most 1"),
        ({"crop_mode": "border"}, "crop_mode must be center or squash"),
        ({"input_size": [1, 56, 56]}, r"input_size must be \[3, height, width\]"),
        ({"input_size": [3, 56, 70]}, "not square"),
    ],
)
def test_timms_settings_that_cannot_be_followed_are_refused(tmp_path, change, line):
    with pytest.raises(ValueError, match=line):
        Aimv2Processor.from_folder(stored(tmp_path, {"pretrained_cfg": TIMM | change}, "config.json"))


@pytest.mark.parametrize("content", ["{", "[1]", "\xff\xfe"])
def test_a_settings_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        Aimv2Processor.from_folder(tmp_path)


def test_another_processors_settings_give_way_to_apples_with_a_remark(tmp_path):
    stored(tmp_path, {"image_processor_type": "Ovis2ImageProcessor", "crop_to_patches": True})
    with pytest.warns(UserWarning, match="asks for Ovis2ImageProcessor"):
        processor = Aimv2Processor.from_folder(tmp_path, config=Aimv2VisionConfig(image_size=448))
    assert processor.preprocessing == published(448)


def test_a_fixed_models_size_must_be_that_of_its_images(tmp_path):
    with pytest.raises(ValueError, match="prepared as 56x42, but the model takes 336x336"):
        Aimv2Processor.from_folder(stored(tmp_path, CLIP), config=Aimv2VisionConfig(image_size=336))
    with pytest.raises(ValueError, match="less than one patch of 57"):
        Aimv2Processor.from_folder(stored(tmp_path, CLIP), config=Aimv2VisionConfig(is_native=True, patch_size=57))


def test_the_vision_part_of_a_pair_gives_its_sizes(tmp_path):
    config = Aimv2Config(vision_config=Aimv2VisionConfig(image_size=70), text_config=Aimv2TextConfig())
    with pytest.warns(UserWarning, match="70x70"):
        assert Aimv2Processor.from_folder(tmp_path, config=config).preprocessing == published(70)


@pytest.mark.parametrize(
    "steps",
    [
        published(336),
        published(None),
        Preprocessing(resize=(31, 37), crop=None, resample=1, rescale_factor=None, image_mean=None, image_std=None),
        Preprocessing(resize=None, crop=(31, 37), rescale_factor=0.25, image_mean=(0, 0, 0), image_std=(1, 2, 3)),
    ],
)
def test_what_is_saved_is_read_back(tmp_path, steps):
    Aimv2Processor(steps).save_to(tmp_path)
    assert Aimv2Processor.from_folder(tmp_path).preprocessing == steps
    assert from_clip(to_clip(steps), tmp_path) == steps


def test_a_native_image_above_max_patches_is_scaled_down_in_its_shape():
    processor = Aimv2Processor(published(None))
    image = np.full((14 * 20, 14 * 45, 3), 99, np.uint8)
    height, width, _ = processor.pixels(image, max_patches=100).shape
    assert 80 <= (height // 14) * (width // 14) <= 100
    assert abs(width / height - 45 / 20) < 0.05
    assert processor(image, max_patches=900).shape == (1, 280, 630, 3)


def test_max_patches_changes_nothing_for_a_fixed_checkpoint():
    processor = Aimv2Processor(published(56))
    assert processor.pixels(np.full((140, 280, 3), 99, np.uint8), max_patches=3).shape == (56, 56, 3)
