"""What `pretrain` and `lit` are promised to do, as tables of facts over both, through the command alone."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import load
from mlx_aimv2.cli import main
from mlx_aimv2.images.preprocessing import CLIP_MEAN, CLIP_STD
from mlx_aimv2.pretrain.data import collate
from mlx_aimv2.tokenizer import Tokenizer
from tests.small_training import (
    TINY,
    CaptionWorkshop,
    arrays,
    length_of_moments,
    moved,
    result,
    stopped_by,
    weights,
    write_encoder,
)

VERBS = ("pretrain", "pretrain --native", "lit")

STILL = ("--learning-rate", TINY, "--weight-decay", 0)
"""Nothing is learned: the losses are those of the start."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return CaptionWorkshop(tmp_path_factory.mktemp("shop"))


# Seeds


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_seed_gives_the_same_bits_and_another_one_others(shop, verb):
    again = shop.new()
    assert main([*shop.words(verb), "-o", str(again)]) == 0
    assert result(again) == shop.bits(verb) != shop.bits(verb, "--seed", 6)


# A run that is stopped


def stopped(shop, verb, *flags, steps=5, at=3):
    """The output of a run that is stopped as it says its losses of step `at`, the state of the step before saved."""
    output = shop.new()
    schedule = ["--iters", steps, "--save-every", 1, "--steps-per-report", 1]
    schedule += [] if verb == "lit" else ["--validation", shop.data[1], "--steps-per-eval", at]
    words = [str(word) for word in (*shop.words(verb, *flags), *schedule)]
    with stopped_by(f"step {at} "):
        assert main([*words, "-o", str(output)]) != 0
    assert not output.exists()
    return output, words


@pytest.mark.parametrize("flags", [(), ("--jitter", 0.5, "--grey", 0.5)], ids=["plain", "changed"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(shop, verb, flags, capsys):
    output, words = stopped(shop, verb, *flags)
    assert main([*words, "-o", str(output)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*words, "-o", str(output), "--resume"]) == 0
    assert result(output) == shop.bits(verb, *flags, "--iters", 5)


@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_how_often_a_run_reports_and_saves_may_change_when_it_goes_on(shop, verb):
    output, words = stopped(shop, verb)
    assert main([*words, "-o", str(output), "--resume", "--steps-per-report", "2", "--save-every", "3"]) == 0
    assert result(output) == shop.bits(verb, "--iters", 5)


def test_lit_goes_on_with_its_own_encoder_alone(shop, tmp_path, capsys):
    output, words = stopped(shop, "lit")
    other = write_encoder(tmp_path / "other", load(shop.encoder)[0].config, seed=4)
    assert main([*words, "--encoder", str(other), "-o", str(output), "--resume"]) == 2
    assert "was started with encoder " in capsys.readouterr().err
    moved = shutil.copytree(shop.encoder, tmp_path / "moved")
    about = json.loads((moved / "preprocessor_config.json").read_text()) | {"image_std": [0.5, 0.5, 0.5]}
    (moved / "preprocessor_config.json").write_text(json.dumps(about))
    assert main([*words, "--encoder", str(moved), "-o", str(output), "--resume"]) == 2
    assert "was started with preprocessing " in capsys.readouterr().err


def darker(folder):
    """Another image of the same name, of as many bytes."""
    name = folder / "4.bmp"
    name.write_bytes(name.read_bytes()[:-9] + bytes(9))


def renamed(folder):
    """Another caption of the same length."""
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace("eagle", "snake"))


def fewer(folder):
    file = folder / "metadata.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def write_shards(folder, data):
    """The images and their captions as a shard."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as archive:
        for row in map(json.loads, (data / "metadata.jsonl").read_text().splitlines()):
            name = Path(row["file_name"])
            texts = {name: (data / name).read_bytes(), name.with_suffix(".txt"): row["text"][0].encode()}
            for member, content in texts.items():
                about = tarfile.TarInfo(str(member))
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))


@pytest.mark.parametrize("change", [darker, renamed, fewer])
@pytest.mark.parametrize("form", ["folder", "shards"])
@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_a_run_goes_on_with_its_own_images_and_captions_alone(shop, tmp_path, capsys, verb, form, change):
    """Wherever they lie: the same data elsewhere are gone on with."""
    data = shutil.copytree(shop.data[1], tmp_path / "data")
    Image.open(data / "4.png").save(data / "4.bmp")
    (data / "metadata.jsonl").write_text((data / "metadata.jsonl").read_text().replace("4.png", "4.bmp"))
    (data / "4.png").unlink()

    def words(data, to):
        if form == "shards":
            write_shards(to, data)
            data = to
        command = shop.words(verb, "--iters", 5, "--save-every", 1, "--steps-per-report", 1)
        return [command[0], str(data), *command[2:], "-o", str(tmp_path / "out")]

    with stopped_by("step 3 "):
        assert main(words(data, tmp_path / "a")) != 0
    changed = shutil.copytree(data, tmp_path / "changed")
    change(changed)
    capsys.readouterr()
    assert main([*words(changed, tmp_path / "b"), "--resume"]) == 2
    assert "was started with data " in capsys.readouterr().err
    assert main([*words(data, tmp_path / "c"), "--resume"]) == 0


@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_a_run_goes_on_with_its_own_tokenizer_alone(shop, capsys, verb):
    output, words = stopped(shop, verb)
    training = output.with_name(f"{output.name}.training")
    tokenizer = training / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"b"', '"both"').replace('"c"', '"b"').replace('"both"', '"c"'))
    assert main([*words, "-o", str(output), "--resume"]) == 2
    assert "was started with tokenizer " in capsys.readouterr().err
    tokenizer.unlink()  # it is made again from the captions
    assert main([*words, "-o", str(output), "--resume"]) == 0
    assert result(output) == shop.bits(verb, "--iters", 5)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_a_loss_that_is_no_number_stops_and_can_be_gone_on_from_with_less(shop, capsys, verb, every):
    """The state that is kept is the last one whose weights have given a number, and no huge one."""
    output = shop.new()
    words = [*shop.words(verb, "--iters", 9, "--save-every", every, "--warm-up", 0), "-o", str(output)]
    with stopped_by("step 5 "):
        assert main([*words, "--steps-per-report", "1"]) != 0
    assert main([*words, "--learning-rate", "1e30", "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is " in line and "--resume and less than --learning-rate 1e+30" in line
    state = arrays(output.with_name(f"{output.name}.training") / "state.safetensors")
    assert all(np.isfinite(array).all() for array in state.values())
    assert main([*words, "--resume"]) == 0
    assert result(output) == shop.bits(verb, "--iters", 9, "--warm-up", 0)


def test_lit_goes_on_with_as_many_views_as_it_was_begun_with(shop, capsys):
    output, words = stopped(shop, "lit", "--views", 2)
    assert main([*words, "--views", "3", "-o", str(output), "--resume"]) == 2
    assert "was started with views 2, now 3" in capsys.readouterr().err


def test_an_epoch_that_was_begun_is_gone_on_with(shop):
    """Seven images in batches of three: the second epoch begins within a batch."""
    output, words = stopped(shop, "pretrain", steps=6, at=4)
    assert main([*words, "-o", str(output), "--resume"]) == 0
    assert result(output) == shop.bits("pretrain", "--iters", 6)


# What options do

SHARED = [
    ("--batch-size", 2),
    ("--iters", 5),
    ("--learning-rate", 1e-3),
    ("--warm-up", 3),
    ("--weight-decay", 0.5),
    ("--min-area", 0.1),
    ("--no-flip",),
    ("--jitter", 0.9),
    ("--grey", 1.0),
]
CHANGES = {
    "pretrain": [*SHARED, ("--alpha", 3.0), ("--dtype", "bfloat16")],
    "pretrain --native": [("--patches", 4, 9), ("--min-area", 0.1)],
    "lit": SHARED,
}


@pytest.mark.parametrize(
    ("verb", "flags"),
    [pytest.param(verb, flags, id=f"{verb} {flags[0]}") for verb, table in CHANGES.items() for flags in table],
)
def test_an_option_changes_what_is_learned(shop, verb, flags):
    views = ("--views", 3) if verb == "lit" else ()
    assert shop.bits(verb, *views) != shop.bits(verb, *views, *flags)


def test_views_change_what_lit_learns(shop):
    """By more than what is rounded otherwise where more views are computed at a time."""
    one, two, three = (shop.weights("lit", "--views", views) for views in (1, 2, 3))
    assert max(moved(one, two).values()) > 1e-3 < max(moved(two, three).values())


def test_images_of_one_caption_are_no_wrong_answers_to_it(tmp_path):
    """In a batch where all have the same there is nothing to tell apart."""
    shop = CaptionWorkshop(tmp_path)
    listed = shop.data[1] / "metadata.jsonl"
    *rows, other = [json.loads(line) for line in listed.read_text().splitlines()]
    alike = [row | {"text": "a thing"} for row in rows]
    listed.write_text("".join(json.dumps(row) + "\n" for row in [*alike, other]))
    first, second = sorted(losses_by_step(shop, "lit", 2, *STILL))
    assert first == 0 < second  # of one epoch, in which the other image is in one batch


def test_a_tokenizer_learns_from_all_captions(shop):
    """A word that it has seen now and then is one token between the ends."""
    tokenizer = Tokenizer.from_folder(shop.run("pretrain", captions=3))
    ids = tokenizer(["apple", "there", "zebra"])
    assert [(row != tokenizer.eos).sum() for row in ids[:2]] == [2, 2]
    assert (ids[2] != tokenizer.eos).sum() > 3


def test_pretraining_goes_on_with_as_many_ranks_as_it_was_begun_with(shop, capsys):
    output, words = stopped(shop, "pretrain")
    tensors, about = mx.load(str(state_of(output)), return_metadata=True)
    identity = json.loads(about["identity"]) | {"ranks": 2}
    mx.save_safetensors(str(state_of(output)), tensors, metadata=about | {"identity": json.dumps(identity)})
    assert main([*words, "-o", str(output), "--resume"]) == 2
    assert "was started with ranks 2, now 1" in capsys.readouterr().err


def test_without_further_views_no_crop_is_taken(shop):
    assert shop.bits("lit") == shop.bits("lit", "--min-area", 0.1, "--jitter", 0.5)


def test_batches_of_a_step_give_what_one_large_batch_gives(shop):
    small = shop.weights("pretrain", "--batch-size", 1, "--grad-accumulation-steps", 3)
    went = moved(shop.weights("pretrain"), small)
    assert max(went.values()) < 1e-5


@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_the_first_caption_alone_is_as_if_there_were_no_others(shop, verb):
    tokenizer = ("--tokenizer", shop.run("pretrain", captions=3))
    one, first, all_of_them = (
        shop.bits(verb, *tokenizer, "--first-caption", share, captions=count)
        for share, count in ((0, 1), (1, 3), (0, 3))
    )
    assert one == first != all_of_them


# The optimizer


@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_the_rate_falls_towards_the_end(shop, verb):
    rate, steps = 1e-5, 8
    flags = ("--weight-decay", 0, "--batch-size", 7, "--iters", steps, "--min-area", 1, "--no-flip")
    start = shop.weights(verb, *flags, "--learning-rate", TINY)
    went = moved(start, shop.weights(verb, *flags, "--learning-rate", rate))
    assert 0.3 * rate * steps < max(went.values()) < 0.75 * rate * steps


def test_gradients_are_cut_to_one_length(shop):
    one, other = (
        length_of_moments(state_of(stopped(shop, "pretrain", "--alpha", alpha, at=2)[0])) for alpha in (1e4, 1e5)
    )
    assert other == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_the_betas_are_those_of_pretraining(shop, verb):
    """0.9 and 0.95: after a step the moments are a tenth of the gradient and a twentieth of its square."""
    moments = arrays(state_of(stopped(shop, verb, at=2)[0]))
    first = np.concatenate([x.ravel() for name, x in sorted(moments.items()) if name.endswith(".m")])
    second = np.concatenate([x.ravel() for name, x in sorted(moments.items()) if name.endswith(".v")])
    large = np.abs(first) > 1e-3 * np.abs(first).max()
    np.testing.assert_allclose(second[large] / first[large] ** 2, 0.05 / 0.1**2, rtol=1e-3)


def test_matrices_are_decayed_and_positions_are_not(shop):
    one, other = (shop.weights("pretrain", "--iters", 1, "--weight-decay", decay) for decay in (0, 0.9))
    went = moved(one, other)
    assert all((went[name] > 0) == (array.ndim > 1 and name != "pos_embed") for name, array in one.items())


def state_of(output):
    return output.with_name(f"{output.name}.training") / "state.safetensors"


def test_each_step_of_a_native_run_has_one_grid_for_its_batches_and_other_steps_have_others(shop, monkeypatch):
    shapes = []

    def noting(examples, tokenizer):
        batch = collate(examples, tokenizer)
        shapes.append(batch.pixels.shape[1:3])
        return batch

    monkeypatch.setattr("mlx_aimv2.pretrain.pretraining.collate", noting)
    shop.run("pretrain --native", "--grad-accumulation-steps", 2, "--iters", 6)
    assert shapes[::2] == shapes[1::2] and len(shapes) == 12
    assert len(set(shapes)) > 2


def test_a_native_batch_of_small_images_has_more_of_them(shop, monkeypatch):
    batches = []

    def noting(examples, tokenizer):
        batch = collate(examples, tokenizer)
        batches.append((batch.pixels.shape[0], batch.pixels[0].size))
        return batch

    monkeypatch.setattr("mlx_aimv2.pretrain.pretraining.collate", noting)
    shop.run("pretrain --native", "--iters", 9, "--batch-size", 7)
    (most, smallest), *_, (fewest, largest) = sorted(batches, key=lambda batch: batch[1])
    assert most > 7 > fewest and smallest < largest


def test_the_trunk_is_frozen_and_the_rest_is_not(shop):
    start, end = shop.weights("lit", *STILL), shop.weights("lit")
    went = moved(start, end)
    trunk = weights(shop.encoder)
    for name, far in went.items():
        path = name.removeprefix("vision_model.")
        if path in trunk and name != path:
            assert far == 0 and (trunk[path] == end[name]).all()
    learned = [far for name, far in went.items() if name.removeprefix("vision_model.") not in trunk]
    assert len(learned) > len(trunk) / 2 and min(learned) > 0


def test_everything_is_trained_in_pretraining(shop):
    went = moved(shop.weights("pretrain", *STILL), shop.weights("pretrain"))
    assert min(went.values()) > 0


# Order and examples


def last_loss(shop, verb, *flags, name="loss"):
    return [entry[name] for entry in shop.log(verb, *flags) if name in entry][-1]


def losses_by_step(shop, verb, steps, *flags, name="loss"):
    entries = shop.log(verb, *flags, "--iters", steps, "--steps-per-report", 1)
    return [entry[name] for entry in entries]


def test_every_epoch_of_pretraining_takes_each_image_once_in_another_order(tmp_path):
    """Where all images look alike, it is the caption that decides its loss, and the prefix hardly."""
    shop = CaptionWorkshop(tmp_path, count=4)
    for file in shop.data[1].glob("*.png"):
        Image.new("RGB", (15, 15), (124, 116, 104)).save(file)
    losses = losses_by_step(shop, "pretrain", 8, *STILL, "--batch-size", 1, name="text_loss")
    epochs = np.array(losses).reshape(2, 4)
    apart = np.diff(np.sort(epochs[0])).min()
    np.testing.assert_allclose(np.sort(epochs[1]), np.sort(epochs[0]), atol=apart / 2)
    assert np.argsort(epochs[1]).tolist() != np.argsort(epochs[0]).tolist()


def test_every_epoch_of_lit_takes_other_images_together(tmp_path):
    shop = CaptionWorkshop(tmp_path, count=6)
    losses = losses_by_step(shop, "lit", 6, *STILL, "--batch-size", 2)
    assert losses[:3] != losses[3:]


def test_held_out_images_are_neither_cropped_nor_changed(shop):
    flags = (*STILL, "--iters", 1, "--validation", shop.data[3], "--steps-per-eval", 1)
    one, other = (
        last_loss(shop, "pretrain", *flags, *more, name="validation_image_loss")
        for more in ((), ("--min-area", 0.1, "--jitter", 1, "--grey", 1))
    )
    assert one == other
    assert last_loss(shop, "pretrain", *flags, name="image_loss") != last_loss(
        shop, "pretrain", *flags, "--min-area", 0.1, "--jitter", 1, "--grey", 1, name="image_loss"
    )


def test_held_out_losses_are_means_over_the_images_and_their_first_captions(shop):
    flags = (*STILL, "--iters", 1, "--steps-per-eval", 1)
    for name in ("validation_image_loss", "validation_text_loss"):
        one, parts, more = (
            last_loss(shop, "pretrain", *flags, "--validation", shop.data[captions], "--batch-size", size, name=name)
            for captions, size in ((1, 7), (1, 3), (3, 7))
        )
        assert parts == pytest.approx(one, rel=1e-4)
        assert more == one


def test_views_of_the_whole_image_change_nothing_however_many_there_are(shop):
    """1,400 views are more than are computed at a time; that they all are one image, training does not notice."""
    flags = ("--min-area", 1, "--no-flip")
    went = moved(shop.weights("lit", *flags), shop.weights("lit", *flags, "--views", 200))
    assert max(went.values()) < 1e-4


def test_a_patch_that_is_predicted_is_drawn_with_its_own_mean(tmp_path):
    """Of a decoder that says nothing of a patch but zeros, the mean is all that is seen."""
    shop = CaptionWorkshop(tmp_path)
    first = shop.run("pretrain")
    tensors, about = mx.load(str(first / "decoder.safetensors"), return_metadata=True)
    silent = {name: x * 0 if "patch_head." in name else x for name, x in tensors.items()}
    mx.save_safetensors(str(first / "decoder.safetensors"), silent, metadata=about)
    output = shop.run("pretrain", *STILL, "--start", first, "--iters", 1, "--samples-every", 1)
    with Image.open(state_of(output).with_name("patches-000001.png")) as image:
        levels = np.asarray(image, np.float64) / 255
    values = (levels - CLIP_MEAN) / CLIP_STD
    own, shown = (
        side.reshape(4, 3, 5, 3, 5, 3).transpose(0, 1, 3, 2, 4, 5).reshape(4, 9, 75)
        for side in np.split(values, 2, axis=1)
    )
    is_prefix = np.abs(shown - own).max(axis=2) == 0
    assert is_prefix[:, 0].all() and not is_prefix.all()
    wanted = np.broadcast_to(own.mean(axis=2, keepdims=True), own.shape)
    np.testing.assert_allclose(shown[~is_prefix], wanted[~is_prefix], atol=0.03)


def test_losses_are_logged_beside_the_result(shop):
    entries = shop.log("pretrain", "--validation", shop.data[1], "--steps-per-eval", 2)
    assert [entry["step"] for entry in entries if "validation_text_loss" in entry] == [2, 4]
