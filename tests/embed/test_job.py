"""An index is made and updated with one call: its settings, its refusals, its summary."""

import io
import json
from pathlib import Path

import pytest

from mlx_aimv2.cli import main
from mlx_aimv2.embed.encode import Pooling
from mlx_aimv2.embed.loader import CHUNK
from mlx_aimv2.index.reader import Index
from tests.image_files import image


def contents(name: str = "photos.db") -> dict[str, bytes]:
    with Index.open(name) as index:
        return {Path(one.path).name: one.vector.tobytes() for one in index.embeddings()}


def counts(out: str) -> dict[str, int]:
    return {name: count for name, count in json.loads(out).items() if isinstance(count, int) and count}


def test_a_folder_becomes_an_index(folder, embed_command):
    code, out, err = embed_command("in")
    assert (code, err) == (0, "")
    assert out == "photos.db: 7 images (7 embedded)\n"
    assert list(contents()) == [f"{n}.png" for n in range(7)]


def test_a_list_comes_from_stdin(folder, embed_command, monkeypatch):
    class Stdin:
        def __init__(self, data: bytes) -> None:
            self.buffer = io.BytesIO(data)

    monkeypatch.setattr("sys.stdin", Stdin(b"in/0.png\nin/1.png\n"))
    assert embed_command("-")[0] == 0
    monkeypatch.setattr("sys.stdin", Stdin(b"in/5.png\0in/1.png\0"))
    assert embed_command("-")[0] == 0
    assert list(contents()) == ["0.png", "1.png", "5.png"]


def test_no_images_is_wrong_use(tmp_path, embed_command):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    code, _, err = embed_command("in")
    assert code == 2
    assert "looked for names that end in" in err
    assert ".heic .heif" in err
    assert not Path("photos.db").exists()


def test_all_failed_is_no_success_and_makes_no_file(tmp_path, embed_command):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "in" / name).write_bytes(b"x" * 99)
    code, out, err = embed_command("in")
    assert code == 1
    assert out == ""
    assert "no image could be embedded" in err
    assert not Path("photos.db").exists()


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        (["in"], None, "choose a model, for example -m "),
        (["in", "--threads", "0"], "fixed", "--threads must be at least 1"),
        (["in", "--max-patches", "0"], "native", "--max-patches must be at least 1"),
        (["in", "--pool", "head"], "fixed", "no pooling head"),
        (["in", "--layer", "9"], "fixed", "layer 9"),
    ],
)
def test_wrong_use_is_one_line(folder, embed_command, arguments, model, message):
    code, out, err = embed_command(*arguments, model=model)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("photos.db").exists()


def test_an_output_that_cannot_be_is_reported_before_the_model_is_read(folder, embed_command, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.embed.encode.read_source", None)
    assert main(["embed", "in", "-m", "x", "-o", "nowhere/photos.db"]) == 2
    (tmp_path / "photos.db").write_text("my own notes")
    code, _, err = embed_command("in")
    assert code == 2
    assert "not an index of mlx-aimv2" in err
    assert (tmp_path / "photos.db").read_text() == "my own notes"


def test_a_device_that_gives_up_ends_in_one_line_and_keeps_what_was_done(tmp_path, embed_command, monkeypatch):
    for number in range(2 * CHUNK + 1):
        image(tmp_path / "in" / f"{number:03d}.png", (42, 42), number)
    really, count = Pooling.__call__, []

    def gives_up(self, model, pixels):
        count.append(pixels.shape)
        if len(count) == 3:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return really(self, model, pixels)

    monkeypatch.setattr(Pooling, "__call__", gives_up)
    code, _, err = embed_command("in")
    assert code == 2
    assert err == "mlx-aimv2: MLX could not continue: [malloc] Unable to allocate 123 bytes.; finished work is kept\n"
    assert len(contents()) == CHUNK


def test_other_settings_are_refused_by_name(folder, embed_command):
    embed_command("in")
    before = contents()
    for arguments, model, message in (
        (["--pool", "tokens"], "fixed", "pool: mean there, tokens here"),
        (["--layer", "-2"], "fixed", "layer: none there, -2 here"),
        (["--store", "float32"], "fixed", "stores float16"),
        ([], "outlier", "the weights"),
    ):
        code, _, err = embed_command("in", *arguments, model=model)
        assert code == 2
        assert message in err
    assert contents() == before


def test_the_same_weights_in_another_dtype_are_a_note(folder, embed_command):
    embed_command("in")
    image(folder / "9.png", (60, 60))
    code, _, err = embed_command("in", "--dtype", "bfloat16")
    assert code == 0
    assert "dtype: float32 there, bfloat16 here" in err
    assert "9.png" in contents()


def test_an_index_remembers_its_settings(folder, embed_command):
    embed_command("in", "--pool", "tokens", "--layer", "-2", model="native")
    image(folder / "9.png", (60, 60))
    code, out, _ = embed_command("in", "--json", model=None)
    assert code == 0
    assert counts(out)["embedded"] == 1
    with Index.open("photos.db") as index:
        assert index.axes == 2
        assert (index.provenance["pool"], index.provenance["layer"]) == ("tokens", -2)


def test_notes_about_images_are_counted_after_ten(tmp_path, embed_command):
    for number in range(13):
        image(tmp_path / "in" / f"{number:02d}.png", (28, 28), number)
    code, _, err = embed_command("in", model="native")
    assert code == 0
    assert err.count("has 2x2 patches") == 10
    assert "3 more notes like these" in err


@pytest.mark.parametrize(("dtype", "slow"), [("float16", "MLX computes float16 slowly on a CPU"), ("float32", "")])
def test_half_precision_on_a_cpu_is_told_what_would_be_faster(folder, embed_command, dtype, slow):
    code, _, err = embed_command("in", "--dtype", dtype)
    assert code == 0
    assert (slow in err) if slow else err == ""
    assert "slowly" not in embed_command("in", "--dtype", dtype)[2], "nothing was computed"
