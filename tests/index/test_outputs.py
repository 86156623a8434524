"""An output that would do harm is refused, and one that breaks off leaves the old one."""

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


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_an_index_that_says_nothing_of_its_model_is_not_embedded_into(photos, capsys):
    change(photos, "UPDATE about SET value = '{}' WHERE name = 'provenance'")
    assert main(["embed", ".", "-o", "photos.db"]) == 2
    assert "photos.db does not say which model made it" in capsys.readouterr().err


def test_the_default_layer_is_described(photos, capsys):
    assert main(["info", "photos.db"]) == 0
    assert "last, after the final norm" in (out := capsys.readouterr().out)
    assert "\nnorm" not in out
    assert main(["info", "photos.db", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer"] is None


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("photos.db", "ends in .html"),
        ("page.png", "ends in .html"),
        ("folder.html", "is a folder"),
        ("link.html", "would replace the index"),
        ("image.html", "would replace the index or the image"),
        ("nowhere/page.html", "make that folder first"),
    ],
)
def test_a_page_replaces_neither_index_nor_image(photos, page, message, capsys):
    Path("folder.html").mkdir()
    Path("link.html").symlink_to("photos.db")
    Path("a.jpg").write_bytes(b"an image")
    Path("image.html").symlink_to("a.jpg")
    before = photos.read_bytes()
    assert main(["search", "photos.db", "a.jpg", "--html", page]) == 2
    assert message in capsys.readouterr().err
    assert photos.read_bytes() == before
    assert Path("a.jpg").read_bytes() == b"an image"
    assert not Path("page.png").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("y.npz", "is the name of its export"),
        ("y.NPZ", "is the name of its export"),
        ("folder.db", "which is a folder"),
        ("foreign.db", "mlx-aimv2 did not write"),
    ],
)
def test_an_export_replaces_neither_its_index_nor_a_strangers_file(photos, output, message, capsys):
    Path("folder.npz").mkdir()
    np.savez("foreign.npz", weights=np.ones(3))
    assert main(["embed", ".", "-m", "nowhere", "-o", output, "--export", "npz"]) == 2
    assert message in capsys.readouterr().err
    assert not Path(output).exists()


@pytest.mark.parametrize("kind", ["npz", "safetensors", "jsonl"])
def test_an_export_replaces_an_earlier_one(photos, kind):
    with Index.open(photos) as index:
        export(index, Path(f"photos.{kind}"), kind=kind)
    assert target(photos, kind) == Path(f"photos.{kind}")


def test_who_comes_second_with_a_new_index_gets_an_error(photos):
    shutil.copy(photos, "other.db")
    with pytest.raises(FileExistsError, match="already exists"):
        IndexWriter.create("other.db", provenance={}, width=WIDTH, dtype="float16")


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


def test_who_makes_an_index_at_the_same_time_is_asked_to_run_again(photos, monkeypatch, capsys):
    describe = provenance.describe

    def slow(*arguments, **named):
        shutil.copy(photos, "new.db")
        return describe(*arguments, **named)

    monkeypatch.setattr(provenance, "describe", slow)
    assert main(["embed", str(photographs()[0]), "-m", str(digits_checkpoint()), "-o", "new.db"]) == 2
    assert "another mlx-aimv2 embed made new.db meanwhile: run it again" in capsys.readouterr().err
