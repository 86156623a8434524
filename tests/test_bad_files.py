"""Each bad file in a folder gets its reason, and none of them stops the others."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.cli import main
from mlx_aimv2.cli.output import escape
from mlx_aimv2.index.reader import Index

FIXED = Path(__file__).parent / "golden" / "reference" / "fixed"


def encoded(kind: str, size: tuple[int, int] = (90, 80), **options: object) -> bytes:
    low = np.random.default_rng(1).integers(0, 256, (80, 90, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(low).resize(size).save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_png(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 999)) + png_chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    data = bytearray(encoded("JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


JPEG, PNG = encoded("JPEG"), encoded("PNG")
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)

# name -> (content, what the reason must say)
BAD_CONTENTS: dict[bytes, tuple[bytes, str]] = {
    b"cut-1.jpg": (JPEG[: len(JPEG) // 10], "broken JPEG"),  # before its pixels
    **{b"cut-%d.png" % n: (PNG[: len(PNG) * n // 10], "cannot be read as an image") for n in range(1, 10)},
    b"cut.webp": (encoded("WEBP")[:200], "broken WEBP"),
    b"cut.tif": (encoded("TIFF")[:3000], "image"),
    b"zero.jpg": (b"", "is empty"),
    b"zero.png": (b"", "is empty"),
    b"text.jpg": (b"these are only words\n" * 9, "is not an image"),
    b"page.png": (b"<!doctype html><html><body>404</body></html>", "is not an image"),
    b"drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is not an image"),
    b"film.jpg": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(99), "is not an image"),
    b"print.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    b"blank.bmp": (bytes(4096), "is not an image"),
    b"noise.gif": (np.random.default_rng(2).bytes(4096), "is not an image"),
    b"header.gif": (b"GIF89a\x10\x00\x10\x00\x80\x00\x00", "broken GIF"),
    b"phone.heic": (HEIC, "HEIC"),
    b"huge.png": (huge_png(60000, 60000), "60000x60000 pixels"),
    b"endless.png": (huge_png(2**31 - 1, 2**31 - 1), "pixels"),
    b"huge.jpg": (huge_jpeg(), "65000x65000 pixels"),
    b"dot.png": (encoded("PNG", (1, 1)), "single pixel"),
    b"ribbon.png": (encoded("PNG", (1, 90000)), "too narrow"),
    b"crc.png": (flipped(PNG, 20), "broken PNG"),
    b"not-utf8-\xff\xfe.jpg": (b"bad", "is not an image"),
    b"new\nline.jpg": (b"bad", "is not an image"),
    b"\x1b[31mred.jpg": (b"bad", "is not an image"),
}
GOOD: dict[bytes, bytes] = {
    b"a.jpg": JPEG,
    b"b.png": PNG,
    b"wrong-suffix.png": JPEG,
    b"wrong-suffix.jpg": PNG,
    b"good-\xff\xfe.jpg": JPEG,
    b"good\nline.jpg": JPEG,
    b"<img src=x onerror=alert(1)>.jpg": JPEG,
    b"'; DROP TABLE images; --.jpg": JPEG,
    b"%s{0}$HOME`ls`.jpg": JPEG,
    "größe-大.jpg".encode(): JPEG,
    b"-o.jpg": JPEG,
    b"cut-9.jpg": JPEG[: len(JPEG) * 9 // 10],
    b"z.webp": encoded("WEBP"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with every kind of bad file among good ones, and the reason expected for each of the bad."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    expected = {}

    def path(name: bytes) -> Path:
        return tmp_path / "in" / os.fsdecode(name)

    for name, content in GOOD.items():
        path(name).write_bytes(content)
    for name, (content, reason) in BAD_CONTENTS.items():
        path(name).write_bytes(content)
        expected[name] = reason
    path(b"folder.jpg").mkdir()
    path(b"dangling.jpg").symlink_to("nowhere.jpg")
    path(b"self.jpg").symlink_to("self.jpg")
    path(b"loop").symlink_to(".")
    path(b"device.jpg").symlink_to("/dev/null")
    os.mkfifo(path(b"pipe.jpg"))
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path / "in")  # a socket's name may not be long
        server.bind("socket.jpg")
        monkeypatch.chdir(tmp_path)
    with path(b"sparse.jpg").open("wb") as file:
        file.truncate((1 << 30) + 1)
    for name in (b"secret.jpg", b"deleted.jpg"):
        path(name).write_bytes(JPEG)
    path(b"secret.jpg").chmod(0)
    expected |= {
        b"folder.jpg": "is a folder",
        b"dangling.jpg": "dangling link",
        b"self.jpg": "dangling link",
        b"loop": "back to a folder",
        b"device.jpg": "is a device",
        b"pipe.jpg": "is a named pipe",
        b"socket.jpg": "is a socket",
        b"sparse.jpg": "more than an image",
        b"secret.jpg": "may not be read: permission denied",
        b"deleted.jpg": "was deleted",
    }
    _delete_and_refuse(monkeypatch, path)
    return expected


def _delete_and_refuse(monkeypatch, path) -> None:
    """Deletes one file when it is its turn; refuses another even to root, whom no mode stops."""
    really = os.open

    def open_(name, *arguments, **keywords):
        if str(name) == str(path(b"deleted.jpg")):
            Path(name).unlink()
        if str(name) == str(path(b"secret.jpg")):
            raise PermissionError(13, "Permission denied", name)
        return really(name, *arguments, **keywords)

    monkeypatch.setattr(os, "open", open_)


def test_every_bad_file_gets_its_reason_and_every_good_one_its_embedding(folder, capsys):
    assert len(folder) >= 40
    code = main(["embed", "in", "-m", str(FIXED), "-o", "photos.db"])
    lines = capsys.readouterr().err.splitlines()
    assert code == 1
    root = Path("in").absolute()
    for name, reason in folder.items():
        start = f"mlx-aimv2: {escape(str(root / os.fsdecode(name)))} "
        mine = [line.removeprefix(start) for line in lines if line.startswith(start)]
        assert len(mine) == 1, name
        assert reason in mine[0], (name, mine)
    notes = [line for line in lines if "cut-9.jpg ends early" in line]
    assert len(notes) == 1 and len(lines) == len(folder) + 1
    assert all(line.isprintable() for line in lines)
    with Index.open("photos.db") as index:
        assert sorted(os.fsencode(Path(one).name) for one in index.paths()) == sorted(GOOD)
        a = index.vector(str(Path("in/a.jpg").absolute()))
        for one in index.embeddings():
            if GOOD[os.fsencode(Path(one.path).name)] is JPEG:
                np.testing.assert_allclose(one.vector, a, rtol=1e-3, atol=1e-3)


def test_the_same_again_reports_the_same_and_embeds_nothing_twice(folder, capsys):
    main(["embed", "in", "-m", str(FIXED), "-o", "photos.db"])
    first = capsys.readouterr().err.splitlines()
    code = main(["embed", "in", "-m", str(FIXED), "-o", "photos.db"])
    out, err = capsys.readouterr()
    assert code == 1
    assert f"({len(GOOD)} unchanged, {len(folder) - 1} failed)" in out
    assert set(err.splitlines()) == {line for line in first if "was deleted" not in line and "ends early" not in line}


def test_nothing_but_bad_files_is_no_success(folder, capsys):
    for name in GOOD:
        (Path("in") / os.fsdecode(name)).unlink()
    assert main(["embed", "in", "-m", str(FIXED), "-o", "photos.db"]) == 1
    assert "no image could be embedded" in capsys.readouterr().err
    assert not Path("photos.db").exists()
