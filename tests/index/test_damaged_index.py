"""A damaged index ends in one line that says what to do, and takes no change."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from mlx_aimv2.cli import main
from mlx_aimv2.embed.encode import made_by
from mlx_aimv2.index.export import export
from mlx_aimv2.index.nearest import Vectors
from mlx_aimv2.index.reader import Index
from mlx_aimv2.index.writer import IndexWriter
from tests.small_index import MADE, WIDTH, change, some

DAMAGE = {
    "no width": "DELETE FROM about WHERE name = 'width'",
    "axes": "UPDATE about SET value = '7' WHERE name = 'axes'",
    "dtype": "UPDATE about SET value = 'int7' WHERE name = 'dtype'",
    "width": "UPDATE about SET value = '9' WHERE name = 'width'",
    "width as text": "UPDATE about SET value = 'x' WHERE name = 'width'",
    "no JSON": "UPDATE about SET value = 'x' WHERE name = 'provenance'",
    "a list": "UPDATE about SET value = '[1]' WHERE name = 'provenance'",
    "nested": f"UPDATE about SET value = '{'[' * 100_000}' WHERE name = 'provenance'",
    "no table about": "DROP TABLE about",
    "no images": "DROP TABLE images",
    "no blocks": "DROP TABLE blocks",
    "empty blocks": "UPDATE blocks SET vectors = x''",
    "deleted blocks": "DELETE FROM blocks",
    "broken ids": "UPDATE blocks SET images = x'01'",
    "text for bytes": "UPDATE blocks SET vectors = 'abc'",
    "whole numbers as names": "UPDATE images SET path = id",
    "an image without vector": (
        "INSERT INTO images (path, size, mtime_ns, sha256, block) VALUES (x'41', 1, 1, x'00', 99)"
    ),
}


@pytest.mark.parametrize("command", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_search_in_a_damaged_index_says_so_and_finds_nothing(photos, command):
    change(photos, command)
    with pytest.raises(ValueError, match=r"^photos\.db is damaged \(.*embed again$"), Index.open(photos) as index:
        index.search(np.ones(index.width))


@pytest.mark.parametrize("name", ["empty blocks", "deleted blocks", "broken ids", "an image without vector"])
def test_an_export_of_a_damaged_index_says_so(photos, name):
    change(photos, DAMAGE[name])
    with pytest.raises(ValueError, match=r"^photos\.db is damaged"), Index.open(photos) as index:
        export(index, Path("photos.npz"), kind="npz")
    assert [path.name for path in Path().iterdir()] == ["photos.db"]


@pytest.mark.parametrize("name", ["deleted blocks", "broken ids", "empty blocks"])
def test_a_damaged_index_takes_no_change(photos, name):
    change(photos, DAMAGE[name] if name != "empty blocks" else "UPDATE blocks SET images = x''")
    with IndexWriter.open(photos) as index:
        with pytest.raises(ValueError, match=r"^photos\.db is damaged"):
            index.remove(["/1.jpg"])
        assert len(index) == 5


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFE01])
def test_vectors_that_are_not_finite_are_not_ranked(photos, bits):
    with sqlite3.connect(photos) as db:
        numbers = np.frombuffer(db.execute("SELECT vectors FROM blocks").fetchone()[0], np.uint16).copy()
        numbers[WIDTH + 2] = bits
        db.execute("UPDATE blocks SET vectors = ?", (numbers.tobytes(),))
    db.close()
    with pytest.raises(ValueError, match="vectors that are not finite"), Index.open(photos) as index:
        index.search(np.ones(WIDTH))


def test_what_a_gpu_reads_is_checked_too():
    block = np.arange(2).astype("<i8").tobytes(), np.array([[1, 0], [0, np.inf]], np.float16).tobytes()
    with pytest.raises(FloatingPointError, match="vectors that are not finite"):
        Vectors.read([block], 2, width=2, dtype="float16", on_gpu=True)


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_vectors_of_float32_are_checked_too(tmp_path, number):
    with IndexWriter.create(tmp_path / "a.db", provenance=MADE, width=WIDTH, dtype="float32") as index:
        index.add(some(3))
    with sqlite3.connect(tmp_path / "a.db") as db:
        numbers = np.frombuffer(db.execute("SELECT vectors FROM blocks").fetchone()[0], np.float32).copy()
        numbers[WIDTH + 2] = number
        db.execute("UPDATE blocks SET vectors = ?", (numbers.tobytes(),))
    db.close()
    with Index.open(tmp_path / "a.db") as index:
        with pytest.raises(ValueError, match="vectors that are not finite"):
            index.search(np.ones(WIDTH))
        with pytest.raises(ValueError, match=r"a\.db is damaged \(an image whose vector is missing or broken\)"):
            index.vector("/images/00001.jpg")


@pytest.mark.parametrize(
    ("field", "value"),
    [("checkpoint", None), ("weights", 5), ("weights", {}), ("layer", "x"), ("norm", 2), ("width", 9)],
)
def test_what_an_index_says_of_its_model_is_checked(photos, field, value):
    change(photos, "UPDATE about SET value = ? WHERE name = 'provenance'", json.dumps(MADE | {field: value}))
    with Index.open(photos) as index, pytest.raises(ValueError, match=r"^photos\.db is damaged"):
        made_by(index)
    assert main(["info", "photos.db"]) == 0


@pytest.mark.parametrize("command", ["size = 'x'", "mtime_ns = 1.5", "sha256 = 'text'"])
def test_what_an_index_says_of_a_file_is_checked(photos, command):
    change(photos, f"UPDATE images SET {command} WHERE id = 2")
    with Index.open(photos) as index:
        with pytest.raises(ValueError, match=r"^photos\.db is damaged \(what it records about '/1.jpg'\)"):
            index.stamp("/1.jpg")
        with pytest.raises(ValueError, match=r"^photos\.db is damaged"):
            list(index.stamps())


def test_a_cut_index_is_to_be_restored(photos):
    photos.write_bytes(photos.read_bytes()[: 2 * 32768])
    line = r"is damaged \(database disk image is malformed\): restore it"
    with pytest.raises(ValueError, match=line), Index.open(photos) as index:
        index.search(np.ones(WIDTH))


@pytest.mark.parametrize("verb", [["info", "empty.db"], ["search", "empty.db", "a text"]])
def test_an_empty_file_is_called_empty(photos, verb, capsys):
    Path("empty.db").touch()
    assert main(verb) == 2
    assert "empty.db is" in (err := capsys.readouterr().err)
    assert "empty" in err.split("empty.db is", 1)[1]


def test_tables_whose_text_is_not_utf8_are_damage(photos):
    photos.write_bytes(photos.read_bytes().replace(b"CREATE TABLE about", b"CREATE TABLE ab\xa5ut", 1))
    with pytest.raises(ValueError, match=r"photos\.db is damaged"):
        Index.open(photos)
