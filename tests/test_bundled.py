"""The package ships what it says: free photographs, digits, and an encoder that classifies the digits."""

import hashlib
import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from examples import digits
from mlx_aimv2 import Aimv2VisionModel, bundled, load
from mlx_aimv2.checkpoint.detect import recognise
from mlx_aimv2.checkpoint.read import read


@pytest.fixture(scope="module")
def scans() -> bundled.Digits:
    return bundled.digits()


def test_every_photograph_opens_and_has_its_credit():
    credits = (bundled.ASSETS / "CREDITS.md").read_text(encoding="utf-8")
    assert len(bundled.photographs()) == 4
    for file in bundled.photographs():
        assert f"`{file.name}`" in credits
        with Image.open(file) as image:
            image.load()
            assert min(image.size) >= 300


def test_the_assets_are_small():
    files = [file for file in bundled.ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if file.suffix == ".jpg") < 600_000
    assert (bundled.ASSETS / "digits.npz").stat().st_size < 200_000
    assert (bundled.digits_checkpoint() / "model.safetensors").stat().st_size <= 3_000_000


def test_the_digits_are_all_there_and_a_third_is_held_out(scans):
    assert scans.train_images.shape == (1198, 8, 8)
    assert scans.test_images.shape == (599, 8, 8)
    assert len(scans.train_labels) == 1198
    assert len(scans.test_labels) == 599
    assert scans.train_images.dtype == scans.test_images.dtype == np.uint8


def test_the_digits_are_dark_on_white(scans):
    assert np.median(scans.train_images[:, :, 0]) == 255
    assert scans.train_images.min() == 0


def test_every_class_is_held_out_alike(scans):
    counts = np.bincount(scans.test_labels)
    assert len(counts) == 10
    assert counts.min() >= 58
    assert counts.max() <= 61


def test_no_held_out_scan_is_also_trained_on(scans):
    prints = [
        {hashlib.sha256(scan.tobytes()).digest() for scan in part} for part in (scans.train_images, scans.test_images)
    ]
    assert not prints[0] & prints[1]


def test_the_checkpoint_is_in_apples_layout_as_torch_saves_it():
    folder = bundled.digits_checkpoint()
    checkpoint = read(folder)
    assert recognise(checkpoint.shapes).layout.name == "apple"
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {np.dtype("float32")}  # noqa: SIM118
        conv = file.get_tensor("preprocessor.patchifier.proj.weight")
        table = file.get_tensor("preprocessor.pos_embed")
    config = json.loads((folder / "config.json").read_text())
    assert conv.shape == (config["hidden_size"], 3, config["patch_size"], config["patch_size"])
    assert table.shape == (1, config["num_queries"], config["hidden_size"])


@pytest.fixture(scope="module")
def training():
    file = Path(__file__).parent.parent / "convert" / "train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_training_writes_is_what_it_trained(training, tmp_path):
    model = Aimv2VisionModel(training.CONFIG)
    training.start_small(model)
    training.write_checkpoint(model, tmp_path)
    again, processor = load(tmp_path)
    pixels = processor(bundled.photographs()[0])
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    assert again.config == training.CONFIG
    assert mx.array_equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_the_script_is_the_one_that_made_the_checkpoint(training):
    assert load(bundled.digits_checkpoint(), lazy=True)[0].config == training.CONFIG


def test_training_images_are_the_scans_turned_about_their_centre(training, monkeypatch):
    scan = np.full((8, 8), 255, np.uint8)
    scan[2:6, 3:5] = 0
    for limit in ("TURN", "SHIFT", "ZOOM"):
        monkeypatch.setattr(training, limit, 0.0)
    still = np.asarray(training.varied(scan, np.random.default_rng(0)))
    assert np.array_equal(still, np.asarray(Image.fromarray(scan).resize((56, 56), Image.Resampling.BICUBIC)))
    monkeypatch.setattr(training, "TURN", 90.0)
    monkeypatch.setattr(training, "ZOOM", 0.2)
    turned = 255 - np.asarray(training.varied(scan, np.random.default_rng(1))).astype(float)
    assert np.abs(turned - (255.0 - still)).max() > 100
    for axis in (0, 1):
        assert (turned.sum(axis=axis) * np.arange(56)).sum() / turned.sum() == pytest.approx(27.5, abs=0.3)


def test_what_comes_in_at_the_edge_is_paper(training, monkeypatch):
    monkeypatch.setattr(training, "SHIFT", 0.3)
    blank = np.full((8, 8), 255, np.uint8)
    assert (np.asarray(training.varied(blank, np.random.default_rng(2))) == 255).all()


def test_every_matrix_of_the_blocks_takes_every_quantization():
    config = load(bundled.digits_checkpoint(), lazy=True)[0].config
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0


def some(scans: bundled.Digits, train: int, test: int) -> bundled.Digits:
    """Every so manieth digit: without OpenBLAS all of them take half a minute, which `make demo` spends."""
    return bundled.Digits(
        scans.train_images[::train],
        scans.train_labels[::train],
        scans.test_images[::test],
        scans.test_labels[::test],
    )


def test_its_five_nearest_neighbours_know_the_held_out_digits(scans, monkeypatch):
    few = some(scans, 6, 4)
    monkeypatch.setattr(bundled, "digits", lambda: few)
    assert digits.digits_accuracy(*load(bundled.digits_checkpoint())) >= 0.97


def test_the_accuracy_is_earned_by_the_weights(scans, monkeypatch):
    few = some(scans, 12, 12)
    monkeypatch.setattr(bundled, "digits", lambda: few)
    model, processor = load(bundled.digits_checkpoint())
    trained = digits.digits_accuracy(model, processor)
    mx.random.seed(3)
    assert digits.digits_accuracy(Aimv2VisionModel(model.config), processor) < trained - 0.1


def test_features_come_in_order_and_of_unit_length_from_every_batch(monkeypatch):
    model, processor = load(bundled.digits_checkpoint())
    images = bundled.digits().test_images[:7]
    whole = digits.encode(model, processor, images)
    monkeypatch.setattr(digits, "BATCH", 3)
    np.testing.assert_allclose(digits.encode(model, processor, images), whole, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)


BANK = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)


@pytest.mark.parametrize(
    ("labels", "neighbours", "winner"),
    [
        ([3, 7, 7, 0, 0], 3, 7),  # two against the nearest one
        ([3, 7, 5, 7, 7], 3, 3),  # one vote each: the nearest wins
        ([3, 7, 7, 3, 0], 4, 3),  # two votes each: the nearest wins
        ([3, 7, 7, 7, 7], 1, 3),
    ],
)
def test_most_votes_win_and_the_nearest_breaks_a_tie(labels, neighbours, winner):
    query = np.array([[1, 0.1]], np.float32)
    assert digits.vote(BANK, np.array(labels, np.uint8), query, neighbours=neighbours).tolist() == [winner]
