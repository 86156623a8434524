"""Listing finds the images that a user means, and says what cannot be one."""

import os
import socket
from pathlib import Path

import pytest

from mlx_aimv2.images.find import Scan, is_gone, list_images, read_list


@pytest.fixture
def tree(tmp_path):
    """Folders with images by name only; nothing is ever opened."""
    for name in ("a/1.jpg", "a/b/2.PNG", "a/b/c/3.heic", "a/notes.txt", "a/.hidden.jpg", "a/.cache/4.jpg", "d/5.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(listing, root: Path) -> list[str]:
    return [str(Path(file).relative_to(root)) for file in listing.files]


def reasons(listing) -> dict[str, str]:
    return {Path(path).name: reason for path, reason in listing.problems}


def test_a_folder_is_walked_to_the_bottom(tree):
    assert names(list_images([tree / "a"]), tree) == ["a/1.jpg", "a/b/2.PNG", "a/b/c/3.heic"]


def test_the_order_is_that_of_the_bytes_and_nothing_comes_twice(tree):
    listing = list_images([tree / "d", tree / "a", tree / "a" / "b", tree / "a" / "1.jpg", f"{tree}/d/../a/1.jpg"])
    assert names(listing, tree) == ["a/1.jpg", "a/b/2.PNG", "a/b/c/3.heic", "d/5.webp"]


def test_a_file_given_by_name_needs_no_suffix(tree):
    assert names(list_images([tree / "a" / "notes.txt", tree / "a" / ".hidden.jpg"]), tree) == [
        "a/.hidden.jpg",
        "a/notes.txt",
    ]


def test_names_are_absolute(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert list_images(["d"]).files == [str(tree / "d" / "5.webp")]


def test_patterns_take_images_and_folders(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert names(list_images(["a/*"]), tree) == ["a/1.jpg", "a/b/2.PNG", "a/b/c/3.heic"]
    assert names(list_images([f"{tree}/**/*.heic"]), tree) == ["a/b/c/3.heic"]
    assert list_images(["a/*.tiff"]).missing == ["a/*.tiff"]


@pytest.mark.parametrize("name", ["x/" * 3000, "x/" * 3000 + "*", "y" * 300])
def test_a_name_that_no_file_can_have_is_missing(tree, monkeypatch, name):
    monkeypatch.chdir(tree)
    assert list_images([name]).missing == [name]


def test_a_name_that_exists_is_no_pattern(tree):
    (tree / "a" / "[x].jpg").touch()
    (tree / "a" / "x.jpg").touch()
    assert names(list_images([tree / "a" / "[x].jpg"]), tree) == ["a/[x].jpg"]


def test_what_does_not_exist_is_missing(tree):
    assert list_images([str(tree / "nowhere"), str(tree / "a" / "1.jpg" / "deeper")]).missing == [str(tree / "nowhere")]


def test_a_folder_without_images_is_listed_apart(tree):
    (tree / "e").mkdir()
    listing = list_images([tree / "e", tree / "d"])
    assert listing.empty == [str(tree / "e")]
    assert listing.roots == [str(tree / "d")]


def test_links_that_lead_nowhere_or_in_circles_are_named(tree):
    (tree / "a" / "dangling.jpg").symlink_to("nowhere.jpg")
    (tree / "a" / "dangling").symlink_to("nowhere")
    (tree / "a" / "self.jpg").symlink_to("self.jpg")
    (tree / "a" / "b" / "up").symlink_to("..")
    (tree / "a" / "b" / "root").symlink_to("/")
    assert reasons(list_images([tree / "a"])) == {
        "dangling.jpg": "is a dangling link",
        "self.jpg": "is a dangling link",
        "up": "is a link back to a folder that contains it",
        "root": "is a link back to a folder that contains it",
    }


def test_links_to_folders_are_followed_once_and_last(tree):
    (tree / "a" / "0").symlink_to(tree / "d")
    (tree / "a" / "again").symlink_to(tree / "d")
    (tree / "a" / "inside").symlink_to(tree / "a" / "b")
    (tree / "a" / "link.jpg").symlink_to(tree / "d" / "5.webp")
    expected = ["a/0/5.webp", "a/1.jpg", "a/b/2.PNG", "a/b/c/3.heic"]  # link.jpg is 5.webp
    listing = list_images([tree / "a"])
    assert names(listing, tree) == expected
    assert not listing.problems


def test_what_is_no_file_is_named_by_its_kind(tree, monkeypatch):
    (tree / "a" / "folder.jpg").mkdir()
    (tree / "a" / "folder.jpg" / "6.jpg").touch()
    os.mkfifo(tree / "a" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tree / "a")  # a socket's name may not be long
        server.bind("socket.jpg")
        listing = list_images([tree / "a"])
    assert reasons(listing) == {
        "folder.jpg": "is a folder, not an image",
        "pipe.jpg": "is a named pipe, not an image",
        "socket.jpg": "is a socket, not an image",
    }
    assert "a/folder.jpg/6.jpg" in names(listing, tree)


def test_a_folder_that_may_not_be_read_is_named(tree, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_images([tree / "a"])
    assert reasons(listing) == {"b": "may not be read: permission denied"}
    assert names(listing, tree) == ["a/1.jpg"]


def test_of_a_photos_library_only_the_originals_count(tree):
    for part in ("originals/0/7.heic", "resources/derivatives/7_small.jpeg"):
        file = tree / "a" / "Photos Library.photoslibrary" / part
        file.parent.mkdir(parents=True)
        file.touch()
    found = [name for name in names(list_images([tree / "a"]), tree) if "Photos" in name]
    assert found == ["a/Photos Library.photoslibrary/originals/0/7.heic"]


@pytest.mark.parametrize("files", [("head.json",), ("config.json", "model.safetensors"), ("state.safetensors",)])
def test_folders_that_this_package_wrote_are_skipped_unless_they_are_meant(tree, files):
    for file in files:
        (tree / "a" / "b" / file).touch()
    listing = list_images([tree / "a"])
    assert names(listing, tree) == ["a/1.jpg"]
    assert listing.skipped["of mlx-aimv2's own folders"] == 1
    assert "a/b/2.PNG" in names(list_images([tree / "a"], include=["b"]), tree)
    assert "a/b/2.PNG" in names(list_images([tree / "a" / "b"]), tree)


def test_a_shallow_scan_lists_the_folders_that_it_did_not_enter(tree):
    (tree / "a" / "@eaDir").mkdir()
    scan = Scan()
    assert scan.loose(tree / "a") == [str(tree / "a" / "1.jpg")]
    assert scan.folders(tree / "a") == [tree / "a" / "b"]


def test_a_list_is_cut_at_nul_or_at_lines():
    assert read_list(b"a.jpg\nb c.jpg\n\n") == ["a.jpg", "b c.jpg"]
    assert read_list(b"a\nb.jpg\0c\xff.jpg\0") == ["a\nb.jpg", os.fsdecode(b"c\xff.jpg")]
    assert read_list(b"") == []


def test_only_what_has_no_file_any_more_is_gone(tree, monkeypatch):
    (tree / "dangling.jpg").symlink_to("nowhere.jpg")
    gone = [tree / "none.jpg", tree / "a" / "1.jpg" / "x.jpg", tree / "dangling.jpg", tree / "a"]
    assert [is_gone(str(path)) for path in gone] == [True] * 4
    assert not is_gone(str(tree / "a" / "1.jpg"))

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)
    assert not is_gone(str(tree / "a" / "1.jpg"))
