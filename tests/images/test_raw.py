"""Raw photographs are read by LibRaw: the preview in them where it is large enough, else at half size, and upright."""

import io
import struct
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.images import Policy
from mlx_aimv2.images.find import list_images
from mlx_aimv2.images.open import open_image
from mlx_aimv2.images.raw import can_read_raw

CORNERS = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
CORNERS |= {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}
"""EXIF's orientation -> where the top left corner of what the sensor saw goes."""

FLIPS = {1: 0, 2: 1, 3: 3, 4: 2, 5: 4, 6: 6, 7: 7, 8: 5}
"""The same -> LibRaw's number."""


def scene(width: int, height: int) -> Image.Image:
    """Grey, with a red corner at the top left."""
    levels = np.full((height, width, 3), 90, np.uint8)
    levels[: height // 3, : width // 3] = (255, 0, 0)
    return Image.fromarray(levels)


def jpeg(image: Image.Image, orientation: int | None = None) -> bytes:
    stream = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(stream, "JPEG", quality=90, exif=exif.tobytes())
    return stream.getvalue() + bytes(len(stream.getvalue()) % 2)


def corner(levels: np.ndarray) -> str:
    """Where the red corner is."""
    rows, columns = np.nonzero((levels[..., 0] > 150) & (levels[..., 1] < 90) & (levels[..., 2] < 90))
    height, width, _ = levels.shape
    return f"{'top' if rows.mean() < height / 2 else 'bottom'} {'left' if columns.mean() < width / 2 else 'right'}"


def table(tags: list[tuple[int, int, object]], start: int) -> bytes:
    """A TIFF's table at an offset: tags as (number, type, values or bytes)."""
    entries, more, end = b"", b"", start + 2 + 12 * len(tags) + 4
    for tag, kind, value in sorted(tags, key=lambda one: one[0]):
        if isinstance(value, bytes):
            raw, count = value, len(value)
        else:
            values = value if isinstance(value, list) else [value]
            raw = b"".join(struct.pack({3: "<H", 4: "<I"}.get(kind, "<ii"), *one) for one in ratios(kind, values))
            count = len(values)
        at = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack("<I", end + len(more))
        more += raw + bytes(len(raw) % 2) if len(raw) > 4 else b""
        entries += struct.pack("<HHI", tag, kind, count) + at
    return struct.pack("<H", len(tags)) + entries + bytes(4) + more


def ratios(kind: int, values: list[int]) -> list[tuple[int, ...]]:
    return [(value, 1) if kind in (5, 10) else (value,) for value in values]


def dng(width: int, height: int, orientation: int, preview: bytes = b"") -> bytes:
    """A DNG of the scene as a sensor sees it through three colours of filters, with a JPEG in front of it or none."""
    levels = (np.asarray(scene(width, height)) / 255) ** 2.2 * 60000
    mosaic = np.empty((height, width), "<u2")
    for row, column, colour in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        mosaic[row::2, column::2] = levels[row::2, column::2, colour]
    camera = [(50706, 1, b"\1\4\0\0"), (50708, 2, b"Made Up\0"), (271, 2, b"Made\0"), (272, 2, b"Up\0")]
    camera += [(274, 3, orientation), (306, 2, b"2024:05:17 10:00:00\0")]
    camera += [(50721, 10, [1, 0, 0, 0, 1, 0, 0, 0, 1]), (50728, 5, [1, 1, 1])]
    sensor = [(254, 4, 0), (256, 4, width), (257, 4, height), (258, 3, 16), (259, 3, 1), (262, 3, 32803), (277, 3, 1)]
    sensor += [(278, 4, height), (279, 4, 2 * width * height), (33421, 3, [2, 2]), (33422, 1, b"\0\1\1\2")]
    sensor += [(50717, 4, 65535)]
    if not preview:
        end = 8 + len(table([*camera, *sensor, (273, 4, 0)], 8))
        return b"II*\0\x08\0\0\0" + table([*camera, *sensor, (273, 4, end)], 8) + mosaic.tobytes()
    with Image.open(io.BytesIO(preview)) as small:
        wide, high = small.size
    first = [*camera, (254, 4, 1), (256, 4, wide), (257, 4, high), (258, 3, [8, 8, 8]), (259, 3, 7), (262, 3, 6)]
    first += [(277, 3, 3), (278, 4, high), (279, 4, len(preview))]
    second = 8 + len(table([*first, (273, 4, 0), (330, 4, 0)], 8))
    end = second + len(table([*sensor, (273, 4, 0)], second))
    tables = table([*first, (273, 4, end), (330, 4, second)], 8)
    tables += table([*sensor, (273, 4, end + len(preview))], second)
    return b"II*\0\x08\0\0\0" + tables + preview + mosaic.tobytes()


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("preview", [None, (96, 64), (30, 20)])
def test_a_dng_is_developed_or_its_preview_taken_and_it_is_upright(tmp_path, orientation, preview):
    pytest.importorskip("rawpy")
    (tmp_path / "a.DNG").write_bytes(dng(96, 64, orientation, b"" if preview is None else jpeg(scene(*preview))))
    assert list_images(tmp_path).files == [str(tmp_path / "a.DNG")]
    opened = open_image(tmp_path / "a.DNG", policy=Policy(decode="fast"))
    long, short = (96, 64) if preview == (96, 64) else (48, 32)
    assert opened.size == ((long, short) if orientation < 5 else (short, long))
    assert corner(np.asarray(opened.rgb()[0])) == CORNERS[orientation]
    assert opened.taken == "2024-05-17"


def test_what_libraw_cannot_read_and_a_sensor_of_too_many_pixels_are_one_line(tmp_path):
    pytest.importorskip("rawpy")
    whole = dng(96, 64, 1)
    for data in (whole[:400], b"FUJIFILMCCD-RAW 0201" + bytes(999)):
        with pytest.raises(ValueError, match=r"a\.dng is a raw photograph .* LibRaw cannot read: .*export it as JPEG"):
            open_image(data, name="a.dng")
    with pytest.raises(ValueError, match=r"a\.dng has 96x64 pixels, more than 999"):
        open_image(whole, name="a.dng", policy=Policy(max_pixels=999))


@pytest.fixture
def libraw(monkeypatch):
    """A stand-in for rawpy: (size, flip, preview) -> what any raw photograph is from now on."""
    module = ModuleType("rawpy")
    module.LibRawError = type("LibRawError", (Exception,), {})
    module.ThumbFormat = SimpleNamespace(JPEG="jpeg")

    def become(size: tuple[int, int], flip: int, preview: bytes | None, kind: str = "jpeg", colours: int = 3) -> None:
        class Raw:
            sizes = SimpleNamespace(width=size[0], height=size[1], flip=flip)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

            def extract_thumb(self):
                if preview is None:
                    raise module.LibRawError("no thumbnail")
                return SimpleNamespace(format=kind, data=preview)

            def postprocess(self, *, half_size, use_camera_wb):
                assert half_size and use_camera_wb
                return np.zeros((size[1] // 2, size[0] // 2, colours), np.uint8)

        module.imread = lambda stream: Raw()

    monkeypatch.setitem(sys.modules, "rawpy", module)
    return become


@pytest.mark.parametrize("orientation", CORNERS)
def test_a_preview_is_turned_once(libraw, orientation):
    for own in (None, 1, orientation):  # cameras write it beside the preview, into it, or into both
        libraw((96, 64), FLIPS[orientation], jpeg(scene(96, 64), own))
        opened = open_image(b"IIRO" + bytes(99), name="a.orf")
        assert corner(np.asarray(opened.rgb()[0])) == CORNERS[orientation], own
    if orientation >= 5:  # some programs turn the preview's pixels
        libraw((96, 64), FLIPS[orientation], jpeg(scene(64, 96)))
        assert open_image(b"IIRO" + bytes(99), name="a.orf").size == (64, 96)


@pytest.mark.parametrize(
    ("sensor", "preview", "size"),
    [
        ((6000, 4000), (1024, 683), (1024, 683)),
        ((6000, 4000), (1022, 683), (3000, 2000)),
        ((6000, 4000), (160, 120), (3000, 2000)),
        ((640, 480), (320, 240), (320, 240)),
        ((640, 480), (318, 240), (320, 240)),
        ((640, 480), None, (320, 240)),
    ],
)
def test_a_preview_counts_that_is_large_enough(libraw, sensor, preview, size):
    libraw(sensor, 0, None if preview is None else jpeg(scene(*preview)))
    assert open_image(b"IIU\0" + bytes(99)).size == size


def test_a_sensor_without_colours_is_grey(libraw):
    libraw((640, 480), 0, None, colours=1)
    assert open_image(b"IIU\0" + bytes(99)).rgb()[0].mode == "RGB"


@pytest.mark.parametrize(("preview", "kind"), [(b"\xff\xd8\xff broken", "jpeg"), (b"\0" * 99, "bitmap")])
def test_a_preview_that_cannot_be_read_is_none(libraw, preview, kind):
    libraw((640, 480), 0, preview, kind)
    assert open_image(b"IIU\0" + bytes(99)).size == (320, 240)


def test_without_the_extra_raw_photographs_are_skipped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.images.find.can_read_raw", lambda: False)
    monkeypatch.setitem(sys.modules, "rawpy", None)
    (tmp_path / "a.nef").write_bytes(dng(96, 64, 1))
    listing = list_images(tmp_path)
    assert listing.files == [] and listing.skipped == {".nef": 1}
    with pytest.raises(ValueError, match=r"a\.nef is a raw photograph \(DNG\): pip install 'mlx-aimv2\[raw\]'"):
        open_image(tmp_path / "a.nef")
    monkeypatch.setattr("mlx_aimv2.images.find.can_read_raw", lambda: True)
    assert list_images(tmp_path).files == [str(tmp_path / "a.nef")]
    assert can_read_raw() in (True, False)
