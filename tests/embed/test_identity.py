"""A file is one file, however its name is spelled; it keeps its vector when it moves; nothing is forgotten too soon."""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from mlx_aimv2.cli import main
from mlx_aimv2.index.reader import Index
from mlx_aimv2.index.schema import ADDED
from tests.image_files import dated, image
from tests.small_index import change


@pytest.fixture
def embed(folder, embed_command):
    """Runs `embed` with --json: arguments -> (the counts that are not zero, stderr)."""

    def run(*arguments: str, code: int = 0) -> tuple[dict[str, int], str]:
        found, out, err = embed_command(*arguments, "--json")
        assert found == code, err
        return {name: count for name, count in json.loads(out).items() if isinstance(count, int) and count}, err

    return run


@pytest.fixture
def no_decoding(monkeypatch):
    """From now on nothing can be decoded."""
    return lambda: monkeypatch.setattr("mlx_aimv2.images.open.OpenImage.rgb", None)


def names() -> list[str]:
    return list(digests())


def digests() -> dict[str, bytes]:
    """Names in the index -> the digest of the content that was embedded."""
    with Index.open("photos.db") as index:
        return {str(Path(one.path).relative_to(Path.cwd())): one.sha256 for one in index.embeddings()}


def test_a_folder_and_a_link_to_it_hold_the_same_files(folder, embed):
    embed("in")
    before = names()
    Path("link").symlink_to("in")
    found, _ = embed("link")
    assert found == {"images": 7, "unchanged": 7}
    assert names() == before


def test_a_file_that_changed_is_embedded_under_the_name_that_the_index_has(folder, embed):
    embed("in")
    Path("link").symlink_to("in")
    image(folder / "3.png", (61, 47), 99)
    assert embed("link")[0] == {"images": 7, "embedded": 1, "unchanged": 6}
    assert "in/3.png" in names()


def test_hard_links_are_one_file(folder, embed):
    os.link(folder / "0.png", folder / "again.png")
    assert embed("in")[0] == {"images": 7, "embedded": 7}


def test_a_folder_that_was_renamed_keeps_its_vectors_and_nothing_is_decoded(folder, embed, no_decoding):
    image(folder / "sub" / "7.png", (53, 59), 7)
    embed("in")
    folder.rename("Photos 1")
    no_decoding()
    assert embed("Photos 1")[0] == {"images": 8, "moved": 8}
    assert names() == sorted([*(f"Photos 1/{n}.png" for n in range(7)), "Photos 1/sub/7.png"])
    assert embed("Photos 1")[0] == {"images": 8, "unchanged": 8}


def test_what_moved_within_a_folder_is_not_said_to_have_no_file(folder, embed):
    everything = Path("all")
    everything.mkdir()
    folder.rename(everything / "May")
    embed("all")
    (everything / "May").rename(everything / "June")
    found, err = embed("all")
    assert found == {"images": 7, "moved": 7}
    assert "no file" not in err


def test_two_copies_of_one_image_that_moved_are_both_kept(folder, embed, no_decoding):
    shutil.copy(folder / "0.png", folder / "copy.png")
    embed("in")
    folder.rename("elsewhere")
    no_decoding()
    assert embed("elsewhere")[0] == {"images": 8, "moved": 8}


def test_a_drive_that_is_not_plugged_in_keeps_its_images(folder, embed):
    drive = Path("drive")
    image(drive / "a" / "1.png", (50, 61), 11)
    (folder / "disk").symlink_to(drive.absolute() / "a")
    assert embed("in")[0] == {"images": 8, "embedded": 8}
    drive.rename("unplugged")
    found, err = embed("in")
    assert found == {"images": 8, "unchanged": 7, "kept": 1}
    assert "1 of the images in photos.db has no file now" in err and "--prune drops them" in err
    Path("unplugged").rename(drive)
    assert embed("in")[0] == {"images": 8, "unchanged": 8}


def test_an_empty_mount_point_keeps_its_images_until_they_are_pruned(folder, embed):
    image(folder / "mnt" / "1.png", (50, 61), 11)
    embed("in")
    (folder / "mnt" / "1.png").unlink()
    assert embed("in")[0] == {"images": 8, "unchanged": 7, "kept": 1}
    assert embed("in", "--prune")[0] == {"images": 7, "unchanged": 7, "gone": 1}


def test_an_image_that_icloud_evicted_is_kept(folder, embed):
    embed("in")
    (folder / "2.png").rename(folder / ".2.png.icloud")
    found, err = embed("in")
    assert found == {"images": 7, "unchanged": 6, "kept": 1}
    assert "in/2.png" in err


def test_a_deleted_image_is_forgotten_and_counted(folder, embed):
    embed("in")
    (folder / "2.png").unlink()
    assert embed("in")[0] == {"images": 6, "unchanged": 6, "gone": 1}


def test_a_folder_that_was_deleted_as_a_whole_is_emptied_by_prune(folder, embed):
    image(Path("other") / "a.png", (50, 50))
    embed("in", "other")
    shutil.rmtree("other")
    found, err = embed("in", "other", code=1)
    assert (found["images"], found["kept"]) == (8, 1) and "other does not exist" in err
    assert embed("other", "--prune")[0] == {"images": 7, "gone": 1}
    assert all(name.startswith("in/") for name in names())


def test_what_was_not_asked_for_is_never_pruned(folder, embed):
    image(Path("other") / "a.png", (50, 50))
    embed("in", "other")
    shutil.rmtree("other")
    assert embed("in", "--prune")[0] == {"images": 8, "unchanged": 7}


@pytest.fixture
def alike(folder):
    """Two files of one size and one time of change with unlike content."""
    a, b = (folder / "0.png"), (folder / "1.png")
    size = max(file.stat().st_size for file in (a, b))
    for file in (a, b):
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))  # decoders ignore what follows the end
        os.utime(file, ns=(10**18, 10**18))
    return a, b


def vectors() -> dict[str, bytes]:
    with Index.open("photos.db") as index:
        return {Path(one.path).name: one.vector.tobytes() for one in index.embeddings()}


def test_two_files_of_one_size_and_time_that_swap_names_are_noticed(alike, embed):
    a, b = alike
    embed("in")
    a.rename("aside")
    b.rename(a)
    Path("aside").rename(b)
    assert embed("in")[0] == {"images": 7, "embedded": 2, "unchanged": 5}
    assert digests() == {name: sha256(Path(name).read_bytes()).digest() for name in names()}


def test_content_that_was_put_in_place_with_the_old_time_is_noticed(alike, embed):
    a, b = alike
    embed("in")
    a.write_bytes(b.read_bytes())
    os.utime(a, ns=(10**18, 10**18))
    assert embed("in")[0] == {"images": 7, "embedded": 1, "unchanged": 6}
    assert digests()["in/0.png"] == digests()["in/1.png"] == sha256(b.read_bytes()).digest()


def test_a_restored_backup_is_read_and_not_decoded(folder, embed, no_decoding):
    """Other inodes and times of the entries, the same times of the content."""
    embed("in")
    before = vectors()
    shutil.copytree(folder, "backup")
    shutil.rmtree(folder)
    shutil.move("backup", folder)
    no_decoding()
    assert embed("in")[0] == {"images": 7, "recognised": 7}
    assert embed("in")[0] == {"images": 7, "unchanged": 7}
    assert vectors() == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("paths", [["in"], ["in/0.png", "in/1.png"]])
def test_a_name_that_now_reaches_another_indexed_file_loses_its_entry(alike, embed, no_decoding, link, paths):
    a, b = alike
    embed("in")
    before = vectors()
    a.unlink()
    link(b.absolute(), a)
    no_decoding()
    assert embed(*paths)[0]["images"] == 6
    assert before["0.png"] not in vectors().values() and before["1.png"] in vectors().values()


@pytest.mark.parametrize("version", [1, 2])
def test_an_index_of_an_earlier_format_is_read_filled_and_not_embedded_anew(folder, embed, no_decoding, version):
    dated(folder / "3.png", "2024:05:17 12:00:00")
    embed("in")
    before = vectors()
    for column in reversed([name for name, (since, _) in ADDED.items() if since > version]):
        change(Path("photos.db"), f"ALTER TABLE images DROP COLUMN {column}")
    change(Path("photos.db"), f"PRAGMA user_version = {version}")
    assert vectors() == before
    with Index.open("photos.db") as index, pytest.warns(UserWarning, match="has no dates yet for 7 images"):
        assert len(list(index.paths(before=2025))) == 0  # the files are of today
    no_decoding()
    assert embed("in")[0] == {"images": 7, "unchanged": 7}
    with Index.open("photos.db") as index:
        about = (folder / "3.png").stat()
        stamp = index.stamp(str(folder.absolute() / "3.png"))
        assert (stamp.ctime_ns, stamp.inode, stamp.taken) == (about.st_ctime_ns, about.st_ino, "2024-05-17")
        assert list(index.paths(before=2025)) == [stamp.path]


def test_excluded_folders_and_other_files_are_counted(folder, embed, embed_command, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.images.find.can_read_raw", lambda: False)
    for name in (
        "@eaDir/0.png/SYNOPHOTO_THUMB.jpg",
        "#recycle/x.png",
        "raw/1.dng",
        "raw/2.DNG",
        "raw/3.jxl",
        "note.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    code, out, err = embed_command("in", "--json")
    assert code == 0
    wanted = {".dng": 2, ".jxl": 1, ".txt": 1, "@eaDir": 1, "#recycle": 1}
    assert json.loads(out)["passed_over"] == wanted
    assert "2 .dng (raw: pip install 'mlx-aimv2[raw]', or export it as JPEG)" in err


def test_patterns_exclude_and_include(folder, embed):
    (folder / "sub").mkdir()
    shutil.copy(folder / "0.png", folder / "sub" / "x.png")
    (folder / "sub" / "first.mpo").write_bytes((folder / "1.png").read_bytes())
    assert embed("in", "--exclude", "sub/")[0] == {"images": 7, "embedded": 7}
    found, _ = embed("in", "--exclude", "*.png", "--include", "*.mpo", "--include", "sub/x.png")
    assert found["embedded"] == 2


def test_a_file_of_the_year_2300_is_embedded_and_unchanged_afterwards(photo_index, capsys):
    os.utime("in/1.png", (10**10 + 1, 10**10 + 1))
    for counts in ("1 recognised, 4 unchanged", "5 unchanged"):
        capsys.readouterr()
        assert main(["embed", "in", "-o", "photos.db"]) == 0
        assert counts in capsys.readouterr().out
