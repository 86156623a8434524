"""Do images of features show what the features say: components, cosines, places, and the verb that draws them?"""

import json
import re

import numpy as np
import pytest
from PIL import Image
from small_models import NATIVE

from examples import tsne
from examples.contact_sheet import below, contact_sheet
from mlx_aimv2 import bundled, cli, plot

ROWS, COLUMNS, WIDTH = 3, 5, 7


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS * COLUMNS, WIDTH))


@pytest.mark.parametrize("shape", [(13, 5), (5, 13)], ids=["tall", "wide"])
def test_components_are_those_of_the_singular_values(shape):
    features = np.random.default_rng(1).normal(size=shape)
    left, spread, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(
        np.abs(plot.principal_components(features, 3)), np.abs(left[:, :3] * spread[:3]), atol=1e-9
    )


def test_the_sign_of_a_component_does_not_depend_on_the_order_of_tokens():
    features = tokens()
    np.testing.assert_allclose(
        plot.principal_components(features[::-1], 3)[::-1], plot.principal_components(features, 3), atol=1e-9
    )


def test_components_have_a_fixed_sign_and_those_that_do_not_exist_are_zero():
    line = np.outer(np.arange(5.0), [1, -8, 4])  # turned round, because its largest weight is negative
    coordinates = plot.principal_components(line, 3)
    np.testing.assert_allclose(coordinates, np.outer(np.arange(5) - 2, [-9, 0, 0]), atol=1e-9)
    assert not plot.principal_components(np.ones((4, 3)), 2).any()


def test_each_token_is_one_square_in_reading_order():
    features = np.zeros((ROWS * COLUMNS, WIDTH))
    features[1 * COLUMNS + 4] = 9  # one token unlike all others
    levels = np.asarray(plot.pca_map(features, (ROWS, COLUMNS), cell=4)).astype(int)
    assert levels.shape == (ROWS * 4, COLUMNS * 4, 3)
    other = np.abs(levels - levels[0, 0]).max(axis=2) > 0
    assert other[4:8, 16:20].all()
    assert other.sum() == 16


def test_equal_tokens_make_a_grey_map():
    assert set(np.asarray(plot.pca_map(np.ones((6, 4)), (2, 3))).ravel()) == {128}


def test_similarities_are_cosines_with_the_chosen_token():
    features = tokens()
    cosines = plot.similarities(features, (ROWS, COLUMNS), (1, 3))
    one, other = features[1 * COLUMNS + 3], features[2 * COLUMNS + 0]
    assert cosines[1, 3] == pytest.approx(1)
    assert cosines[2, 0] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_the_brightest_square_is_the_patch_itself_and_it_is_framed():
    image = plot.similarity_map(tokens(), (ROWS, COLUMNS), (2, 1), cell=20)
    levels = np.asarray(image).astype(int)
    assert tuple(levels[2 * 20, 1 * 20]) == plot.PAPER
    middles = levels[10::20, 10::20].sum(axis=2)
    assert np.unravel_index(middles.argmax(), middles.shape) == (2, 1)


@pytest.mark.parametrize("patch", [(3, 0), (0, 5), (-1, 0)])
def test_a_patch_outside_the_grid_is_named(patch):
    with pytest.raises(ValueError, match=rf"{patch[0]},{patch[1]} is outside the grid of 3 rows and 5 columns"):
        plot.similarities(tokens(), (ROWS, COLUMNS), patch)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"3 x 4 has 12 tokens \(N, D\), got an array \(15, 7\)"):
        plot.pca_map(tokens(), (3, 4))


def test_heat_grows_lighter_all_the_way():
    lightness = plot.heat(np.linspace(0, 1, 50)) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > 0).all()


def test_what_the_model_saw_is_the_image_again():
    image = np.random.default_rng(2).integers(0, 256, (5, 3, 3))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    pixels = ((image / 255 - mean) / std).astype(np.float32)
    assert (np.asarray(plot.seen(pixels, mean=mean, std=std)) == image).all()


def test_an_overlay_has_the_size_of_its_image():
    image, laid = Image.new("RGB", (30, 20), (100, 0, 0)), Image.new("RGB", (3, 2), (200, 0, 0))
    result = plot.overlay(image, laid, opacity=0.25)
    assert result.size == (30, 20)
    assert result.getpixel((7, 7)) == (125, 0, 0)


def test_a_contact_sheet_holds_every_image_in_its_frame():
    images = [[Image.new("RGB", (8, 8), (0, 0, 250))] * 3, [Image.new("RGB", (8, 4), (250, 0, 0))] * 2]
    frames = [[(0, 200, 0)] * 3, [None] * 2]
    canvas = contact_sheet(images, frames=frames, captions=[["a"] * 3, ["b"] * 2], side=40, gap=10)
    levels = np.asarray(canvas)
    count = {
        name: (levels == colour).all(axis=2).sum()
        for name, colour in {"blue": (0, 0, 250), "red": (250, 0, 0), "green": (0, 200, 0)}.items()
    }
    assert count["blue"] == 3 * 40 * 40
    assert count["red"] == 2 * 40 * 20
    assert count["green"] > 0


def test_points_are_drawn_where_they_lie_with_up_as_up():
    black = Image.new("L", (4, 4), 0)
    canvas = tsne.scatter(np.array([[0, 0], [1, 1]]), [black] * 2, [(200, 0, 0), (0, 0, 200)], size=(60, 40))
    levels = np.asarray(canvas)
    assert tuple(levels[33, 6]) == (200, 0, 0)
    assert tuple(levels[5, 53]) == (0, 0, 200)


def test_images_stand_beside_and_below_each_other():
    a, b = Image.new("RGB", (5, 7)), Image.new("RGB", (11, 3))
    assert plot.beside([a, b], gap=2).size == (18, 7)
    assert below([a, b], gap=2).size == (11, 12)
    assert plot.side_by_side([a, b], height=14, gap=1).size == (10 + 51 + 1, 14)


def test_the_plane_keeps_neighbours_together():
    chance = np.random.default_rng(4)
    centres = chance.normal(size=(3, 11)) * 5
    features = np.concatenate([centre + chance.normal(size=(13, 11)) for centre in centres])
    place = tsne.neighbour_plane(features, neighbours=5)
    groups = np.repeat(np.arange(3), 13)
    far = np.linalg.norm(place[:, None] - place, axis=2) + 1e9 * np.eye(len(place))
    assert (groups[far.argmin(axis=1)] == groups).all()
    np.testing.assert_array_equal(place, tsne.neighbour_plane(features, neighbours=5))


def test_the_perplexity_of_each_feature_is_as_asked():
    given = tsne._conditional(tokens(), 4.0)
    perplexity = np.exp(-(given * np.log(np.maximum(given, 1e-300))).sum(axis=1))
    np.testing.assert_allclose(perplexity, 4.0, rtol=1e-6)


def test_nearness_is_mutual():
    near = tsne._nearness(tokens(), 4.0)
    assert near.sum() == pytest.approx(1)
    np.testing.assert_allclose(near, near.T)


def test_two_features_make_no_plane():
    with pytest.raises(ValueError, match="at least 3 features, got 2"):
        tsne.neighbour_plane(np.ones((2, 5)))


@pytest.fixture
def small(tmp_path):
    """A folder with two images of one name, and one that is none."""
    for folder, colour in (("a", (250, 120, 0)), ("b", (0, 120, 250))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (70, 60), colour).save(tmp_path / folder / "field.png")
    (tmp_path / "broken.jpg").write_text("not an image")
    return tmp_path


MODEL = ["-m", str(bundled.digits_checkpoint())]


def test_map_writes_the_image_beside_its_map(small, capsys):
    target = small / "out.png"
    assert cli.main(["map", str(small / "a" / "field.png"), *MODEL, "-o", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    with Image.open(target) as image:
        assert image.width == 2 * image.height + 8
        assert image.convert("RGB").getpixel((5, 5)) == (250, 120, 0)


def test_map_of_several_images_fills_a_folder_without_losing_one(small, capsys):
    code = cli.main(["map", str(small / "a"), str(small / "b"), *MODEL, "-o", str(small / "maps"), "--json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert [record["rows"] for record in records] == [4, 4]
    assert sorted(file.name for file in (small / "maps").iterdir()) == ["field-2-pca.png", "field-pca.png"]


def test_map_of_a_native_image_leaves_out_what_fills_no_patch(tmp_path):
    image = Image.new("RGB", (5 * 14 + 6, 3 * 14 + 4), (0, 250, 0))
    image.paste((200, 0, 0), (0, 0, 5 * 14, 3 * 14))
    image.save(tmp_path / "rest.png")
    assert cli.main(["map", str(tmp_path / "rest.png"), "-m", str(NATIVE), "-o", str(tmp_path / "map.png")]) == 0
    with Image.open(tmp_path / "map.png") as image:
        cell = image.height // 3
        assert image.size == (2 * 5 * cell + 8, 3 * cell)
        left = np.asarray(image.convert("RGB").crop((0, 0, 5 * cell, 3 * cell))).astype(int)
    assert np.abs(left - (200, 0, 0)).max() <= 1


def test_map_names_each_image_that_fails_and_draws_the_rest(small, capsys):
    inputs = [str(small / "a" / "field.png"), str(small / "broken.jpg"), str(small / "nowhere.jpg")]
    assert cli.main(["map", *inputs, *MODEL, "-o", str(small / "maps")]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1
    lines = output.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("mlx-aimv2: ") for line in lines)
    assert "broken.jpg" in output.err
    assert "nowhere.jpg does not exist" in output.err


def test_map_of_a_patch_outside_says_where_the_grid_ends(small, capsys):
    image = str(small / "a" / "field.png")
    assert cli.main(["map", image, *MODEL, "-o", str(small / "maps"), "--patch", "4,1"]) == 1
    assert re.fullmatch(r"mlx-aimv2: .*field.png has no patch 4,1: .* is 3,3\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["-o", "one.png"], "is one file for 2 images"),
        (["-o", "broken.jpg"], "is neither a folder nor ends in .png"),
        (["--patch", "1;2"], "wanted ROW,COL such as 3,5"),
        (["--pca", "--patch", "1,2"], "not allowed with"),
    ],
)
def test_wrong_use_of_map_ends_with_2(small, capsys, monkeypatch, flags, line):
    monkeypatch.chdir(small)
    try:
        code = cli.main(["map", "a", "b", *MODEL, *flags])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert line in capsys.readouterr().err


def test_map_never_writes_over_its_image(small, capsys):
    image = small / "a" / "field.png"
    before = image.read_bytes()
    assert cli.main(["map", str(image), *MODEL, "-o", str(image)]) == 2
    assert image.read_bytes() == before


def test_map_replaces_an_earlier_map_and_nothing_else(small, capsys):
    target = small / "map.png"
    arguments = ["map", str(small / "a" / "field.png"), *MODEL, "-o", str(target)]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0
    Image.new("RGB", (5, 7)).save(target)
    mine = target.read_bytes()
    assert cli.main(arguments) == 2
    assert "is there already and no earlier map" in capsys.readouterr().err
    assert target.read_bytes() == mine
