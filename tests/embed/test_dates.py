"""When images were taken: by EXIF, else by the file's time; `--after` and `--before` choose by it."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
from PIL import Image

from mlx_aimv2.cli import main
from mlx_aimv2.images.metadata import date_in
from mlx_aimv2.images.open import open_image
from mlx_aimv2.index.reader import Index
from tests.image_files import dated, image

DAYS = {
    "a.jpg": ("2019:12:31 23:59:59", None),
    "b.png": ("2020:01:01 00:00:00", "2024:01:01 00:00:00"),
    "c.tif": ("0000:00:00 00:00:00", "2020:05:17 09:00:00"),
    "d.webp": (None, "2020:05:18 09:00:00"),
    "e.jpg": ("    :  :     :  :  ", "nonsense"),
    "f.jpg": ("1939:09:01 05:45:00", None),
    "g.jpg": ("9999:12:31 23:59:59", None),
    "h.jpg": ("2020:13:45 99:99:99", None),
    "i.webp": ("2021:02:03 04:05:06", None),
}
"""Name -> DateTimeOriginal and DateTime."""

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"

FILE_TIME = time.mktime((2022, 7, 8, 0, 30, 0, 0, 0, -1))
"""Of all files, here; it counts for those whose EXIF tells none."""


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Images in `in`, embedded into photos.db."""
    for seed, (name, dates) in enumerate(DAYS.items()):
        path = dated(image(tmp_path / "in" / name, (60, 50), seed), *dates)
        os.utime(path, (FILE_TIME, FILE_TIME))
    monkeypatch.chdir(tmp_path)
    assert main(["embed", "in", "-m", str(REFERENCE / "fixed"), "-o", "photos.db"]) == 0


@pytest.fixture
def found(album, search):
    """Searches for the first image with these flags: flags -> first letters of the names found."""

    def run(*flags: str) -> str:
        code, out, err = search("in/a.jpg", "--json", *flags)
        assert (code, err) == (0, "")
        return "".join(sorted(Path(match["path"]).name[0] for match in json.loads(out)["matches"]))

    return run


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--after 2020 --before 2021", "bcd"),
        ("--after 2020-05 --before 2020-06", "cd"),
        ("--after 2020-05-17 --before 2020-05-18", "c"),
        ("--before 2020-01-01", "af"),
        ("--before 1970", "f"),
        ("--after 9999", "g"),
        ("--after 2021 --before 2022-07-08", "i"),
        ("--after 2022-07-08 --before 2022-07-09", "eh"),
        ("--after 2021 --before 2020", ""),
        ("--after 2020 --before 2021 --under in/b.png", ""),
    ],
)
def test_a_span_begins_with_its_first_day_and_ends_before_its_last(found, flags, names):
    assert found(*flags.split()) == names


def test_python_and_duplicates_take_the_same_words(album, capsys):
    with Index.open("photos.db") as index:
        first = index.vector(str(Path("in/a.jpg").absolute()))
        spans = [{"after": 2020, "before": "2021"}, {"after": "2020-05-17", "before": "2020-06"}]
        names = [{Path(one.path).name for one in index.search(first, k=9, **span)} for span in spans]
        assert names == [{"b.png", "c.tif", "d.webp"}, {"c.tif", "d.webp"}]
    Path("in/again.jpg").write_bytes(Path("in/a.jpg").read_bytes())
    assert main(["embed", "in", "-o", "photos.db"]) == 0
    for span, wanted in (("--before 2020", 1), ("--after 2020", 0)):
        capsys.readouterr()
        assert main(["duplicates", "photos.db", "--json", *span.split()]) == 0
        assert len(json.loads(capsys.readouterr().out)["groups"]) == wanted


@pytest.mark.parametrize("verb", [["search", "photos.db", "in/a.jpg"], ["duplicates", "photos.db"]])
@pytest.mark.parametrize("flag", ["after", "before"])
@pytest.mark.parametrize(
    "date", ["17.5.2024", "2024-13", "2024-02-30", "24", "2024-5", "0000", "", "2024-05-17T10:00", "٢٠٢٤"]
)
def test_what_is_no_date_is_one_line(album, capsys, verb, flag, date):
    capsys.readouterr()
    assert main([*verb, f"--{flag}", date]) == 2
    err = capsys.readouterr().err
    assert f"--{flag}" in err and "2024-05-17" in err and err.count("\n") == 1


def test_a_moved_image_keeps_its_date_and_a_span_goes_with_every_output(album, capfdbinary):
    Path("in/a.jpg").rename("in/z.jpg")
    assert main(["embed", "in", "-o", "photos.db"]) == 0
    capfdbinary.readouterr()
    assert main(["search", "photos.db", "in/z.jpg", "-0", "--after", "2019", "--before", "2020"]) == 0
    assert capfdbinary.readouterr().out == os.fsencode(Path("in/z.jpg").absolute()) + b"\0"


def test_a_photograph_of_an_iphone_has_its_date(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    picture = Image.open(dated(image(tmp_path / "a.jpg", (64, 48)), "2024:05:17 10:00:00"))
    heif.from_pillow(picture).save(tmp_path / "a.heic", quality=-1, exif=picture.info["exif"])
    assert open_image(tmp_path / "a.heic").taken == "2024-05-17"


def exif(
    original: bytes, *, order: str = "<", first: int = 8, table: int = 26, text: int = 44, count: int = 20
) -> bytes:
    """EXIF with a table of one tag, which points to one with DateTimeOriginal."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", first)
    tables = struct.pack(f"{order}HHHII I", 1, 0x8769, 4, 1, table, 0)
    tables += struct.pack(f"{order}HHHII I", 1, 0x9003, 2, count, text, 0)
    return head + tables + original


@pytest.mark.parametrize(
    ("block", "day"),
    [
        (exif(b"2024:05:17 10:00:00\0"), "2024-05-17"),
        (b"Exif\0\0" + exif(b"2024:05:17 10:00:00\0", order=">"), "2024-05-17"),
        (exif(b"2024-05-17 10:00:00\0"), "2024-05-17"),
        (exif(b"2024:05:17"), "2024-05-17"),
        (exif(b"2024:05:1"), ""),
        (exif(b"2024:00:17 10:00:00\0"), ""),
        (exif(b"0000:05:17 10:00:00\0"), ""),
        (exif(b"2024:05:17", table=8), ""),  # a table that points to itself
        (exif(b"2024:05:17", table=2**32 - 1), ""),
        (exif(b"2024:05:17", text=2**32 - 1), ""),
        (exif(b"2024:05:17", first=2**32 - 1), ""),
        (exif(b"2024:05:17", count=2**32 - 1), "2024-05-17"),
        (b"II+\0" + struct.pack("<HHQQHHQQQ", 8, 0, 16, 1, 0x0132, 2, 20, 2**63, 0), ""),  # BigTIFF
        (b"II*\0", ""),
        (b"", ""),
        (None, ""),
        ("2024:05:17", ""),
    ],
)
def test_hostile_exif_has_a_date_or_none(block, day):
    assert date_in(block) == day
