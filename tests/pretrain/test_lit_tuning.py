"""LiT tuning: the trunk stays as it was, words find images, the loss is over the global batch."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import mlx_aimv2
from mlx_aimv2.cli import main
from mlx_aimv2.config import Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import load
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.preprocessing import published
from mlx_aimv2.pretrain import contrastive
from mlx_aimv2.pretrain.augment import Augmentation
from mlx_aimv2.pretrain.captioned import open_data
from mlx_aimv2.pretrain.feature_cache import cache_features
from mlx_aimv2.pretrain.lit import LitSettings, lit
from mlx_aimv2.pretrain.objective import initialise
from mlx_aimv2.pretrain.train import write_encoder
from mlx_aimv2.processor import Aimv2Processor

LAUNCH = Path(sys.executable).parent / "mlx.launch"
WORDS = ("apple", "bear", "cloud", "door", "eagle", "fish", "grape", "hat")
VISION = Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5)
SETTINGS = LitSettings(
    text=Aimv2TextConfig(700, 14, 17, 2, 2, 11, 1),
    projection_dim=19,
    batch=4,
    steps=6,
    learning_rate=3e-3,
    views=2,
    seed=5,
    augmentation=Augmentation(flip=False),
)


@pytest.fixture
def folder(tmp_path):
    place, chance = tmp_path / "in", np.random.default_rng(8)
    place.mkdir()
    rows = []
    for number, word in enumerate(WORDS):
        Image.fromarray(chance.integers(0, 256, (3, 3, 3), np.uint8)).resize((15, 15)).save(place / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": [f"{word} number {number}", word]})
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def encoder():
    model = Aimv2VisionModel(VISION)
    initialise(model, 2, seed=6)
    return model


@pytest.fixture
def processor():
    return Aimv2Processor(published(15), patch_size=5)


def test_the_loss_is_that_of_an_independent_computation():
    logits = np.random.default_rng(2).normal(size=(5, 5)).astype(np.float32)
    keys = [3, 1, 3, 2, 4]
    sums = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or keys[j] != keys[i]]
        sums += np.log(np.exp(logits[i, others]).sum()) - logits[i, i]
        sums += np.log(np.exp(logits[others, i]).sum()) - logits[i, i]
    found = contrastive.contrastive_loss(mx.array(logits), contrastive.same_captions(keys))
    assert float(found.item()) == pytest.approx(sums / 10, abs=1e-6)


def test_only_what_is_not_the_trunk_changes(folder, encoder, processor, tmp_path):
    before = {name: np.array(array) for name, array in tree_flatten(encoder.parameters())}
    pair = lit(open_data(folder), encoder, processor, tmp_path / "out", settings=SETTINGS)
    after = {name: np.array(array) for name, array in tree_flatten(pair.vision_model.parameters())}
    assert all((after[name] == array).all() for name, array in before.items())
    assert np.abs(np.array(pair.vision_model.head.k.weight)).max() > 0
    assert float(pair.logit_scale.item()) != pytest.approx(np.log(1 / 0.07), abs=1e-6)


def test_the_cache_holds_what_the_trunk_gives(folder, encoder, processor, tmp_path):
    options = {"views": 3, "augmentation": Augmentation(), "seed": 1}
    found = cache_features(encoder, processor, open_data(folder), tmp_path / "kept", **options)
    assert found.features.rows.shape == (8 * 3, 9, 22) and found.features.rows.dtype == np.float16
    own = np.array(encoder(processor(folder / "3.png")).last_hidden_state)[0]
    whole, crop = found.take([3, 3], [0, 1])
    assert np.abs(whole - own).max() < 5e-3
    assert np.abs(crop - own).max() > 1e-2
    assert found.texts[3] == ("door number 3", "door")


def test_each_of_many_views_is_kept_and_computed_once(folder, encoder, processor, tmp_path, monkeypatch):
    options = {"views": 131, "augmentation": Augmentation(), "seed": 1}
    found = cache_features(encoder, processor, open_data(folder), tmp_path / "kept", **options)
    for number in (0, 7):
        own = np.array(encoder(processor(folder / f"{number}.png")).last_hidden_state)[0]
        assert np.abs(found.take([number], [0])[0] - own).max() < 5e-3
    crops = found.take([7] * 130, list(range(1, 131))).reshape(130, -1)
    assert len(np.unique(crops, axis=0)) == 130
    monkeypatch.setattr("mlx_aimv2.embed.loader.open_image", None)  # nothing is decoded
    again = cache_features(encoder, processor, open_data(folder), tmp_path / "kept", **options | {"views": 17})
    np.testing.assert_array_equal(again.take([7] * 16, list(range(1, 17))).reshape(16, -1), crops[:16])


def test_an_unreadable_image_is_passed_over(folder, encoder, processor, tmp_path):
    (folder / "2.png").write_bytes(b"broken")
    options = {"views": 1, "augmentation": Augmentation(), "seed": 1}
    with pytest.warns(UserWarning, match=r"2\.png.*passed over"):
        found = cache_features(encoder, processor, open_data(folder), tmp_path / "kept", **options)
    assert len(found.texts) == len(found.features.rows) == 7
    own = np.array(encoder(processor(folder / "3.png")).last_hidden_state)[0]
    assert np.abs(found.take([2], [0])[0] - own).max() < 5e-3


@pytest.mark.slow
def test_words_find_the_images_they_were_trained_with(folder, encoder, processor, tmp_path):
    settings = replace(SETTINGS, batch=8, steps=150, views=1)
    lit(open_data(folder), encoder, processor, tmp_path / "out", settings=settings)
    model, reader = load(tmp_path / "out")
    images = model.encode_image(reader([folder / f"{i}.png" for i in range(8)]), normalize=True)
    texts = model.encode_text(reader.tokenize([f"{word} number {i}" for i, word in enumerate(WORDS)]), normalize=True)
    assert np.array(mx.argmax(images @ texts.T, axis=1)).tolist() == list(range(8))
    assert not list((tmp_path / "out.training").glob("features*"))


def test_the_pair_is_converted_and_exported_like_any_other(folder, encoder, processor, tmp_path):
    lit(open_data(folder), encoder, processor, tmp_path / "out", settings=SETTINGS)
    convert(str(tmp_path / "out"), mlx_path=str(tmp_path / "mlx"))
    one, other = load(tmp_path / "out"), load(tmp_path / "mlx")
    ids = one[1].tokenize(["a bear"])
    assert (np.array(ids) == np.array(other[1].tokenize(["a bear"]))).all()
    assert np.abs(np.array(one[0].encode_text(ids)) - np.array(other[0].encode_text(ids))).max() < 1e-6


def test_fewer_images_than_a_batch_are_an_error(folder, encoder, processor, tmp_path):
    with pytest.raises(ValueError, match="8 images with captions, fewer than a batch of 9"):
        lit(open_data(folder), encoder, processor, tmp_path / "out", settings=replace(SETTINGS, batch=9))
    assert not (tmp_path / "out").exists()


def test_features_that_do_not_fit_on_the_disk_are_an_error(folder, encoder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"rows\.bin, which need 6,848 bytes: free some, or take fewer --views"):
        lit(open_data(folder), encoder, processor, tmp_path / "out", settings=SETTINGS)


@pytest.fixture
def command(folder, encoder, tmp_path):
    write_encoder(encoder, tmp_path / "encoder")
    text = {"hidden_size": 14, "intermediate_size": 17, "num_hidden_layers": 2, "num_attention_heads": 2}
    content = {"projection_dim": 19, "text_config": text | {"max_position_embeddings": 11}}
    (tmp_path / "text.json").write_text(json.dumps(content))
    words = f"--encoder {tmp_path / 'encoder'} --config {tmp_path / 'text.json'} --batch 4 --vocab-size 700".split()
    return ["lit", str(folder), *words]


def test_the_verb_tunes(command, tmp_path, capsys):
    assert main([*command, "-o", str(tmp_path / "out"), "--steps", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert load(tmp_path / "out")[0].config.projection_dim == 19


def test_a_learning_rate_without_end_is_one_line(command, tmp_path, capsys):
    assert main([*command, "-o", str(tmp_path / "out"), "--steps", "9", "--learning-rate", "1e30"]) == 2
    assert "the loss is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
def test_two_ranks_give_what_one_gives(command, tmp_path):
    words = [*command, "--steps", "20"]
    assert main([*words, "-o", str(tmp_path / "one")]) == 0
    port = random.randrange(20000, 60000)
    launcher = [sys.executable, str(LAUNCH), "-n", "2", "--backend", "ring", "-p", str(port), sys.executable]
    environment = os.environ | {"PYTHONPATH": str(Path(mlx_aimv2.__file__).parents[1])}
    with subprocess.Popen(
        [*launcher, "-m", "mlx_aimv2", *words, "-o", str(tmp_path / "two")],
        stdin=subprocess.PIPE,  # an end of input would keep the launcher busy
        stdout=subprocess.DEVNULL,
        env=environment,
    ) as process:
        try:
            process.wait(180)
        finally:
            process.kill()
    one, two = (dict(tree_flatten(load(tmp_path / name)[0].parameters())) for name in ("one", "two"))
    assert max(float(mx.abs(one[name] - two[name]).max().item()) for name in one) < 1e-5


def test_the_pair_has_the_average_of_its_weights(folder, encoder, processor, tmp_path, monkeypatch):
    short = replace(SETTINGS, steps=2, warm_up=1)  # the first step only warms up
    average = lit(open_data(folder), encoder, processor, tmp_path / "average", settings=short).logit_scale.item()
    monkeypatch.setattr("mlx_aimv2.pretrain.lit.EMA", 0.0)
    last = lit(open_data(folder), encoder, processor, tmp_path / "last", settings=short).logit_scale.item()
    start = np.log(1 / 0.07)
    assert abs(last - start) > 1e-4
    assert average == pytest.approx(start / 4 + 3 / 4 * last, abs=1e-6)
