"""Patterns mean what they mean in .gitignore, and the list of excluded folders is skipped at any depth."""

import pytest

from mlx_aimv2.images.find import EXCLUDED_FOLDERS, Rules


def excluded(path: str, *patterns: str, is_folder: bool = False, include: tuple[str, ...] = ()) -> bool:
    parent = ("/" + path).rsplit("/", 2)[-2]
    return Rules(patterns, include).excluded_by(path, is_folder=is_folder, parent=parent) is not None


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("*.png", ["a.png", "deep/er/b.PNG"], ["a.png.jpg", "png"]),
        ("IMG_????.jpg", ["IMG_1234.jpg", "x/img_0001.JPG"], ["IMG_123.jpg", "IMG_12/4.jpg"]),
        ("[a-c]*.jpg", ["b1.jpg"], ["d1.jpg"]),
        ("[!a-c]*.jpg", ["d1.jpg"], ["b1.jpg"]),
        ("2019/raw/*.jpg", ["2019/raw/a.jpg"], ["2019/raw/x/a.jpg", "old/2019/raw/a.jpg"]),
        ("/top.jpg", ["top.jpg"], []),
        ("**/raw/*.jpg", ["raw/a.jpg", "x/y/raw/a.jpg"], ["raw/x/a.jpg"]),
        ("2019/**/a.jpg", ["2019/a.jpg", "2019/x/y/a.jpg"], ["2020/a.jpg"]),
        ("2019/**", ["2019/a.jpg", "2019/x/a.jpg"], ["2020/a.jpg"]),
        (r"a\*.jpg", ["a*.jpg"], ["ab.jpg"]),
        ("a+b(1).jpg", ["a+b(1).jpg"], ["aab1.jpg"]),
    ],
)
def test_a_pattern_matches_as_in_gitignore(pattern, matching, other):
    assert all(excluded(path, pattern) for path in matching)
    assert not any(excluded(path, pattern) for path in other)


def test_a_slash_at_the_end_stands_for_folders_alone():
    assert excluded("x/trash", "Trash/", is_folder=True)
    assert not excluded("x/trash", "Trash/")


@pytest.mark.parametrize("name", EXCLUDED_FOLDERS)
def test_the_folders_on_the_list_are_skipped_at_any_depth_unless_included(name):
    assert excluded(name, is_folder=True) and excluded(f"a/b/{name.upper()}", is_folder=True)
    assert not excluded(name), "a file of that name is no such folder"
    assert not excluded(f"a/{name}", is_folder=True, include=(name.replace("[", "[[]"),))


@pytest.mark.parametrize("library", ["Old.photolibrary", "My Photos.photoslibrary", "iPhoto Library"])
def test_small_copies_in_photo_libraries_are_skipped(library):
    assert excluded(f"{library}/Thumbnails", is_folder=True) and excluded(f"x/{library}/resources", is_folder=True)
    assert not excluded(f"{library}/Masters", is_folder=True)
    assert not excluded("x/Thumbnails", is_folder=True), "an ordinary folder may be called so"


def test_the_last_pattern_that_matches_decides_and_a_mark_takes_back():
    assert excluded("b.png", "*.png", "!keep.png") and not excluded("d/keep.png", "*.png", "!keep.png")
    assert excluded("keep.png", "!keep.png", "*.png")
    assert not excluded("x.jpg", "!keep.png")


def test_a_file_is_not_included_because_its_folder_is():
    rules = Rules((), ("@eaDir", "raw/**"))
    assert rules.includes("a/@eaDir", is_folder=True) and not rules.includes("a/@eaDir/x.txt")
    assert rules.includes("raw/x.txt")


@pytest.mark.parametrize("pattern", ["[z-a]", "[a", "x[z-a].png"])
@pytest.mark.parametrize("flag", ["--exclude", "--include"])
def test_what_is_no_pattern_is_refused_in_one_line(pattern, flag):
    with pytest.raises(ValueError, match=rf"{flag} .* is not a pattern.*give one such as"):
        Rules(**{flag[2:]: (pattern,)})


@pytest.mark.parametrize("pattern", ["", "/", "//", "!", " "])
def test_an_empty_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match=r"--exclude .* is not a pattern: give one such as"):
        Rules((pattern,))
