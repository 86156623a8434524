"""LiT tuning: words find images, the loss is over the global batch, and what cannot go on ends in one line."""

import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import load
from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from mlx_aimv2.pretrain.data import open_data
from mlx_aimv2.pretrain.lit_tuning import LitSettings, cache_features, contrastive_loss
from tests.image_files import image
from tests.small_training import TINY, WORDS, CaptionWorkshop, moved, weights


@pytest.fixture
def shop(tmp_path):
    return CaptionWorkshop(tmp_path)


def test_the_loss_is_that_of_an_independent_computation():
    logits = np.random.default_rng(2).normal(size=(5, 5)).astype(np.float32)
    keys = [3, 1, 3, 2, 4]
    sums = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or keys[j] != keys[i]]
        sums += np.log(np.exp(logits[i, others]).sum()) - logits[i, i]
        sums += np.log(np.exp(logits[others, i]).sum()) - logits[i, i]
    found = contrastive_loss(mx.array(logits), mx.array(keys))
    assert float(found.item()) == pytest.approx(sums / 10, abs=1e-6)


def test_each_of_many_views_is_kept_and_computed_once(shop, monkeypatch):
    model, processor = load(shop.encoder)
    data, kept = open_data(shop.data[1]), shop.folder / "kept"
    found = cache_features(model, processor, data, kept, settings=LitSettings(views=151, seed=1))
    for number in (0, 6):
        own = np.array(model(processor(shop.data[1] / f"{number}.png")).last_hidden_state)[0]
        assert np.abs(found.view(number, 0) - own).max() < 5e-3  # they are kept in half precision
    crops = np.stack([found.view(6, view).reshape(-1) for view in range(1, 151)])
    assert len(np.unique(crops, axis=0)) == 150
    monkeypatch.setattr("mlx_aimv2.embed.loader.open_image", None)  # nothing is decoded
    again = cache_features(model, processor, data, kept, settings=LitSettings(views=17, seed=1))
    np.testing.assert_array_equal([again.view(6, view).reshape(-1) for view in range(1, 17)], crops[:16])


def test_the_seed_draws_the_crops_and_not_the_image_as_it_is(shop):
    model, processor = load(shop.encoder)
    data, kept = open_data(shop.data[1]), shop.folder / "kept"
    one, other = (
        cache_features(model, processor, data, kept, settings=LitSettings(views=3, seed=seed)) for seed in (1, 2)
    )
    assert [(one.view(2, view) == other.view(2, view)).all() for view in range(3)] == [True, False, False]


def test_an_unreadable_image_is_as_if_it_were_not_there(shop, capsys):
    """It is the last one, so that all others keep their numbers."""
    tokenizer = ("--tokenizer", shop.run("pretrain"))
    (shop.data[1] / "6.png").write_bytes(b"broken")
    broken = weights(shop.run("lit", *tokenizer))
    err = capsys.readouterr().err
    assert "6.png" in err and "skipped" in err
    listed = shop.data[1] / "metadata.jsonl"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[:6]))
    (shop.data[1] / "6.png").unlink()
    again = shop.new()
    assert main([*shop.words("lit", *tokenizer), "-o", str(again)]) == 0
    assert max(moved(broken, weights(again)).values()) < 1e-5


def test_an_image_whose_data_end_early_is_used_and_named(shop, capsys):
    image(shop.data[1] / "whole.jpg", (300, 200), 1)
    whole = (shop.data[1] / "whole.jpg").read_bytes()
    (shop.data[1] / "6.png").write_bytes(whole[: len(whole) // 2])
    (shop.data[1] / "whole.jpg").unlink()
    assert shop.run("lit", "--batch-size", 7).is_dir()
    assert "6.png ends early" in capsys.readouterr().err


@pytest.mark.slow
def test_words_find_the_images_they_were_trained_with(shop):
    output = shop.run("lit", "--batch-size", 7, "--iters", 150)
    model, reader = load(output)
    images = model.encode_image(reader([shop.data[1] / f"{i}.png" for i in range(7)]), normalize=True)
    texts = model.encode_text(reader.tokenize([f"{word} {i}" for i, word in enumerate(WORDS[:7])]), normalize=True)
    assert np.array(mx.argmax(images @ texts.T, axis=1)).tolist() == list(range(7))


def test_the_pair_is_all_that_is_left(shop, capsys):
    output = shop.run("lit")
    assert capsys.readouterr().out.strip() == str(output)
    assert load(output)[0].config.projection_dim == 19
    left = output.with_name(f"{output.name}.training")
    assert not [file.name for file in left.iterdir() if file.name.startswith(("features", "state"))]


def test_the_pair_is_converted_like_any_other(shop, tmp_path):
    convert(str(shop.run("lit")), mlx_path=str(tmp_path / "mlx"))
    one, other = load(shop.run("lit")), load(tmp_path / "mlx")
    ids = one[1].tokenize(["a bear"])
    assert (np.array(ids) == np.array(other[1].tokenize(["a bear"]))).all()
    assert np.abs(np.array(one[0].encode_text(ids)) - np.array(other[0].encode_text(ids))).max() < 1e-6


def test_of_a_pair_from_scratch_the_image_encoder_alone_is_used(shop):
    pair = shop.run("lit")
    assert shop.bits("lit", "--encoder", pair, "--from-scratch") == shop.bits("lit")


def started_from(pair, shop, *flags):
    """The pair that a run from another one has made; the text side's sizes are those of that."""
    words = shop.words("lit", "--encoder", pair, *flags)
    place, output = words.index("--config"), shop.new()
    assert main([*words[:place], *words[place + 2 :], "-o", str(output)]) == 0
    return output


def test_a_pair_that_goes_on_for_no_steps_is_as_it_was(shop, tmp_path):
    pair = shop.run("lit")
    about = json.loads((pair / "preprocessor_config.json").read_text()) | {"image_std": [0.5, 0.4, 0.3]}
    (pair / "preprocessor_config.json").write_text(json.dumps(about))
    again = started_from(pair, shop, "--iters", 0)
    files = sorted(file.name for file in pair.iterdir())
    assert [(again / name).read_bytes() for name in files if name != "preprocessor_config.json"] == [
        (pair / name).read_bytes() for name in files if name != "preprocessor_config.json"
    ]
    assert json.loads((again / "preprocessor_config.json").read_text())["image_std"] == [0.5, 0.4, 0.3]


def test_a_pair_goes_on_from_its_own_text_side(shop, capsys):
    pair = shop.run("lit", "--iters", 9)
    capsys.readouterr()
    near = moved(weights(pair), weights(started_from(pair, shop, "--iters", 1, "--learning-rate", 1e-5)))
    assert f"starting from the text encoder of {pair}" in capsys.readouterr().err
    assert 0 < max(near.values()) < 1e-4


def test_of_a_run_with_held_out_images_the_best_recall_is_kept(shop, capsys):
    """Held out are the images under each other's captions, so what is learned makes it worse."""
    held_out = shutil.copytree(shop.data[1], shop.folder / "held-out")
    rows = [json.loads(line) for line in (held_out / "metadata.jsonl").read_text().splitlines()]
    texts = [rows[i - 1]["text"][0] for i in range(7)]
    changed = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
    (held_out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    flags = ("--validation", held_out, "--steps-per-eval", 1, "--iters", 20, "--batch-size", 7)
    output = shop.run("lit", *flags, "--learning-rate", 3e-2)
    told = re.findall(r"at 1 ([\d.]+)%, at 5 ([\d.]+)%", capsys.readouterr().err)
    model, reader = load(output)
    images = model.encode_image(reader([held_out / f"{i}.png" for i in range(7)]), normalize=True)
    scores = np.array(images @ model.encode_text(reader.tokenize(texts), normalize=True).T)
    before = (scores > np.diag(scores)[:, None]).sum(axis=1)
    right = [round(7 * (float(first) + float(of_five)) / 100) for first, of_five in told]
    assert len(told) == 21 and max(right) > right[-1]
    assert (before < 1).sum() + (before < 5).sum() == max(right)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batch-size", 8), "7 images with captions, fewer than a batch of 8"),
        (("--views", 0), "--views must be at least 1"),
        (("--batch-size", 1), "--batch-size must be at least 2"),
        (("--iters", 9, "--learning-rate", 1e30), "the loss is "),
    ],
)
def test_what_cannot_go_on_is_one_line(shop, capsys, flags, words):
    output = shop.new()
    assert main([*shop.words("lit", *flags), "-o", str(output)]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not [*output.parent.glob(f"{output.name}*")]


def test_images_that_all_have_one_caption_are_refused_and_leave_nothing(shop, capsys):
    listed, output = shop.data[1] / "metadata.jsonl", shop.new()
    rows = [json.loads(line) | {"text": "a thing"} for line in listed.read_text().splitlines()]
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*shop.words("lit"), "-o", str(output)]) == 2
    assert "all images have the same caption, 'a thing'" in capsys.readouterr().err.splitlines()[-1]
    assert not [*output.parent.glob(f"{output.name}*")]


def test_sizes_that_a_pair_has_already_are_refused(shop, capsys):
    pair = shop.run("lit")
    assert main([*shop.words("lit", "--encoder", pair), "-o", str(shop.new())]) == 2
    assert f"--config would have no effect on the pair {pair}" in capsys.readouterr().err.splitlines()[-1]


def test_features_that_do_not_fit_on_the_disk_are_an_error(shop, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    output = shop.new()
    assert main([*shop.words("lit", "--views", 2), "-o", str(output)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "need 5,992 bytes where 1,000 are free" in line and "take fewer --views" in line
    assert not output.exists()


def test_the_pair_has_the_average_of_its_weights(shop):
    """The scale rises by the rate itself in the first step, of which the average takes nine elevenths."""
    flags, rate = ("--batch-size", 7, "--weight-decay", 0, "--iters", 1), 1e-3
    start, end = (float(shop.weights("lit", *flags, "--learning-rate", one)["logit_scale"]) for one in (TINY, rate))
    assert abs(end - start) / rate == pytest.approx(9 / 11, rel=0.05)
