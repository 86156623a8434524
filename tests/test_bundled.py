"""The package ships what it says: photographs, digits, emoji, and a pair of encoders that knows words for them."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from mlx_aimv2 import Aimv2VisionModel, bundled, load
from mlx_aimv2.checkpoint.detect import recognise
from mlx_aimv2.checkpoint.read import read
from tests.labelled import nearest_labels
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


def test_its_nearest_neighbours_know_held_out_digits_better_than_those_of_random_weights(scans):
    few = bundled.Digits(*(part[::6] for part in scans[:2]), *(part[::12] for part in scans[2:]))
    model, processor = load(bundled.emoji_checkpoint(), dtype="float32")
    trained = (nearest_labels(model, processor, few) == few.test_labels).mean()
    assert trained >= 0.65
    mx.random.seed(3)
    model.vision_model = Aimv2VisionModel(model.vision.config)
    assert (nearest_labels(model, processor, few) == few.test_labels).mean() < trained - 0.08
