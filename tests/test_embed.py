"""Do images become the embeddings that the model gives, in batches, and does an index follow its folder?"""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mlx_aimv2 import load
from mlx_aimv2.cli import main
from mlx_aimv2.embed.pipeline import BATCH_TOKENS, CHUNK, embed, embed_chunks, split_into_chunks
from mlx_aimv2.embed.pooling import Pooling
from mlx_aimv2.embed.prefetch import Decoder
from mlx_aimv2.embed.update import make_plan
from mlx_aimv2.find_images import list_images
from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.index.writer import IndexWriter

REFERENCE = Path(__file__).parent / "golden" / "reference"


def image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """An image of soft random colours, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    low = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def fixed():
    return load(REFERENCE / "fixed")


@pytest.fixture(scope="module")
def native():
    return load(REFERENCE / "native")


@pytest.fixture(scope="module")
def lit():
    return load(REFERENCE / "lit")


@pytest.fixture
def folder(tmp_path):
    """Seven images of several sizes."""
    for number in range(7):
        image(tmp_path / "in" / f"{number}.png", (50 + 3 * number, 71 - 4 * number), number)
    return tmp_path / "in"


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Runs `mlx-aimv2 embed` beside the folder: arguments -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, model: str | None = "fixed") -> tuple[int, str, str]:
        chosen = [] if model is None else ["-m", str(REFERENCE / model)]
        code = main(["embed", *arguments, "-o", "photos.db", *chosen])
        return code, *capsys.readouterr()

    return run


def contents(name: str = "photos.db") -> dict[str, bytes]:
    with Index.open(name) as index:
        return {Path(one.path).name: one.vector.tobytes() for one in index.embeddings()}


def counts(out: str) -> dict[str, int]:
    return {name: count for name, count in json.loads(out).items() if isinstance(count, int) and count}


# In Python


def test_an_embedding_is_what_the_model_gives_with_the_files_stamp(folder, fixed):
    model, processor = fixed
    results = list(embed([folder], model, processor))
    assert [Path(one.path).name for one in results] == [f"{n}.png" for n in range(7)]
    for one in results:
        wanted = np.array(model.encode_image(processor([one.path]))[0])
        np.testing.assert_allclose(one.vector, wanted, rtol=1e-4, atol=1e-4)
        about = Path(one.path).stat()
        assert (one.size, one.mtime_ns) == (about.st_size, about.st_mtime_ns)
        assert one.sha256 == hashlib.sha256(Path(one.path).read_bytes()).digest()


def test_lit_gives_what_words_are_compared_with(folder, lit):
    model, processor = lit
    one = next(iter(embed([folder / "3.png"], model, processor)))
    wanted = np.array(model.encode_image(processor([one.path]))[0])
    np.testing.assert_allclose(one.vector, wanted, rtol=1e-4, atol=1e-4)
    assert one.vector.shape == (model.config.projection_dim,)


def test_tokens_and_maps_are_the_last_hidden_state(folder, native):
    model, processor = native
    image(folder / "wide.png", (14 * 12 + 5, 14 * 11 + 3))
    pixels = processor([folder / "wide.png"])
    wanted = np.array(model(pixels).last_hidden_state[0])
    (tokens,) = embed([folder / "wide.png"], model, processor, pool="tokens")
    (grid,) = embed([folder / "wide.png"], model, processor, pool="map")
    np.testing.assert_allclose(tokens.vector, wanted, rtol=1e-4, atol=1e-4)
    assert grid.vector.shape == (11, 12, 64)
    np.testing.assert_array_equal(grid.vector[3, 7], tokens.vector[3 * 12 + 7])


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_a_layer_is_transformers_hidden_state_as_it_is(folder, fixed, layer):
    model, processor = fixed
    pixels = processor([folder / "0.png"])
    state = model(pixels, output_hidden_states=True).hidden_states[layer]
    for norm, wanted in ((False, state), (True, model.norm(state))):
        (one,) = embed([folder / "0.png"], model, processor, pool="tokens", layer=layer, norm=norm)
        np.testing.assert_allclose(one.vector, np.array(wanted[0]), rtol=1e-4, atol=1e-4)


def test_the_last_layer_with_the_norm_is_the_default(folder, fixed):
    (plain,) = embed([folder / "0.png"], *fixed)
    (spelled,) = embed([folder / "0.png"], *fixed, pool="mean", layer=-1, norm=True)
    np.testing.assert_array_equal(plain.vector, spelled.vector)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"pool": "cls"}, "mean, head, tokens, map"),
        ({"pool": "head"}, "no pooling head"),
        ({"layer": 4}, "-4 to 3"),
        ({"layer": -5}, "-4 to 3"),
        ({"norm": True}, "goes with a layer"),
        ({"max_patches": 0}, "at least 1"),
    ],
)
def test_wishes_that_the_model_cannot_meet_are_refused(folder, fixed, wish, words):
    with pytest.raises(ValueError, match=words):
        list(embed([folder], *fixed, **wish))


def test_the_head_reads_the_last_layer_only(folder, lit):
    with pytest.raises(ValueError, match="last layer"):
        list(embed([folder], *lit, pool="head", layer=-2))


def test_one_bad_image_raises_or_is_passed_on(folder, fixed):
    (folder / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.png is not an image"):
        list(embed([folder], *fixed))
    failures = []
    results = list(embed([folder], *fixed, on_failure=lambda path, reason: failures.append((Path(path).name, reason))))
    assert len(results) == 6
    assert failures == [("3.png", "is not an image in a format that Pillow reads")]


def test_a_name_that_is_not_there_fails_too(folder, fixed):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        list(embed([folder, "nowhere"], *fixed))


def test_numbers_that_are_not_finite_fail_by_name(folder):
    model, processor = load(REFERENCE / "fixed")
    model.norm.weight = mx.full(model.norm.weight.shape, float("nan"))
    with pytest.raises(ValueError, match=r"0\.png gave numbers that are not finite"):
        list(embed([folder], model, processor))


def test_stopping_early_stops_the_threads(folder, fixed):
    results = embed([folder], *fixed)
    next(results)
    results.close()


# Batches


class Noted:
    """A pooling that notes the shapes it is given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, model, pixels):
        self.shapes.append(tuple(pixels.shape))
        return pixels.mean(axis=(1, 2))


def test_a_batch_holds_so_many_tokens(folder, fixed, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.embed.pipeline.BATCH_TOKENS", 3 * fixed[0].config.num_patches + 1)
    noted = Noted()
    list(embed_chunks(split_into_chunks([str(folder / f"{n}.png") for n in range(7)]), *fixed, pooling=noted))
    assert [shape[0] for shape in noted.shapes] == [3, 3, 1]
    assert BATCH_TOKENS == 4096


def test_images_of_one_grid_share_a_batch_and_none_is_padded(tmp_path, native):
    sizes = [(140, 168), (168, 140), (140, 168), (150, 170), (14 * 70, 14 * 50), (168, 140), (14 * 70, 14 * 50)]
    files = [str(image(tmp_path / f"{n}.png", size, n)) for n, size in enumerate(sizes)]
    noted = Noted()
    (chunk,) = embed_chunks([files], *native, pooling=noted)
    assert [one.path for one in chunk] == files
    # Without its remainder 150 x 170 is 140 x 168; two images of 3,500 tokens are too many for a batch.
    assert sorted(noted.shapes) == [(1, 700, 980, 3), (1, 700, 980, 3), (2, 140, 168, 3), (3, 168, 140, 3)]


def test_a_batch_never_crosses_a_sheet(tmp_path, fixed):
    files = [str(image(tmp_path / f"{n:03d}.png", (42, 42), n)) for n in range(CHUNK + 3)]
    noted = Noted()
    chunks = list(embed_chunks(split_into_chunks(files), *fixed, pooling=noted))
    assert [len(chunk) for chunk in chunks] == [CHUNK, 3]
    assert [shape[0] for shape in noted.shapes] == [CHUNK, 3]


def test_empty_sheets_stay_in_their_places(tmp_path, fixed):
    file = str(image(tmp_path / "a.png", (42, 42)))
    chunks = list(embed_chunks([[], [file], []], *fixed, pooling=Pooling.of(fixed[0])))
    assert [len(chunk) for chunk in chunks] == [0, 1, 0]


@pytest.mark.parametrize("size", [(14 * 40, 14 * 30), (14 * 90 + 9, 14 * 17 + 3), (14 * 33, 14 * 33)])
def test_large_images_are_scaled_down_in_their_shape(tmp_path, native, size):
    decoded = Decoder(native[1], max_patches=300)(str(image(tmp_path / "a.png", size)))
    rows, columns = decoded.levels.shape[0] / 14, decoded.levels.shape[1] / 14
    assert 300 * 0.75 < rows * columns <= 300
    assert columns / rows == pytest.approx(size[0] / size[1], rel=0.2)
    assert rows == int(rows)
    assert columns == int(columns)


def test_a_ribbon_that_cannot_be_scaled_down_is_told(tmp_path, native):
    decoded = Decoder(native[1], max_patches=300)(str(image(tmp_path / "a.png", (14 * 2000, 15))))
    assert decoded.failure == "has 15x28000 pixels: scaled to 300 patches it is narrower than one patch"


def test_images_within_the_limit_keep_every_pixel(tmp_path, native):
    file = image(tmp_path / "a.png", (14 * 12, 14 * 11))
    decoded = Decoder(native[1], max_patches=132)(str(file))
    np.testing.assert_array_equal(decoded.levels, np.array(Image.open(file)))


def test_an_image_right_at_the_limit_is_not_scaled(tmp_path, native):
    file = image(tmp_path / "a.png", (14 * 12 + 9, 14 * 11 + 5))
    decoded = Decoder(native[1], max_patches=132)(str(file))
    np.testing.assert_array_equal(decoded.levels, np.array(Image.open(file))[: 14 * 11, : 14 * 12])


def test_a_pipe_that_came_after_the_listing_does_not_stop_the_run(tmp_path, fixed):
    os.mkfifo(tmp_path / "a.jpg")
    assert Decoder(fixed[1])(str(tmp_path / "a.jpg")).failure == "is a named pipe, not an image"


def test_whatever_a_decoder_raises_is_that_images_failure(tmp_path, fixed, monkeypatch):
    def broken(data, **_):
        raise RuntimeError("decoder\nexploded")

    monkeypatch.setattr("mlx_aimv2.embed.prefetch.open_image", broken)
    assert Decoder(fixed[1])(str(image(tmp_path / "a.jpg", (9, 9)))).failure == "decoder exploded"


def test_small_native_images_give_a_warning(tmp_path, native):
    image(tmp_path / "a.png", (14 * 8, 14 * 13))
    with pytest.warns(UserWarning, match=r"a\.png has 13x8 patches; the checkpoint was trained on 112"):
        list(embed([tmp_path], *native))
    image(tmp_path / "a.png", (14 * 8, 14 * 14))
    list(embed([tmp_path], *native))


def test_exif_orientation_is_honoured(tmp_path, native):
    upright = Image.open(image(tmp_path / "a.png", (14 * 12, 14 * 10)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held with its right side down
    upright.rotate(90, expand=True).save(tmp_path / "b.png", exif=exif)
    one, other = embed([tmp_path], *native)
    np.testing.assert_array_equal(one.vector, other.vector)


def test_sheets_are_cut_before_anything_is_left_out(tmp_path):
    files = [str(tmp_path / f"{n:03d}.png") for n in range(2 * CHUNK + 5)]
    for file in files:
        Path(file).touch()
    listing = list_images([tmp_path])
    with IndexWriter.create(tmp_path / "a.db", provenance={}, width=3, dtype="float32") as index:
        done = [*files[:7], *files[CHUNK : 2 * CHUNK]]
        stats = [(file, Path(file).stat()) for file in done]
        ones = np.ones(3, np.float32)
        index.add(Embedding(file, about.st_size, about.st_mtime_ns, bytes(32), ones) for file, about in stats)
        plan = make_plan(listing, index)
    assert plan.chunks == [files[7:CHUNK], files[2 * CHUNK :]]
    assert plan.unchanged == len(done)
    assert plan.images == len(files) - len(done)


# On the command line


def test_a_folder_becomes_an_index(folder, cli):
    code, out, err = cli("in")
    assert (code, err) == (0, "")
    assert out == "photos.db: 7 images (7 embedded)\n"
    assert list(contents()) == [f"{n}.png" for n in range(7)]


def test_a_second_run_touches_only_what_changed(folder, cli):
    cli("in")
    before = contents()
    image(folder / "2.png", (60, 60), 99)
    image(folder / "9.png", (60, 60), 100)
    (folder / "4.png").unlink()
    code, out, _ = cli("in", "--json", model=None)
    assert code == 0
    found = {"images": 7, "embedded": 2, "unchanged": 5, "dropped": 1}
    assert counts(out) == found
    after = contents()
    assert set(after) == set(before) - {"4.png"} | {"9.png"}
    assert after["2.png"] != before["2.png"]
    assert all(after[name] == before[name] for name in ("0.png", "1.png", "3.png", "5.png", "6.png"))


def test_moved_and_touched_files_are_known_by_their_content(folder, cli, monkeypatch):
    cli("in")
    before = contents()
    (folder / "1.png").rename(folder / "moved.png")
    shutil.copy(folder / "moved.png", folder / "twice.png")
    os.utime(folder / "5.png", ns=(1, 1))
    monkeypatch.setattr("mlx_aimv2.embed.prefetch.open_image", None)  # nothing is decoded
    _, out, _ = cli("in", "--json")
    assert counts(out) == {"images": 8, "recognised": 3, "unchanged": 5, "dropped": 1}
    after = contents()
    assert after["moved.png"] == after["twice.png"] == before["1.png"]
    assert after["5.png"] == before["5.png"]
    _, out, _ = cli("in", "--json")
    assert counts(out) == {"images": 8, "unchanged": 8}


def test_content_that_another_name_had_is_not_taken_for_it_once_overwritten(folder, cli):
    cli("in")
    old = (folder / "0.png").read_bytes()
    image(folder / "0.png", (44, 44), 55)
    (folder / "9.png").write_bytes(old)
    before = contents()
    cli("in")
    np.testing.assert_allclose(
        np.frombuffer(contents()["9.png"], "f4"), np.frombuffer(before["0.png"], "f4"), rtol=1e-2, atol=1e-2
    )
    assert contents()["0.png"] != before["0.png"]


def test_images_of_other_folders_stay(folder, cli, tmp_path):
    image(tmp_path / "other" / "a.png", (50, 50))
    cli("in", "other")
    shutil.rmtree(tmp_path / "other")
    _, out, _ = cli("in", "--json")
    assert counts(out) == {"images": 8, "unchanged": 7}
    (folder / "0.png").unlink()
    code, _, err = cli("other", "in")
    assert code == 1
    assert "other does not exist" in err
    assert "a.png" in contents()
    assert "0.png" not in contents()


def test_a_folder_that_is_empty_now_loses_nothing(folder, cli, tmp_path):
    image(tmp_path / "card" / "a.png", (50, 50))
    cli("in", "card")
    (tmp_path / "card" / "a.png").unlink()  # as when a disk is not mounted
    _, _, err = cli("in", "card")
    assert "no images in" in err
    assert "a.png" in contents()


def test_a_file_given_by_name_that_is_gone_is_dropped(folder, cli):
    cli("in/0.png", "in/1.png")
    (folder / "0.png").unlink()
    code, _, err = cli("in/0.png", "in/1.png")
    assert code == 1
    assert "in/0.png does not exist" in err
    assert list(contents()) == ["1.png"]


def test_an_image_that_broke_does_not_keep_its_old_embedding(folder, cli):
    cli("in")
    (folder / "3.png").write_bytes(b"broken")
    code, _, err = cli("in")
    assert code == 1
    assert "3.png is not an image" in err
    assert "3.png" not in contents()


def test_a_list_comes_from_stdin(folder, cli, monkeypatch):
    class Stdin:
        def __init__(self, data: bytes) -> None:
            self.buffer = io.BytesIO(data)

    monkeypatch.setattr("sys.stdin", Stdin(b"in/0.png\nin/1.png\n"))
    assert cli("-")[0] == 0
    monkeypatch.setattr("sys.stdin", Stdin(b"in/5.png\0in/1.png\0"))
    assert cli("-")[0] == 0
    assert list(contents()) == ["0.png", "1.png", "5.png"]


def test_no_images_is_wrong_use(tmp_path, cli):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    code, _, err = cli("in")
    assert code == 2
    assert "looked for names that end in" in err
    assert ".heic .heif" in err
    assert not Path("photos.db").exists()


def test_all_failed_is_no_success_and_makes_no_file(tmp_path, cli):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "in" / name).write_bytes(b"x" * 99)
    code, out, err = cli("in")
    assert code == 1
    assert out == ""
    assert "no image could be embedded" in err
    assert not Path("photos.db").exists()


@pytest.mark.parametrize(
    ("arguments", "model", "words"),
    [
        (["in"], None, "say with which model"),
        (["in", "--threads", "0"], "fixed", "--threads must be at least 1"),
        (["in", "--max-patches", "0"], "native", "--max-patches must be at least 1"),
        (["in", "--pool", "head"], "fixed", "no pooling head"),
        (["in", "--layer", "9"], "fixed", "layer 9"),
    ],
)
def test_wrong_use_is_one_line(folder, cli, arguments, model, words):
    code, out, err = cli(*arguments, model=model)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not Path("photos.db").exists()


def test_an_output_that_cannot_be_is_told_before_the_model_is_read(folder, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.embed.provenance.load_with_origin", None)
    assert main(["embed", "in", "-m", "x", "-o", "nowhere/photos.db"]) == 2
    (tmp_path / "photos.db").write_text("my own notes")
    code, _, err = cli("in")
    assert code == 2
    assert "no index of mlx-aimv2" in err
    assert (tmp_path / "photos.db").read_text() == "my own notes"


def test_a_device_that_gives_up_ends_in_one_line_and_keeps_what_was_done(tmp_path, cli, monkeypatch):
    for number in range(2 * CHUNK + 1):
        image(tmp_path / "in" / f"{number:03d}.png", (42, 42), number)
    really, count = Pooling.__call__, []

    def gives_up(self, model, pixels):
        count.append(pixels.shape)
        if len(count) == 3:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return really(self, model, pixels)

    monkeypatch.setattr(Pooling, "__call__", gives_up)
    code, _, err = cli("in")
    assert code == 2
    assert err == "mlx-aimv2: MLX could not go on: [malloc] Unable to allocate 123 bytes.; what was done is kept\n"
    assert len(contents()) == CHUNK


def test_other_settings_are_refused_by_name(folder, cli):
    cli("in")
    before = contents()
    for arguments, model, words in (
        (["--pool", "tokens"], "fixed", "pool: mean there, tokens here"),
        (["--layer", "-2"], "fixed", "layer: none there, -2 here"),
        (["--store", "float32"], "fixed", "stores float16"),
        ([], "outlier", "the weights"),
    ):
        code, _, err = cli("in", *arguments, model=model)
        assert code == 2
        assert words in err
    assert contents() == before


def test_the_same_weights_in_another_dtype_are_a_remark(folder, cli):
    cli("in")
    image(folder / "9.png", (60, 60))
    code, _, err = cli("in", "--dtype", "bfloat16")
    assert code == 0
    assert "dtype: float32 there, bfloat16 here" in err
    assert "9.png" in contents()


def test_an_index_remembers_its_settings(folder, cli):
    cli("in", "--pool", "tokens", "--layer", "-2", model="native")
    image(folder / "9.png", (60, 60))
    code, out, _ = cli("in", "--json", model=None)
    assert code == 0
    assert counts(out)["embedded"] == 1
    with Index.open("photos.db") as index:
        assert index.axes == 2
        assert (index.provenance["pool"], index.provenance["layer"]) == ("tokens", -2)


def test_remarks_about_images_are_counted_after_ten(tmp_path, cli):
    for number in range(13):
        image(tmp_path / "in" / f"{number:02d}.png", (28, 28), number)
    code, _, err = cli("in", model="native")
    assert code == 0
    assert err.count("has 2x2 patches") == 10
    assert "3 more notes like these" in err


@pytest.mark.parametrize("pool", ["mean", "map"])
@pytest.mark.parametrize("kind", ["npz", "safetensors", "jsonl"])
def test_exports_hold_what_the_index_holds(folder, cli, kind, pool):
    code, _, _ = cli("in", "--export", kind, "--pool", pool, "--store", "float32", model="native")
    assert code == 0
    with Index.open("photos.db") as index:
        wanted = list(index.embeddings())
        width, provenance = index.width, index.provenance
    if kind == "jsonl":
        lines = [json.loads(line) for line in Path("photos.jsonl").read_text().splitlines()]
        assert [line["path"] for line in lines] == [one.path for one in wanted]
        for line, one in zip(lines, wanted, strict=True):
            np.testing.assert_array_equal(np.array(line["vector"], np.float32), one.vector)
            assert line["sha256"] == one.sha256.hex()
        return
    if kind == "npz":
        with np.load("photos.npz") as arrays:
            found = dict(arrays)
        paths, about = found["paths"].tolist(), json.loads(str(found["provenance"]))
    else:
        found = load_file("photos.safetensors")
        header = Path("photos.safetensors").read_bytes()
        note = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
        paths, about = json.loads(note["paths"]), json.loads(note["provenance"])
    assert paths == [one.path for one in wanted]
    assert about == provenance
    np.testing.assert_array_equal(found["vectors"], np.concatenate([one.vector.reshape(-1, width) for one in wanted]))
    if pool == "map":
        assert [tuple(shape) for shape in found["shapes"]] == [one.vector.shape[:2] for one in wanted]


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    from mlx_aimv2 import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(1000, "images") as bar:
        for _ in range(25):
            now[0] += 1
            bar.advance(20)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "200 of 1,000 images  20.0 a second  0:40 left",
        "400 of 1,000 images  20.0 a second  0:30 left",
    ]


def test_progress_on_a_terminal_is_one_bar(monkeypatch, capsys):
    from mlx_aimv2 import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.Progress(4, "images") as bar:
        now[0] = 1.0
        bar.advance()
        bar.say("a line")
        now[0] = 2.0
        bar.advance()
    err = capsys.readouterr().err
    assert "█" in err
    assert "2 of 4 images  1.0 a second  0:02 left" in err
    assert err.endswith("\r")
    assert "a line\n" in err


def test_durations_are_spelled_as_clocks():
    from mlx_aimv2.progress import bar, clock

    assert [clock(seconds) for seconds in (0.4, 7, 750, 11100)] == ["0:00", "0:07", "12:30", "3:05:00"]
    assert (bar(0, 4), bar(0.5, 4), bar(1, 4)) == ("    ", "██  ", "████")
