"""An output that would do harm is refused, and one that breaks off leaves the old one."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2.bundled import emoji_checkpoint, photographs
from mlx_aimv2.cli import main, output
from mlx_aimv2.cli.output import progress, say
from mlx_aimv2.embed import encode
from mlx_aimv2.embed.encode import Pooling
from mlx_aimv2.files import atomic_file
from mlx_aimv2.index.export import export, target
from mlx_aimv2.index.reader import Index
from mlx_aimv2.index.writer import IndexWriter
from tests.small_index import WIDTH, change

MODEL = str(emoji_checkpoint())


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_an_index_that_says_nothing_of_its_model_is_not_embedded_into(photos, capsys):
    change(photos, "UPDATE about SET value = '{}' WHERE name = 'provenance'")
    assert main(["embed", ".", "-o", "photos.db"]) == 2
    assert "photos.db does not record which model made it" in capsys.readouterr().err


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
        ("link.html", "would replace the input photos.db"),
        ("image.html", "would replace "),
        ("nowhere/page.html", "create it first"),
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
        ("folder.db", "is a folder: name a file"),
        ("foreign.db", "not written by mlx-aimv2"),
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


def test_a_log_that_cannot_be_written_does_not_stop_the_work(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(output, "SECONDS_IN_LOG", -1.0)
    say("a line")
    with progress() as advance:
        say("a line")
        advance(3, 3, "images")
    monkeypatch.undo()


def test_features_that_are_not_finite_in_float32_are_the_weights_fault(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pooling, "__call__", lambda self, model, pixels: mx.full((len(pixels), 3), mx.nan))
    image = str(photographs()[0])
    for dtype, advice in (("float32", "the model's weights are damaged"), ("float16", "load the model as float32")):
        assert main(["embed", image, "-m", str(emoji_checkpoint()), "-o", "a.db", "--dtype", dtype]) == 1
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
    command = ["embed", str(photographs()[0]), "-m", str(emoji_checkpoint()), "-o", "~/x.db"]
    assert main(command) == 0
    assert main(["search", "x.db", str(photographs()[0]), "--html=~/p.html"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "x.db"]


def test_who_makes_an_index_at_the_same_time_is_asked_to_run_again(photos, monkeypatch, capsys):
    fingerprint = encode.fingerprint

    def slow(model):
        shutil.copy(photos, "new.db")
        return fingerprint(model)

    monkeypatch.setattr(encode, "fingerprint", slow)
    assert main(["embed", str(photographs()[0]), "-m", str(emoji_checkpoint()), "-o", "new.db"]) == 2
    assert "another mlx-aimv2 embed created new.db: run it again" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["search", "photos.db", "a.jpg", "--html"], ["map", "a.jpg", "-m", MODEL, "-o"]])
def test_no_output_replaces_an_image_of_the_index_or_a_strangers_file(images_in_an_index, command, capsys):
    ending = ".html" if command[0] == "search" else ".png"
    target, stranger = Path(f"b{ending}"), Path(f"stranger{ending}")
    stranger.write_bytes(b"somebody's")
    command = [*command, str(stranger)]
    assert main(command) == 2
    assert "was not written by mlx-aimv2: choose another name, or add --overwrite" in capsys.readouterr().err
    assert stranger.read_bytes() == b"somebody's"
    assert main([*command, "--overwrite"]) == 0  # the remedy that was named
    assert stranger.read_bytes() != b"somebody's"
    assert main(command) == 0  # and now it is an earlier result
    target.hardlink_to("a.jpg")
    before = Path("a.jpg").read_bytes()
    assert main([*command[:-1], str(target), "--overwrite"]) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert Path("a.jpg").read_bytes() == before


def test_a_page_never_replaces_an_image_that_is_not_among_the_results(images_in_an_index, capsys):
    Path("page.html").symlink_to("b.jpg")
    assert main(["search", "photos.db", "a.jpg", "-k", "1", "--html", "page.html", "--overwrite"]) == 2
    assert "would replace the input" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["npz", "safetensors", "jsonl"])
def test_an_export_replaces_an_untrusted_file_only_when_told_to(images_in_an_index, capsys, kind):
    Path(f"photos.{kind}").write_text("somebody's")
    command = ["embed", "a.jpg", "-o", "photos.db", "--export", kind]
    assert main(command) == 2
    assert "or add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(command) == 0
    Path(f"photos.{kind}").unlink()
    Path(f"photos.{kind}").symlink_to("a.jpg")
    assert main([*command, "--overwrite"]) == 2
    assert "would replace the input" in capsys.readouterr().err


def test_a_conversion_replaces_its_own_folder_when_told_to_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["convert", "--hf-path", MODEL, "--mlx-path", "mlx", "--no-verify"]
    assert main(command) == 0
    assert main(command) == 2
    first = Path("mlx").stat().st_ino
    assert main([*command, "--overwrite"]) == 0
    assert Path("mlx").stat().st_ino != first
    Path("mlx/diary.txt").touch()
    assert main([*command, "--overwrite"]) == 2
    assert "only a folder written by convert is overwritten" in capsys.readouterr().err
    assert main(["convert", "--hf-path", "mlx", "--mlx-path", "mlx", "--no-verify", "--overwrite"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlx"]


def test_a_full_disk_leaves_neither_map_nor_page_nor_export(images_in_an_index, small_disk, capsys):
    small = str(small_disk)
    assert main(["map", "a.jpg", "-m", MODEL, "-o", f"{small}/map.png"]) == 2
    assert "map.png: No space left on device." in capsys.readouterr().err
    assert main(["search", "photos.db", "a.jpg", "--html", f"{small}/page.html"]) == 2
    assert "page.html: No space left on device." in capsys.readouterr().err
    assert main(["embed", "a.jpg", "-m", MODEL, "-o", f"{small}/photos.db"]) == 2
    assert capsys.readouterr().err.startswith("mlx-aimv2: ")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.fixture
def images_in_an_index(tmp_path, monkeypatch):
    """Two images and their index, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, photograph in zip(("a.jpg", "b.jpg"), photographs(), strict=False):
        shutil.copy(photograph, name)
    assert main(["embed", "a.jpg", "b.jpg", "-m", MODEL, "-o", "photos.db"]) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A full disk of its own; needs the rights to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root on Linux may mount a disk")
    with (place / "filler").open("wb") as file, contextlib.suppress(OSError):
        for _ in range(60):
            file.write(bytes(1024))
            file.flush()
    yield place
    subprocess.run(["umount", str(place)], check=True)
