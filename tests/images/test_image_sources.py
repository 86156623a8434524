"""Anything that holds an image becomes an upright RGB image; whatever does not gives one clear line."""

import io

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.images.processor import Aimv2Processor
from tests.pixels import levels, noise, png

FIXED = Aimv2Processor(published(42))
NATIVE = Aimv2Processor(published(None))


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
    with pytest.raises(ValueError, match=r"https://example\.org/cat\.jpg is a URL: download"):
        FIXED("https://example.org/cat.jpg")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is empty"),
        (b"These are the words of a letter.\n" * 9, "is not an image"),
        (b"\xff\xd8\xff\xe0 nothing more", "is a broken JPEG"),
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


@pytest.mark.parametrize("kind", ["png", "gif", "webp", "tiff", "bmp"])
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
