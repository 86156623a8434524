"""The package ships what it says: photographs, digits, emoji, and a pair of encoders that knows words for them."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from examples import digits
from mlx_aimv2 import Aimv2VisionModel, bundled, load
from mlx_aimv2.checkpoint.detect import recognise
from mlx_aimv2.checkpoint.read import read
from tools import train_emoji

pytestmark = pytest.mark.rounding


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
    assert (bundled.emoji_checkpoint() / "model.safetensors").stat().st_size <= 8_000_000


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
    folder = bundled.emoji_checkpoint()
    checkpoint = read(folder)
    assert recognise(checkpoint.shapes).layout.name == "apple"
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {np.dtype("float16")}  # noqa: SIM118


def test_every_matrix_of_the_blocks_takes_the_usual_groups():
    config = load(bundled.emoji_checkpoint(), lazy=True)[0].config
    for part in (config.vision_config, config.text_config):
        assert part.hidden_size % 64 == part.intermediate_size % 64 == 0


def test_the_script_that_trains_the_pair_has_its_sizes():
    config = load(bundled.emoji_checkpoint(), lazy=True)[0].config
    for wanted, part in (
        (train_emoji.SIZES, config.vision_config),
        (train_emoji.TEXT["text_config"], config.text_config),
    ):
        for name, value in wanted.items():
            assert name == "decoder_config" or getattr(part, name) == value, name


def test_there_are_300_emoji_each_with_a_name_of_its_own():
    names = bundled.emoji_images()
    assert len(names) == len(set(names.values())) == 300
    for file in names:
        with Image.open(file) as image:
            assert image.size == (84, 84)


def test_names_find_their_emoji_and_emoji_their_names():
    model, processor = load(bundled.emoji_checkpoint(), dtype="float32")
    names = list(bundled.emoji_images().items())[::3]
    images = train_emoji.embed_images(model, processor, [file for file, _ in names])
    texts = train_emoji.embed_texts(model, processor, [name for _, name in names])
    scores = images @ texts.T
    for way in (scores, scores.T):
        place = (way > np.diag(way)[:, None]).sum(axis=1)
        assert (place < 5).mean() >= 0.8


def some(scans: bundled.Digits, train: int, test: int) -> bundled.Digits:
    """Every so manieth digit: without OpenBLAS all of them take half a minute, which `make demo` spends."""
    return bundled.Digits(
        scans.train_images[::train],
        scans.train_labels[::train],
        scans.test_images[::test],
        scans.test_labels[::test],
    )


def test_its_nearest_neighbours_know_held_out_digits_better_than_those_of_random_weights(scans, monkeypatch):
    few = some(scans, 12, 12)
    monkeypatch.setattr(bundled, "digits", lambda: few)
    model, processor = load(bundled.emoji_checkpoint(), dtype="float32")
    trained = digits.digits_accuracy(model.vision, processor)
    assert trained >= 0.6
    mx.random.seed(3)
    assert digits.digits_accuracy(Aimv2VisionModel(model.vision.config), processor) < trained - 0.1


def test_features_come_in_order_and_of_unit_length_from_every_batch(monkeypatch):
    model, processor = load(bundled.emoji_checkpoint(), dtype="float32")
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
