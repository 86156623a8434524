"""Whatever is in an image's file beside its pixels, these come through; no file holds up or fills the machine."""

import base64
import io
import os
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from mlx_aimv2 import bundled
from mlx_aimv2.cli import main
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.images import OpenImage, Policy, open_image, to_rgb
from mlx_aimv2.images.metadata import MAX_PARTS
from mlx_aimv2.images.open import turned, turned_box
from mlx_aimv2.images.preprocessing import Preprocessing, published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.index.page import thumbnail

CASES = Path(__file__).parents[1] / "golden" / "images"
FIXED_MODEL = Path(__file__).parents[1] / "golden" / "reference" / "fixed"


def photograph(width: int = 90, height: int = 80) -> Image.Image:
    return Image.open(bundled.photographs()[2]).convert("RGB").resize((width, height))


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    (photograph() if image is None else image).save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def in_png(*chunks: bytes) -> bytes:
    whole = encoded("PNG")
    return whole[:33] + b"".join(chunks) + whole[33:]


def exif(orientation: int, *more: bytes, order: str = "<") -> bytes:
    """A block of EXIF with an orientation and other entries of 12 bytes."""
    entries = [struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0), *more]
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(order + "IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def in_jpeg(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    return jpeg[:2] + b"".join(struct.pack(">BBH", 255, n, len(d) + 2) + d for n, d in segments) + jpeg[2:]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and bool((np.asarray(one) == np.asarray(other)).all())


# Metadata


def test_an_orientation_is_followed_where_another_tag_cannot_be_written_back():
    image = to_rgb(CASES / "rotated-odd-tag.jpg")
    with Image.open(CASES / "rotated-odd-tag.jpg") as raw:
        wanted = raw.transpose(Image.Transpose.ROTATE_270)
    assert image.size == (60, 80)
    assert same(image, wanted)


@pytest.mark.parametrize("name", ["exif.png", "exif.webp"])
def test_exif_that_cannot_be_read_costs_only_the_orientation(name):
    with Image.open(CASES / name) as raw:
        assert same(to_rgb(CASES / name), raw.convert("RGB"))


def test_megabytes_of_compressed_text_cost_nothing():
    assert to_rgb(CASES / "workflow.png").size == (90, 80)
    text = PngImagePlugin.PngInfo()
    for number in range(9):
        text.add_text(f"workflow {number}", "node " * 400_000, zip=True)
        text.add_itxt(f"prompt {number}", "node " * 400_000, zip=True)
    assert same(to_rgb(encoded("PNG", pnginfo=text)), photograph())


def test_texts_that_unpack_to_gigabytes_cost_nothing():
    packed = zlib.compress(bytes(1 << 20))
    names = [b"XML:com.adobe.xmp"] * 9_999 + [b"XML:%d" % number for number in range(9_999)]
    began = time.process_time()
    assert same(to_rgb(in_png(*(chunk(b"zTXt", name + b"\0\0" + packed) for name in names))), photograph())
    assert time.process_time() - began < 10  # one by one they take longer, and 10 GB


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_large_colour_profile_costs_nothing(kind):
    profile = np.random.default_rng(0).bytes(1_500_000) + bytes(1_500_000)
    with Image.open(io.BytesIO(encoded(kind))) as raw:
        wanted = raw.convert("RGB")
    assert same(to_rgb(encoded(kind, icc_profile=profile)), wanted)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "odd",
    [
        struct.pack("<HHII", 0x0128, 2, 1, 50),
        struct.pack("<HHII", 0x8769, 4, 1, 0xFFFFFFFF),
        struct.pack("<HHII", 0x9286, 99, 7, 8),
        struct.pack("<HHII", 0x010F, 5, 0x7FFFFFFF, 8),
        b"\xff" * 12,
    ],
)
def test_the_orientation_is_found_among_broken_tags(kind, odd, order):
    block = exif(6, odd, order=order)
    jpeg = in_jpeg(encoded("JPEG"), (0xE1, b"Exif\0\0" + block))
    assert to_rgb(jpeg if kind == "JPEG" else encoded(kind, exif=block)).size == (80, 90)


def test_an_orientation_may_stand_in_xmp_or_in_imagemagicks_text():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    assert to_rgb(in_jpeg(encoded("JPEG"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp))).size == (80, 90)
    for packed, text in ((b"\0", xmp), (b"\1", zlib.compress(xmp))):
        assert to_rgb(in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0" + packed + b"\0\0\0" + text))).size == (80, 90)
    digits = b"\nexif\n      34\n" + exif(6).hex().encode()
    assert to_rgb(in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(digits)))).size == (80, 90)
    assert to_rgb(encoded("WEBP", xmp=xmp)).size == (80, 90)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_counts_as_upright(orientation):
    for data in (
        in_jpeg(encoded("JPEG"), (0xE1, b"Exif\0\0" + exif(orientation))),
        in_png(chunk(b"eXIf", exif(orientation))),
    ):
        assert to_rgb(data).size == (90, 80)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_upright_once(orientation):
    upright = photograph()
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    turned = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    for compression in ("raw", "tiff_lzw"):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[0x0112] = orientation
        data = encoded("TIFF", turned, tiffinfo=info, compression=compression)
        assert same(to_rgb(data), upright)
        with Image.open(io.BytesIO(data)) as opened:
            assert same(to_rgb(opened), upright)


def test_a_malformed_table_of_further_images_costs_nothing():
    assert to_rgb(in_jpeg(encoded("JPEG"), (0xE2, b"MPF\0" + b"\xff" * 40))).size == (90, 80)


def test_broken_photoshop_blocks_comments_and_checksums_cost_nothing():
    for segment in ((0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\2\0\0"), (0xFE, b"\xff" * 60_000), (0xE0, b"JFIF")):
        assert to_rgb(in_jpeg(encoded("JPEG"), segment)).size == (90, 80)
    assert to_rgb(in_png(chunk(b"pHYs", b"\1")[:-4] + b"oops")).size == (90, 80)
    assert to_rgb(in_png(chunk(b"tIME", b""))).size == (90, 80)


def test_metadata_is_dropped_and_the_colours_stay():
    cmyk = photograph().convert("CMYK")
    data = encoded("JPEG", cmyk, quality=95)  # Pillow writes Adobe's segment, which says that CMYK is inverted
    with Image.open(io.BytesIO(data)) as raw:
        assert same(to_rgb(data), raw.convert("RGB"))
    palette = photograph().quantize(17)
    data = encoded("PNG", palette, transparency=bytes(range(0, 255, 15)))
    with Image.open(io.BytesIO(data)) as raw:
        white = Image.new("RGBA", raw.size, "white")
        assert same(to_rgb(data), Image.alpha_composite(white, raw.convert("RGBA")).convert("RGB"))


def test_pillows_own_settings_are_never_touched():
    def settings():
        return Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY

    before = settings()
    to_rgb(CASES / "workflow.png", policy=Policy(max_pixels=10_000_000, truncated="accept"))
    assert settings() == before


# Truncated JPEGs


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_lacks_nothing(progressive):
    whole = encoded("JPEG", progressive=progressive)
    for missing in (1, 2):
        assert same(open_image(whole[:-missing]).rgb()[0], to_rgb(whole))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_jpeg_that_ends_early_is_taken_with_a_note_unless_refused(kept, progressive):
    whole = encoded("JPEG", photograph(640, 427), progressive=progressive)
    cut = whole[: int(kept * len(whole))]
    for policy in (Policy(), Policy(truncated="accept")):
        opened = open_image(cut, policy=policy)
        assert opened.notes == ["ends early: what is missing is grey, or blurred"]
        upper = (0, 0, 640, int(kept * 427) - 64)
        image = opened.rgb()[0]
        assert image.size == (640, 427)
        assert progressive or same(image.crop(upper), to_rgb(whole).crop(upper))
    with pytest.raises(ValueError, match=r"cannot be read as an image: it ends early; --truncated accept"):
        open_image(cut, policy=Policy(truncated="refuse"))


def test_what_follows_the_end_of_a_jpeg_and_a_thumbnail_in_it_say_nothing_about_its_end():
    whole = encoded("JPEG")
    assert not open_image(whole + bytes(999)).notes
    assert open_image(in_jpeg(whole[:-9], (0xE1, b"Exif\0\0" + exif(1) + whole))).notes


def test_the_processor_warns_of_a_jpeg_that_ends_early(tmp_path):
    whole = encoded("JPEG", photograph(640, 427))
    (tmp_path / "cut.jpg").write_bytes(whole[: -len(whole) // 50])
    processor = Aimv2Processor(published(56))
    with pytest.warns(UserWarning, match=r"cut\.jpg ends early"):
        processor(tmp_path / "cut.jpg")
    with pytest.raises(ValueError, match="ends early"):
        processor(tmp_path / "cut.jpg", truncated="refuse")


def test_embed_tells_each_file_that_ends_early(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = encoded("JPEG", photograph(640, 427))
    Path("cut.jpg").write_bytes(whole[: -len(whole) // 50])
    assert main(["embed", "cut.jpg", "-m", str(FIXED_MODEL), "-o", "a.db"]) == 0
    assert "cut.jpg ends early: what is missing" in capsys.readouterr().err
    assert main(["embed", "cut.jpg", "-m", str(FIXED_MODEL), "-o", "b.db", "--truncated", "refuse"]) == 1
    assert "--truncated accept" in capsys.readouterr().err


# Size


def test_an_image_of_108_megapixels_is_read_and_the_limit_is_a_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (12_000, 9_000), 77).save("large.jpg")
    common = ["-m", str(FIXED_MODEL), "-o"]
    assert main(["embed", "large.jpg", *common, "a.db"]) == 0
    assert main(["map", "large.jpg", *common, "a.png"]) == 0
    capsys.readouterr()
    for verb, out in (("embed", "b.db"), ("map", "b.png")):
        assert main([verb, "large.jpg", *common, out, "--max-pixels", "1000000"]) == 1
        line = capsys.readouterr().err
        assert "12000x9000 pixels, more than 1,000,000" in line and "--max-pixels" in line


def test_the_flags_of_reading_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photograph().save("a.png")
    for flags in (["--max-patches", "-5"], ["--max-pixels", "0"]):
        assert main(["map", "a.png", "-m", str(FIXED_MODEL), *flags]) == 2
        assert f"{flags[0]}" in capsys.readouterr().err
    for wrong in ({"max_pixels": 0}, {"truncated": "perhaps"}, {"decode": "slow"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Aimv2Processor(published(56))("a.png", **wrong)


# Time and memory


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path):
    whole = encoded("JPEG", photograph(640, 427), progressive=True)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    (tmp_path / "scans.jpg").write_bytes(whole[:-2] + last * 3000 + b"\xff\xd9")
    began = time.thread_time()
    assert to_rgb(whole[:-2] + last * 80 + b"\xff\xd9").size == (640, 427)
    decoded = time.thread_time()
    with pytest.raises(ValueError, match=r"scans\.jpg is a JPEG of more than 100 scans"):
        to_rgb(tmp_path / "scans.jpg")
    assert time.thread_time() - decoded < decoded - began  # less than a fortieth of its scans take
    assert same(to_rgb(whole + last * 3000), to_rgb(whole))  # what follows the end is no part of it


def test_a_large_jpeg_may_have_fewer_scans():
    whole = encoded("JPEG", photograph(640, 427), progressive=True)
    last, frame = whole[whole.rfind(b"\xff\xda") : -2], whole.index(b"\xff\xc2") + 5
    large = whole[:frame] + (8000).to_bytes(2, "big") + (20000).to_bytes(2, "big") + whole[frame + 4 : -2]
    with pytest.raises(ValueError, match=r"JPEG of more than 26 scans over 160,000,000 pixels"):
        to_rgb(large + last * 40 + b"\xff\xd9")


def test_comments_of_a_gif_are_passed_over_in_no_time():
    whole = encoded("GIF", photograph().quantize(99))
    place = 13 + (3 << ((whole[10] & 7) + 1))
    for comments in ((b"\xff" + b"c" * 255) * 99_999, b"\1c" * (MAX_PARTS + 1)):
        began = time.process_time()
        assert same(to_rgb(whole[:place] + b"\x21\xfe" + comments + b"\0" + whole[place:]), to_rgb(whole))
        assert time.process_time() - began < 20  # one by one they would be copied for minutes


def test_chunks_of_a_png_are_bounded():
    few, many = chunk(b"tEXt", b"a\0b") * 20_000, chunk(b"IDAT", b"") * (MAX_PARTS + 1)
    assert same(to_rgb(in_png(few)), photograph())
    with pytest.raises(ValueError, match="chunks, made to take forever"):
        to_rgb(in_png(many))


def test_tags_of_a_tiff_that_overlap_are_not_read_and_strips_are_bounded():
    whole = encoded("TIFF")
    (place,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, place)
    entries = [whole[place + 2 + 12 * n : place + 14 + 12 * n] for n in range(count)]

    def with_entries(body: bytes, entries: list[bytes]) -> bytes:
        table = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        return whole[:4] + struct.pack("<I", len(body)) + body[8:] + table

    body = whole + bytes(5_000_000)
    evil = [struct.pack("<HHII", 20_000 + n, 7, 5_000_000, 8) for n in range(9_000)]  # 45 GB in all
    assert same(to_rgb(with_entries(body, entries + evil)), photograph())
    strips = [entry for entry in entries if entry[:2] != struct.pack("<H", 273)]
    strips.append(struct.pack("<HHII", 273, 4, 1_000_000, 8))
    with pytest.raises(ValueError, match="TIFF of 1,000,000 strips or tiles"):
        to_rgb(with_entries(body, strips))
    strips[-1] = struct.pack("<HHII", 320, 3, 100_000_000, 8)
    with pytest.raises(ValueError, match="broken TIFF: its tags claim"):
        to_rgb(with_entries(body, strips))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_later_frames_are_not_looked_at(kind):
    frames = [photograph().rotate(3 * n) for n in range(40)]
    first = frames[0].quantize(99) if kind == "GIF" else frames[0]
    options = {"lossless": True} if kind == "WEBP" else {}
    alone = encoded(kind, first, **options)
    many = encoded(kind, first, save_all=True, append_images=frames[1:], **options)
    assert np.abs(np.asarray(to_rgb(many)).astype(int) - np.asarray(to_rgb(alone))).max() <= (
        40 if kind == "GIF" else 0
    )


# Kinds of files


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """Files that are no files: a pipe, a socket, a folder, a device."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jpg")
    Path("folder.jpg").mkdir()
    Path("device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        yield {
            "pipe.jpg": "is a named pipe, not an image",
            "socket.jpg": "cannot be read: ",
            "device.jpg": "is a device, not an image",
            "folder.jpg": "is a folder",
        }


def test_what_is_no_file_is_told_at_once_by_the_library(strange):
    processor = Aimv2Processor(published(56))
    for name, reason in strange.items():
        with pytest.raises(OSError, match=f"{name} {reason}"):
            processor(name)
        with pytest.raises(OSError, match=f"image 1: {name} {reason}"):
            processor([photograph(), name])
        assert thumbnail(name) is None


def test_what_is_no_file_is_refused_at_once_by_every_verb(strange, capsys):
    for name in strange:
        if name == "folder.jpg":
            continue
        for command in (
            ["map", name, "-m", str(FIXED_MODEL)],
            ["embed", name, "-m", str(FIXED_MODEL), "-o", "a.db"],
            ["info", name],
        ):
            assert main(command) in (1, 2), command
            captured = capsys.readouterr()
            assert name in captured.err, command


def test_an_open_stream_that_never_ends_is_bounded(monkeypatch):
    monkeypatch.setattr("mlx_aimv2.files.MAX_IMAGE_BYTES", 1 << 20)
    with (
        Path("/dev/zero").open("rb") as zeros,
        pytest.raises(OSError, match=r"/dev/zero has more than 1,048,576 bytes"),
    ):
        to_rgb(zeros)


def test_an_open_pipe_is_read_where_it_is():
    reading, writing = os.pipe()
    data = encoded("PNG")
    writer = threading.Thread(target=lambda: (os.write(writing, data), os.close(writing)))
    writer.start()
    with os.fdopen(reading, "rb") as stream:
        assert same(to_rgb(stream), photograph())
    writer.join()


@pytest.mark.parametrize(
    ("tags", "compression"),
    [({50706: b"\1\4\0\0"}, "raw"), ({37398: b"\1\0\0\0"}, "raw"), ({254: 1, 330: 8}, "raw")],
    ids=["DNG", "TIFF/EP", "NEF"],
)
def test_a_raw_photograph_is_refused_and_not_taken_for_its_thumbnail(tmp_path, tags, compression):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag] = value
        info.tagtype[tag] = 1 if isinstance(value, bytes) else 4
    data = encoded("TIFF", photograph(16, 12), tiffinfo=info, compression=compression)
    (tmp_path / "a.dng").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.dng is a raw photograph .* export it as JPEG, PNG or TIFF"):
        to_rgb(tmp_path / "a.dng")


@pytest.mark.parametrize(
    "start",
    [b"II*\0\x10\0\0\0CR\2\0", b"\0\0\0\x18ftypcrx ", b"FUJIFILMCCD-RAW 0201", b"IIRO\x08\0\0\0", b"IIU\0\x18\0\0\0"],
)
def test_raw_formats_that_are_no_tiff_are_named_too(start):
    with pytest.raises(ValueError, match=r"is a raw photograph .* export it as JPEG, PNG or TIFF"):
        to_rgb(start + bytes(999))


def test_a_jpeg_xl_image_says_what_to_do():
    with pytest.raises(ValueError, match="JPEG XL image, which Pillow does not read: convert it"):
        to_rgb(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99))


# Names that are none


def test_a_data_url_and_base64_are_told_in_one_short_line():
    text = base64.b64encode(encoded("PNG")).decode()
    for given, line in (
        (f"data:image/png;base64,{text}", r"data:image/png;base64.*is a data URL, not a file: give its bytes"),
        (text, "is an image as base64, not a file: give its bytes, base64.b64decode"),
        (base64.b64encode(encoded("JPEG")).decode()[:200], "is an image as base64, not a file"),
        ("file:///tmp/cat.jpg", "is a URL: give only the path"),
        ("a\0b", "contains a NUL"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            to_rgb(given)
        assert len(str(caught.value)) < 200
    with pytest.raises(OSError, match="File name too long") as long:
        to_rgb("x" * 5000)
    assert len(str(long.value)) < 200


# What counts as images


def test_generators_iterables_columns_and_mx_arrays_are_images(tmp_path):
    processor = Aimv2Processor(published(56))
    images = [photograph(97, 61), photograph(61, 97), photograph(73, 71)]
    files = [tmp_path / f"{n}.png" for n in range(3)]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    wanted = np.array(processor(images))

    class Column:
        """As a data set's column: it has a length and items, and is no list."""

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, number: int) -> Image.Image:
            return images[number]

        def __iter__(self):
            return iter(images)

    several = (
        (image for image in images),
        iter(files),
        map(str, files),
        dict.fromkeys(files).keys(),
        np.array([str(file) for file in files]),
        np.array(files, dtype=object),
        Column(),
        [mx.array(np.array(image)) for image in images],
        [mx.array(np.array(image) / np.float32(255)) for image in images],
    )
    for given in several:
        assert np.array_equal(processor(given), wanted), given
    batch = mx.array(np.stack([np.array(image.resize((61, 97))) for image in images]))
    assert processor(batch).shape == processor(np.array(batch)).shape == (3, 56, 56, 3)
    assert processor(batch[0]).shape == processor(str(files[0])).shape == processor(files[0]).shape == (1, 56, 56, 3)
    bf16 = (batch[0].astype(mx.float32) / 255).astype(mx.bfloat16)
    assert mx.abs(processor(bf16) - processor(batch[0])).max() < 0.05
    with pytest.raises(ValueError, match="an image is a path, bytes"):
        processor({"image": files[0]})


def test_a_native_checkpoint_whose_files_ask_for_too_much_is_refused(tmp_path):
    huge = Preprocessing(resize=(11_500, 11_500), crop=None)
    Aimv2Processor(huge).save_to(tmp_path)
    config = Aimv2VisionConfig(is_native=True)
    with pytest.raises(ValueError, match="asks for 11500x11500 pixels, 674,041 patches"):
        Aimv2Processor.from_folder(tmp_path, config=config)
    Aimv2Processor(Preprocessing(resize=1400, crop=None)).save_to(tmp_path)
    processor = Aimv2Processor.from_folder(tmp_path, config=config)
    with pytest.raises(ValueError, match=r"10,000 patches.*1400x1400.*--max-patches.* is 4,096"):
        processor.pixels(photograph(70, 70), max_patches=4096)
    assert processor.pixels(photograph(70, 70), max_patches=10_000).shape == (1400, 1400, 3)


def test_max_patches_below_one_is_refused():
    with pytest.raises(ValueError, match="--max-patches"):
        Aimv2Processor(published(None))(photograph(), max_patches=-5)


def test_opened_images_know_their_upright_size_before_they_are_decoded():
    opened = open_image(in_jpeg(encoded("JPEG"), (0xE1, b"Exif\0\0" + exif(6))))
    assert isinstance(opened, OpenImage)
    assert opened.size == (80, 90)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rim_of_a_scaled_image_turns_with_it(orientation):
    marked = np.zeros((7, 11, 3), np.uint8)
    marked[:5, :8] = 255  # what counts
    left, top, right, bottom = turned_box((8, 5), (11, 7), orientation)
    image = np.asarray(turned(Image.fromarray(marked), orientation))
    assert (image[int(top) : int(bottom), int(left) : int(right)] == 255).all()
    assert (right - left) * (bottom - top) == 40
