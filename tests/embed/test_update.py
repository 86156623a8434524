"""A plan holds what is new or changed, and an index follows its folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from mlx_aimv2.embed.job import make_plan
from mlx_aimv2.embed.loader import CHUNK
from mlx_aimv2.files import marks_of
from mlx_aimv2.images.find import list_images
from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.index.writer import IndexWriter
from tests.image_files import image


def contents(name: str = "photos.db") -> dict[str, bytes]:
    with Index.open(name) as index:
        return {Path(one.path).name: one.vector.tobytes() for one in index.embeddings()}


def counts(out: str) -> dict[str, int]:
    return {name: count for name, count in json.loads(out).items() if isinstance(count, int) and count}


def test_chunks_are_cut_before_anything_is_left_out(tmp_path):
    files = [str(tmp_path / f"{n:03d}.png") for n in range(2 * CHUNK + 5)]
    for file in files:
        Path(file).touch()
    listing = list_images([tmp_path])
    with IndexWriter.create(tmp_path / "a.db", provenance={}, width=3, dtype="float32") as index:
        done = [*files[:7], *files[CHUNK : 2 * CHUNK]]
        stats = [(file, Path(file).stat()) for file in done]
        ones = np.ones(3, np.float32)
        index.add(
            Embedding(file, about.st_size, about.st_mtime_ns, bytes(32), ones, *marks_of(about)[2:], "")
            for file, about in stats
        )
        plan = make_plan(listing, index)
    assert plan.chunks == [files[7:CHUNK], files[2 * CHUNK :]]
    assert plan.unchanged == len(done)
    assert sum(map(len, plan.chunks)) == len(files) - len(done)


def test_a_run_with_nothing_to_do_loads_no_model(folder, embed_command, monkeypatch):
    embed_command("in")
    monkeypatch.setattr("mlx_aimv2.embed.encode.Embedder.load", None)
    code, out, _ = embed_command("in", model=None)
    assert (code, out) == (0, "photos.db: 7 images (7 unchanged)\n")


def test_a_second_run_touches_only_what_changed(folder, embed_command):
    embed_command("in")
    before = contents()
    image(folder / "2.png", (60, 60), 99)
    image(folder / "9.png", (60, 60), 100)
    (folder / "4.png").unlink()
    code, out, _ = embed_command("in", "--json", model=None)
    assert code == 0
    found = {"images": 7, "embedded": 2, "unchanged": 5, "gone": 1}
    assert counts(out) == found
    after = contents()
    assert set(after) == set(before) - {"4.png"} | {"9.png"}
    assert after["2.png"] != before["2.png"]
    assert all(after[name] == before[name] for name in ("0.png", "1.png", "3.png", "5.png", "6.png"))


def test_moved_and_touched_files_are_known_by_their_content(folder, embed_command, monkeypatch):
    embed_command("in")
    before = contents()
    (folder / "1.png").rename(folder / "moved.png")
    shutil.copy(folder / "moved.png", folder / "twice.png")
    os.utime(folder / "5.png", ns=(1, 1))
    monkeypatch.setattr("mlx_aimv2.embed.loader.open_image", None)  # nothing is decoded
    _, out, _ = embed_command("in", "--json")
    assert counts(out) == {"images": 8, "recognised": 2, "moved": 1, "unchanged": 5}
    after = contents()
    assert after["moved.png"] == after["twice.png"] == before["1.png"]
    assert after["5.png"] == before["5.png"]
    _, out, _ = embed_command("in", "--json")
    assert counts(out) == {"images": 8, "unchanged": 8}


def test_content_that_another_name_had_is_not_taken_for_it_once_overwritten(folder, embed_command):
    embed_command("in")
    old = (folder / "0.png").read_bytes()
    image(folder / "0.png", (44, 44), 55)
    (folder / "9.png").write_bytes(old)
    before = contents()
    embed_command("in")
    np.testing.assert_allclose(
        np.frombuffer(contents()["9.png"], "f4"), np.frombuffer(before["0.png"], "f4"), rtol=1e-2, atol=1e-2
    )
    assert contents()["0.png"] != before["0.png"]


def test_images_of_other_folders_stay(folder, embed_command, tmp_path):
    image(tmp_path / "other" / "a.png", (50, 50))
    embed_command("in", "other")
    shutil.rmtree(tmp_path / "other")
    _, out, _ = embed_command("in", "--json")
    assert counts(out) == {"images": 8, "unchanged": 7}, "what was not asked for is not looked at"
    (folder / "0.png").unlink()
    code, _, err = embed_command("other", "in")
    assert code == 1
    assert "other does not exist" in err
    assert "a.png" in contents()
    assert "0.png" not in contents()


def test_a_folder_that_is_empty_now_loses_nothing(folder, embed_command, tmp_path):
    image(tmp_path / "card" / "a.png", (50, 50))
    embed_command("in", "card")
    (tmp_path / "card" / "a.png").unlink()  # as when a disk is not mounted
    _, _, err = embed_command("in", "card")
    assert "no images in" in err
    assert "a.png" in contents()


def test_a_file_given_by_name_that_is_gone_is_forgotten(folder, embed_command):
    embed_command("in/0.png", "in/1.png")
    (folder / "0.png").unlink()
    code, _, err = embed_command("in/0.png", "in/1.png")
    assert code == 1
    assert "in/0.png does not exist" in err
    assert list(contents()) == ["1.png"]


def test_an_image_that_broke_does_not_keep_its_old_embedding(folder, embed_command):
    embed_command("in")
    (folder / "3.png").write_bytes(b"broken")
    code, _, err = embed_command("in")
    assert code == 1
    assert "3.png is not an image" in err
    assert "3.png" not in contents()
