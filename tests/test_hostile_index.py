"""Does a damaged or foreign index, or an output that would do harm, end in one line that says what to do?"""

import io
import json
import shutil
import sqlite3
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import cli
from mlx_aimv2.bundled import digits_checkpoint, photographs
from mlx_aimv2.cli import main, progress, say
from mlx_aimv2.embed import provenance
from mlx_aimv2.embed.pooling import Pooling
from mlx_aimv2.embed.provenance import made_by
from mlx_aimv2.index.export import export, target
from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.index.writer import IndexWriter
from mlx_aimv2.safe_write import atomic_file

WIDTH = 7
MADE = {
    "checkpoint": "somewhere",
    "commit": None,
    "dtype": "float32",
    "pool": "mean",
    "layer": None,
    "norm": False,
    "max_patches": None,
    "weights": {"digest": "00", "sample": [1.0]},
}
DAMAGE = {
    "no width": "DELETE FROM about WHERE name = 'width'",
    "axes": "UPDATE about SET value = '7' WHERE name = 'axes'",
    "dtype": "UPDATE about SET value = 'int7' WHERE name = 'dtype'",
    "width": "UPDATE about SET value = '9' WHERE name = 'width'",
    "width in words": "UPDATE about SET value = 'x' WHERE name = 'width'",
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


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Five vectors of seven numbers in `photos.db`."""
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(3).normal(size=(5, WIDTH)).astype(np.float32)
    with IndexWriter.create("photos.db", provenance=MADE, width=WIDTH, dtype="float16") as index:
        index.add(Embedding(f"/{number}.jpg", 5, 6, bytes(32), vector) for number, vector in enumerate(vectors))
    return Path("photos.db")


def change(path: Path, command: str, *values: object) -> None:
    with sqlite3.connect(path) as db:
        db.execute(command, values)
    db.close()


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("command", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_search_in_a_damaged_index_says_so_and_finds_nothing(photos, command, once):
    change(photos, command)
    with pytest.raises(ValueError, match=r"^photos\.db is damaged \(.*embed anew$"), Index.open(photos) as index:
        index.search(np.ones(index.width), once=once)


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
    for once in (False, True):
        with pytest.raises(ValueError, match="vectors that are not finite"), Index.open(photos) as index:
            index.search(np.ones(WIDTH), once=once)


@pytest.mark.parametrize(
    ("field", "value"),
    [("checkpoint", None), ("weights", 5), ("weights", {}), ("layer", "x"), ("norm", 2), ("width", 9)],
)
def test_what_an_index_says_of_its_model_is_checked(photos, field, value):
    change(photos, "UPDATE about SET value = ? WHERE name = 'provenance'", json.dumps(MADE | {field: value}))
    with Index.open(photos) as index, pytest.raises(ValueError, match=r"^photos\.db is damaged"):
        made_by(index)
    assert main(["info", "photos.db"]) == 0


def test_an_index_that_says_nothing_of_its_model_is_not_embedded_into(photos, capsys):
    change(photos, "UPDATE about SET value = '{}' WHERE name = 'provenance'")
    assert main(["embed", ".", "-o", "photos.db"]) == 2
    assert "photos.db does not say which model made it" in capsys.readouterr().err


def test_a_cut_index_is_to_be_restored(photos):
    photos.write_bytes(photos.read_bytes()[: 2 * 32768])
    line = r"is damaged \(database disk image is malformed\): restore it"
    with pytest.raises(ValueError, match=line), Index.open(photos) as index:
        index.search(np.ones(WIDTH))


@pytest.mark.parametrize("verb", [["info", "empty.db"], ["search", "empty.db", "words"]])
def test_an_empty_file_is_called_empty(photos, verb, capsys):
    Path("empty.db").touch()
    assert main(verb) == 2
    assert "empty.db is" in (err := capsys.readouterr().err)
    assert "empty" in err.split("empty.db is", 1)[1]


def test_the_default_layer_is_spelled_out(photos, capsys):
    assert main(["info", "photos.db"]) == 0
    assert "last, after the final norm" in (out := capsys.readouterr().out)
    assert "\nnorm" not in out
    assert main(["info", "photos.db", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer"] is None


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("photos.db", "ends in .html"),
        ("page.png", "ends in .html"),
        ("folder.html", "is a folder"),
        ("link.html", "would replace the index"),
        ("image.html", "would replace the index or the image"),
        ("nowhere/page.html", "make that folder first"),
    ],
)
def test_a_page_replaces_neither_index_nor_image(photos, page, words, capsys):
    Path("folder.html").mkdir()
    Path("link.html").symlink_to("photos.db")
    Path("a.jpg").write_bytes(b"an image")
    Path("image.html").symlink_to("a.jpg")
    before = photos.read_bytes()
    assert main(["search", "photos.db", "a.jpg", "--html", page]) == 2
    assert words in capsys.readouterr().err
    assert photos.read_bytes() == before
    assert Path("a.jpg").read_bytes() == b"an image"
    assert not Path("page.png").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("y.npz", "is the name of its export"),
        ("y.NPZ", "is the name of its export"),
        ("folder.db", "which is a folder"),
        ("foreign.db", "mlx-aimv2 did not write"),
    ],
)
def test_an_export_replaces_neither_its_index_nor_a_strangers_file(photos, output, words, capsys):
    Path("folder.npz").mkdir()
    np.savez("foreign.npz", weights=np.ones(3))
    assert main(["embed", ".", "-m", "nowhere", "-o", output, "--export", "npz"]) == 2
    assert words in capsys.readouterr().err
    assert not Path(output).exists()


@pytest.mark.parametrize("kind", ["npz", "safetensors", "jsonl"])
def test_an_export_replaces_an_earlier_one(photos, kind):
    with Index.open(photos) as index:
        export(index, Path(f"photos.{kind}"), kind=kind)
    assert target(photos, kind) == Path(f"photos.{kind}")


def test_who_comes_second_with_a_new_index_is_told(photos):
    shutil.copy(photos, "other.db")
    with pytest.raises(FileExistsError, match="already exists"):
        IndexWriter.create("other.db", provenance={}, width=WIDTH, dtype="float16")


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [Full(), None], ids=["full", "closed"])
def test_a_log_that_cannot_be_written_does_not_stop_the_work(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(cli, "SECONDS_IN_LOG", -1.0)
    say("a line")
    with progress("images") as advance:
        say("a line")
        advance(3, 3)
    monkeypatch.undo()


def test_features_that_are_not_finite_in_float32_are_the_weights_fault(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pooling, "__call__", lambda self, model, pixels: mx.full((len(pixels), 3), mx.nan))
    image = str(photographs()[0])
    for dtype, advice in (("float32", "the model's weights are damaged"), ("float16", "load the model as float32")):
        assert main(["embed", image, "-m", str(digits_checkpoint()), "-o", "a.db", "--dtype", dtype]) == 1
        assert advice in capsys.readouterr().err


def test_a_page_that_breaks_off_leaves_the_old_one(photos):
    Path("page.html").write_text("old")
    with pytest.raises(KeyError), atomic_file(Path("page.html")) as file:
        file.write(b"half")
        raise KeyError
    assert Path("page.html").read_text() == "old"
    assert sorted(path.name for path in Path().iterdir()) == ["page.html", "photos.db"]


def test_an_output_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = ["embed", str(photographs()[0]), "-m", str(digits_checkpoint()), "-o", "~/x.db"]
    assert main(command) == 0
    assert main(["search", "x.db", str(photographs()[0]), "--html=~/p.html"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "x.db"]


def test_who_makes_an_index_at_the_same_time_is_told_to_run_again(photos, monkeypatch, capsys):
    describe = provenance.describe

    def slow(*arguments, **named):
        shutil.copy(photos, "new.db")
        return describe(*arguments, **named)

    monkeypatch.setattr(provenance, "describe", slow)
    assert main(["embed", str(photographs()[0]), "-m", str(digits_checkpoint()), "-o", "new.db"]) == 2
    assert "another mlx-aimv2 embed made new.db meanwhile: run it again" in capsys.readouterr().err
