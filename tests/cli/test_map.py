"""The verb `map` draws maps and never writes over an image."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.cli import main
from tests.small_encoder import small_encoder
from tests.small_models import NATIVE


@pytest.fixture
def small(tmp_path):
    """A folder with two images of one name, and one that is none."""
    for folder, colour in (("a", (250, 120, 0)), ("b", (0, 120, 250))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (70, 60), colour).save(tmp_path / folder / "field.png")
    (tmp_path / "broken.jpg").write_text("not an image")
    return tmp_path


MODEL = ["-m", str(small_encoder())]


def test_map_writes_the_image_beside_its_map(small, capsys):
    target = small / "out.png"
    assert main(["map", str(small / "a" / "field.png"), *MODEL, "-o", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    with Image.open(target) as image:
        assert image.width == 2 * image.height + 8
        assert image.convert("RGB").getpixel((5, 5)) == (250, 120, 0)


def test_map_of_several_images_fills_a_folder_without_losing_one(small, capsys):
    code = main(["map", str(small / "a"), str(small / "b"), *MODEL, "-o", str(small / "maps"), "--json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert [record["rows"] for record in records] == [4, 4]
    names = sorted(str(file.relative_to(small / "maps")) for file in (small / "maps").rglob("*.png"))
    assert names == ["a/field-pca.png", "b/field-pca.png"]


def test_map_of_a_native_image_leaves_out_what_fills_no_patch(tmp_path):
    image = Image.new("RGB", (5 * 14 + 6, 3 * 14 + 4), (0, 250, 0))
    image.paste((200, 0, 0), (0, 0, 5 * 14, 3 * 14))
    image.save(tmp_path / "rest.png")
    assert main(["map", str(tmp_path / "rest.png"), "-m", str(NATIVE), "-o", str(tmp_path / "map.png")]) == 0
    with Image.open(tmp_path / "map.png") as image:
        cell = image.height // 3
        assert image.size == (2 * 5 * cell + 8, 3 * cell)
        left = np.asarray(image.convert("RGB").crop((0, 0, 5 * cell, 3 * cell))).astype(int)
    assert np.abs(left - (200, 0, 0)).max() <= 1


def test_map_names_each_image_that_fails_and_draws_the_rest(small, capsys):
    inputs = [str(small / "a" / "field.png"), str(small / "broken.jpg"), str(small / "nowhere.jpg")]
    assert main(["map", *inputs, *MODEL, "-o", str(small / "maps")]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1
    lines = output.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("mlx-aimv2: ") for line in lines)
    assert "broken.jpg" in output.err
    assert "nowhere.jpg does not exist" in output.err


def test_map_of_a_patch_outside_says_where_the_grid_ends(small, capsys):
    image = str(small / "a" / "field.png")
    assert main(["map", image, *MODEL, "-o", str(small / "maps"), "--patch", "4,1"]) == 1
    assert re.fullmatch(r"mlx-aimv2: .*field.png has no patch 4,1: .* is 3,3\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["-o", "one.png"], "is one file for 2 images"),
        (["-o", "broken.jpg"], "is neither a folder nor ends in .png"),
        (["--patch", "1;2"], "wanted whole numbers such as 3,5"),
        (["--patch", "1,2,3"], "--patch is a row and a column such as 3,5, got 1,2,3"),
    ],
)
def test_wrong_use_of_map_ends_with_2(small, capsys, monkeypatch, flags, line):
    monkeypatch.chdir(small)
    try:
        code = main(["map", "a", "b", *MODEL, *flags])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert line in capsys.readouterr().err


def test_map_never_writes_over_its_image(small, capsys):
    image = small / "a" / "field.png"
    before = image.read_bytes()
    assert main(["map", str(image), *MODEL, "-o", str(image)]) == 2
    assert image.read_bytes() == before


def test_map_replaces_an_earlier_map_and_nothing_else(small, capsys):
    target = small / "map.png"
    arguments = ["map", str(small / "a" / "field.png"), *MODEL, "-o", str(target)]
    assert main(arguments) == 0
    assert main(arguments) == 0
    Image.new("RGB", (5, 7)).save(target)
    mine = target.read_bytes()
    assert main(arguments) == 2
    assert "exists and was not written by mlx-aimv2" in capsys.readouterr().err
    assert target.read_bytes() == mine
