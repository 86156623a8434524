"""What training is promised to do, as tables of facts over tasks and types: they hold however it is built inside.

Everything goes through `fit`, `predict`, `evaluate` and the files that they write. No expectation is a learned number:
what is told is that results differ, are the same to the bit, or stand in a relation.
"""

import json
import math
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.cli import main
from mlx_aimv2.learn import evaluate, fit, predict
from mlx_aimv2.learn.head_folder import load_head
from tests.small_training import (
    ENCODER,
    TINY,
    Workshop,
    arrays,
    files_of_at_most,
    length_of_moments,
    moved,
    result,
    stopping_at,
    weights,
    write_encoder,
    write_labels,
)

SHORT = {"iters": 2, "batch_size": 4, "steps_per_eval": 2, "patience": 0, "learning_rate": 1e-4}
"""Two steps that change no score: of equal states the last is kept, so that what they change is seen."""

STILL = {"learning_rate": TINY, "augment": False, "weight_decay": 0.0}
"""An encoder's training that changes nothing: the losses are those of the start."""

SOLVED = [("classify", "linear"), ("classify", "knn")]
HEADS = [("classify", "attentive"), ("segment", "linear"), ("segment", "decoder"), ("detect", "decoder")]
TUNED = [
    ("classify", "lora"),
    ("classify", "dora"),
    ("classify", "full"),
    ("segment", "lora"),
    ("segment", "full"),
    ("detect", "lora"),
    ("detect", "full"),
]
LOOPED = HEADS + TUNED
BY_ADAPTERS_AND_IN_FULL = [("classify", "lora"), ("classify", "full"), ("segment", "lora"), ("detect", "lora")]


def table(rows, *, quick=(), slow=("dora",)):
    """Rows of task and type; of other tasks than classification the quick ones alone are quick, and no slow type is."""
    return [
        pytest.param(
            task, kind, id=f"{task}-{kind}",
            marks=[] if (task == "classify" and kind not in slow) or (task, kind) in quick else [pytest.mark.slow],
        )
        for task, kind in rows
    ]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("shop"))


def fitted(shop, task, kind, **settings):
    """A run that is not taken from those that were made before."""
    output = shop.new()
    keywords = {"task": task, "fine_tune_type": kind, "cache": shop.folder / "cache", **settings}
    fit(shop.data[task], shop.encoder, output, **keywords)
    return output


# Seeds


@pytest.mark.parametrize(("task", "kind"), table(SOLVED + LOOPED, quick=[("segment", "linear")]))
def test_the_same_seed_gives_the_same_bits(shop, task, kind):
    settings = {} if (task, kind) in SOLVED else SHORT
    assert result(fitted(shop, task, kind, seed=3, **settings)) == shop.bits(task, kind, seed=3, **settings)


@pytest.mark.parametrize(("task", "kind"), table(LOOPED, quick=[("segment", "linear")]))
def test_another_seed_gives_other_bits(shop, task, kind):
    """Of an encoder that is no better than before what was before is kept, so that its file may be the same."""
    assert shop.bits(task, kind, seed=3, **SHORT) != shop.bits(task, kind, seed=4, **SHORT)


# A run that is stopped


@pytest.mark.parametrize(("task", "kind"), table(LOOPED, quick=[("segment", "linear")]))
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(shop, task, kind):
    more = {"drop_path": 0.5, "mixup": 0.5} if (task, kind) in TUNED else {}
    settings = SHORT | {"iters": 5, "grad_accumulation_steps": 2, "batch_size": 2} | more
    output = shop.new()
    keywords = {"task": task, "fine_tune_type": kind, "cache": shop.folder / "cache", **settings}
    with pytest.raises(KeyboardInterrupt):
        fit(shop.data[task], shop.encoder, output, on_progress=stopping_at(3), **keywords)
    assert not output.exists()
    with pytest.raises(FileExistsError, match="--resume"):
        fit(shop.data[task], shop.encoder, output, **keywords)
    fit(shop.data[task], shop.encoder, output, resume=True, **keywords)
    assert result(output) == shop.bits(task, kind, **settings)
    assert not output.with_name(f"{output.name}.training").exists()


def test_the_best_state_outlives_an_interruption(shop):
    """At a rate at which scores rise and then fall: the best state is neither the start nor the last one."""
    settings = {"iters": 6, "batch_size": 4, "steps_per_eval": 1, "learning_rate": 1.0, "weight_decay": 0.0}
    assert 0 < shop.info("segment", "linear", **settings)["settings"]["step"] < 4
    output = shop.new()
    keywords = {"task": "segment", "fine_tune_type": "linear", "cache": shop.folder / "cache", **settings}
    with pytest.raises(KeyboardInterrupt):
        fit(shop.data["segment"], shop.encoder, output, on_progress=stopping_at(5), **keywords)
    fit(shop.data["segment"], shop.encoder, output, resume=True, **keywords)
    assert result(output) == shop.bits("segment", "linear", **settings)


def begun(shop, **settings):
    """The output and the keywords of a run by LoRA that was stopped in its first step, its start saved."""
    output = shop.new()
    keywords = {"task": "classify", "fine_tune_type": "lora", "cache": shop.folder / "cache", **SHORT, **settings}
    with pytest.raises(KeyboardInterrupt):
        fit(shop.data["classify"], shop.encoder, output, on_progress=stopping_at(1), **keywords)
    return output, keywords


def test_a_run_is_resumed_with_its_own_settings_alone(shop):
    output, keywords = begun(shop)
    for other in ({"iters": 7}, {"batch_size": 3}, {"fine_tune_type": "full"}, {"seed": 1}):
        with pytest.raises(ValueError, match=next(iter(other)).replace("_", ".")):
            fit(shop.data["classify"], shop.encoder, output, resume=True, **keywords | other)


def test_a_run_is_resumed_with_its_own_encoder_alone(shop, tmp_path):
    output, keywords = begun(shop)
    with pytest.raises(ValueError, match="started with encoder "):
        fit(shop.data["classify"], write_encoder(tmp_path / "other", seed=4), output, resume=True, **keywords)
    moved = shutil.copytree(shop.encoder, tmp_path / "moved")
    preprocessing = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(preprocessing | {"image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match="started with preprocessing "):
        fit(shop.data["classify"], moved, output, resume=True, **keywords)


def darker(folder, part):
    """Another image in the place of the first one of a part."""
    file = next(iter(sorted((folder / part).rglob("*0.png"))))
    Image.open(file).point(lambda level: level // 2).save(file)


def renamed(folder, part):
    """A class that is called otherwise, of the same images in the same order."""
    (folder / "dark").rename(folder / "dim")


def remasked(folder, part):
    for file in (folder / part / "masks").iterdir():
        Image.open(file).rotate(90).save(file)


def reboxed(folder, part):
    file = folder / part / "_annotations.coco.json"
    file.write_text(re.sub(r'"bbox": \[\d+', '"bbox": [1', file.read_text()))


@pytest.mark.parametrize(
    ("task", "change", "part", "words"),
    [
        ("classify", darker, "", "train-images|val-images|test-images"),
        ("classify", renamed, "", "train-labels|val-labels|test-labels"),
        *(
            pytest.param(task, change, part, f"{part}-{what} ", marks=pytest.mark.slow if part != "val" else ())
            for part in ("train", "val", "test")
            for task, change, what in (
                ("segment", darker, "images"),
                ("segment", remasked, "labels"),
                ("detect", darker, "images"),
                ("detect", reboxed, "labels"),
            )
        ),
    ],
)
def test_a_run_is_resumed_with_its_own_images_and_labels_alone(shop, tmp_path, task, change, part, words):
    """Wherever they lie: a copy of them is the same data."""
    data, output = shutil.copytree(shop.data[task], tmp_path / "data"), tmp_path / "head"
    keywords = {"fine_tune_type": "lora", "cache": shop.folder / "cache", **SHORT}
    with pytest.raises(KeyboardInterrupt):
        fit(shop.data[task], shop.encoder, output, on_progress=stopping_at(1), **keywords)
    change(data, part)
    with pytest.raises(ValueError, match=f"started with .*({words})"):
        fit(data, shop.encoder, output, resume=True, **keywords)
    shutil.rmtree(data)
    shutil.copytree(shop.data[task], data)
    fit(data, shop.encoder, output, resume=True, **keywords)
    assert result(output) == shop.bits(task, "lora", **SHORT)


def test_a_state_that_is_damaged_is_one_line(shop):
    output, keywords = begun(shop)
    training = output.with_name(f"{output.name}.training")
    for file in training.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        fit(shop.data["classify"], shop.encoder, output, resume=True, **keywords)


def test_a_state_that_cannot_be_written_is_one_line_and_the_one_before_is_kept(shop):
    output, keywords = begun(shop, iters=3, steps_per_eval=1)
    with files_of_at_most(10_000), pytest.raises(OSError, match=r"state.* cannot be written .* --resume"):
        fit(shop.data["classify"], shop.encoder, output, resume=True, **keywords)
    assert [file.name for file in output.with_name(f"{output.name}.training").iterdir()] == ["state.safetensors"]
    fit(shop.data["classify"], shop.encoder, output, resume=True, **keywords)
    assert result(output) == shop.bits("classify", "lora", **SHORT | {"iters": 3, "steps_per_eval": 1})


@pytest.mark.parametrize(("task", "kind"), table(LOOPED, quick=[("segment", "linear")], slow=("dora", "full")))
def test_a_loss_that_is_no_number_stops_and_can_be_gone_on_from_with_less(shop, task, kind):
    """A state after every step: the last one whose weights have given a number is kept, here that of the start."""
    output = shop.new()
    settings = {"batch_size": 4, "iters": 3, "steps_per_eval": 1, "patience": 0}
    keywords = {"task": task, "fine_tune_type": kind, "cache": shop.folder / "cache", **settings}
    with pytest.raises(ValueError, match=r"not a number|the loss is (nan|inf) at step .*--resume.*--learning-rate"):
        fit(shop.data[task], shop.encoder, output, learning_rate=1e30, **keywords)
    state = arrays(output.with_name(f"{output.name}.training") / "state.safetensors")
    assert all(np.isfinite(array).all() for array in state.values())
    fit(shop.data[task], shop.encoder, output, resume=True, learning_rate=1e-4, **keywords)
    assert result(output) == shop.bits(task, kind, **settings, learning_rate=1e-4)


# What options do

CHANGES = {
    "attentive": {
        "batch_size": 3,
        "iters": 3,
        "learning_rate": 2e-4,
        "weight_decay": 0.5,
        "grad_accumulation_steps": 2,
        "image_size": 28,
    },
    "lora": {
        "batch_size": 3,
        "iters": 3,
        "learning_rate": 2e-4,
        "weight_decay": 0.5,
        "num_layers": 1,
        "grad_accumulation_steps": 2,
        "drop_path": 0.9,
        "mask_ratio": 0.5,
        "mixup": 1.0,
        "augment": False,
        "flip": True,
        "lora_rank": 3,
        "lora_scale": 7.0,
        "lora_dropout": 0.5,
        "image_size": 28,
    },
    "full": {"layer_decay": 0.3, "drop_path": 0.9, "num_layers": 1, "weight_decay": 0.5},
}


@pytest.mark.parametrize(
    ("kind", "option"), [pytest.param(kind, name, id=f"{kind}-{name}") for kind in CHANGES for name in CHANGES[kind]]
)
def test_an_option_changes_what_is_learned(shop, kind, option):
    plain = shop.bits("classify", kind, **SHORT)
    changed = shop.bits("classify", kind, **SHORT | {option: CHANGES[kind][option]})
    assert any(plain[file] != changed[file] for file in plain)


def test_the_commands_flags_are_the_options(shop, capsys):
    words = ["--fine-tune-type", "lora", "--iters", 2, "--batch-size", 4, "--learning-rate", 1e-4, "--no-augment"]
    words += ["--lora-rank", 3, "--lora-scale", 7, "--lora-dropout", 0.5, "--mixup", 0.4, "--drop-path", 0.3]
    words += ["--steps-per-eval", 2, "--patience", 0, "--num-layers", 1, "--cache", shop.folder / "cache"]
    output = shop.new()
    command = ["fit", shop.data["classify"], "-m", shop.encoder, "-o", output, *words, "--json"]
    assert main([str(word) for word in command]) == 0
    settings = {"augment": False, "lora_rank": 3, "lora_scale": 7.0, "lora_dropout": 0.5, "num_layers": 1}
    same = shop.head("classify", "lora", mixup=0.4, drop_path=0.3, **settings, **SHORT)
    assert result(output) == result(same)
    said = json.loads(capsys.readouterr().out)
    assert said["head"] == str(output)
    assert said["metrics"] == json.loads((same / "head.json").read_text())["metrics"]


def test_epochs_stand_for_as_many_steps_as_the_images_fill(shop):
    settings = {name: value for name, value in SHORT.items() if name != "iters"}
    assert shop.bits("classify", "lora", epochs=2, **settings) == shop.bits("classify", "lora", **SHORT | {"iters": 6})


def test_epochs_count_whole_batches_where_they_are_accumulated(shop):
    settings = SHORT | {"grad_accumulation_steps": 3, "batch_size": 2}
    del settings["iters"]
    history = shop.info("classify", "lora", epochs=2, **settings)["history"]
    assert history[-1]["step"] == 2 * 12 // (2 * 3)


def test_what_full_takes_by_default_may_be_said(shop):
    defaults = {"drop_path": 0.1, "layer_decay": 0.75, "weight_decay": 0.05}
    assert shop.bits("classify", "full", **SHORT) == shop.bits("classify", "full", **SHORT, **defaults)


@pytest.mark.parametrize(
    ("task", "kind"), table([("classify", "lora"), ("classify", "full"), ("detect", "lora")], slow=["full"])
)
def test_blocks_that_are_computed_again_change_nothing_but_rounding(shop, task, kind):
    settings = SHORT | {"learning_rate": TINY}
    plain, again = (shop.losses(task, kind, grad_checkpoint=on, **settings_without(settings)) for on in (False, True))
    np.testing.assert_allclose(again, plain, rtol=1e-5)


def settings_without(settings, *names):
    """SHORT without what `Workshop.losses` sets by itself."""
    return {name: value for name, value in settings.items() if name not in ("steps_per_eval", "patience", *names)}


@pytest.mark.parametrize("flag", [{"grad_checkpoint": True}, {"batch_size": 2, "grad_accumulation_steps": 3}], ids=str)
def test_what_is_to_save_memory_saves_memory(shop, flag):
    """By what MLX holds at most in one step at 196 patches an image."""

    def most(**settings):
        keywords = {"fine_tune_type": "full", "image_size": 196, "iters": 1, "augment": False, "batch_size": 6}
        mx.clear_cache()
        mx.reset_peak_memory()
        fit(shop.data["classify"], shop.encoder, shop.new(), cache=shop.folder / "cache", **keywords | settings)
        return mx.get_peak_memory()

    assert most(**flag) < 0.9 * most()


def test_what_is_accumulated_is_the_mean_over_its_parts(shop):
    settings = settings_without(SHORT | STILL)
    whole = shop.losses("classify", "lora", **settings)
    parts = shop.losses("classify", "lora", **settings | {"batch_size": 2, "grad_accumulation_steps": 2})
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    one, two = (
        length_of_moments(stopped(shop, "lora", lora_scale=0.1, augment=False, **flags))
        for flags in ({"batch_size": 4}, {"batch_size": 2, "grad_accumulation_steps": 2})
    )
    assert two == pytest.approx(one, rel=1e-4)


def stopped(shop, kind, *, task="classify", encoder=None, after=1, **settings):
    """The state file of a run that was stopped after so many of its three steps."""
    output = shop.new()
    with pytest.raises(KeyboardInterrupt):
        fit(
            shop.data[task], encoder or shop.encoder, output, on_progress=stopping_at(after + 1), task=task,
            fine_tune_type=kind, cache=shop.folder / "cache", iters=3, steps_per_eval=1, **settings,
        )  # fmt: skip
    return output.with_name(f"{output.name}.training") / "state.safetensors"


def test_gradients_are_cut_to_one_length(shop):
    """To 3, of which the first moments are a tenth after a step."""
    for scale in (1e4, 1e5):
        state = stopped(shop, "lora", lora_scale=scale, batch_size=4, augment=False)
        assert length_of_moments(state) == pytest.approx(0.1 * 3, rel=1e-3)


def test_the_rate_falls_towards_the_end(shop):
    rate, steps = 1e-5, 20
    settings = STILL | {"learning_rate": rate, "iters": steps, "batch_size": 12, "steps_per_eval": steps}
    adapters = arrays(shop.head("classify", "lora", patience=0, **settings) / "adapters.safetensors")
    farthest = max(np.abs(array).max() for name, array in adapters.items() if name.endswith("lora_b"))
    assert 0.3 * rate * steps < farthest < 0.75 * rate * steps


def test_the_first_step_goes_as_far_as_the_rate_says(shop):
    """Of a run that is over before an epoch is, too: the rate rises in no more than a fifth of the steps."""
    settings = STILL | {"learning_rate": 1e-5, "iters": 1, "batch_size": 4, "steps_per_eval": 1}
    adapters = arrays(shop.head("classify", "lora", patience=0, **settings) / "adapters.safetensors")
    farthest = max(np.abs(array).max() for name, array in adapters.items() if name.endswith("lora_b"))
    assert farthest == pytest.approx(1e-5, rel=1e-3)


def test_matrices_alone_are_decayed(shop):
    settings = SHORT | {"iters": 1}
    one, other = (
        arrays(shop.head("classify", "full", weight_decay=decay, **settings) / "encoder.safetensors")
        for decay in (0.0, 9.0)
    )
    went = moved(one, other)
    assert all((went[name] > 0) == (array.ndim > 1) for name, array in one.items())


@pytest.mark.parametrize(("task", "kind"), table(BY_ADAPTERS_AND_IN_FULL, slow=["full"]))
def test_the_state_with_the_best_score_is_the_one_that_is_written(shop, task, kind):
    """At a rate that ruins everything that is the start."""
    settings = SHORT | {"learning_rate": 30.0, "weight_decay": 0.0, "iters": 2, "steps_per_eval": 1}
    info = shop.info(task, kind, **settings)
    metric = {"classify": "top1", "segment": "miou", "detect": "ap"}[task]
    best = max(entry["score"] for entry in info["history"])
    assert info["metrics"]["val"][metric] == pytest.approx(best)
    assert info["settings"]["step"] in [entry["step"] for entry in info["history"] if entry["score"] == best]
    if task == "classify":
        assert info["history"][-1]["score"] < best
        start = arrays(shop.head(task, kind, **SHORT | STILL) / "head.safetensors")
        assert max(moved(start, arrays(shop.head(task, kind, **settings) / "head.safetensors")).values()) < 1e-9


def test_a_run_is_evaluated_some_twenty_times_where_nobody_says_how_often(shop):
    settings = {"iters": 21, "batch_size": 1, "learning_rate": TINY}
    history = shop.info("segment", "linear", **settings)["history"]
    assert [entry["step"] for entry in history] == [*range(0, 21, 2), 21]


RUINOUS = {"learning_rate": 30.0, "weight_decay": 0.0, "batch_size": 2, "steps_per_eval": 1}
"""At such a rate the loss on val rises from the end of the warm-up on; no score is better than that of the start."""


def test_patience_ends_a_run_that_gets_no_better(shop):
    ends = [
        shop.info("classify", "lora", patience=patience, iters=12, **RUINOUS)["history"][-1]["step"]
        for patience in (0, 2, 4)
    ]
    assert ends[0] == 12 and ends[2] - ends[1] == 2 < ends[1]


def test_a_run_whose_loss_stays_the_same_goes_on(shop):
    settings = settings_without(SHORT | STILL | {"iters": 9}) | {"steps_per_eval": 1}
    assert shop.info("classify", "lora", patience=2, **settings)["history"][-1]["step"] == 9


def test_heads_alone_are_trained_to_the_end_where_an_encoder_stops_by_itself(shop):
    ends = [shop.info("classify", kind, iters=16, **RUINOUS)["history"][-1]["step"] for kind in ("attentive", "lora")]
    assert ends[0] == 16 > ends[1] > 8


# Order and examples


@pytest.mark.parametrize(
    ("task", "kind"), table([("classify", "attentive"), ("classify", "lora"), ("segment", "decoder")], slow=["lora"])
)
def test_every_epoch_takes_each_image_once_in_another_order(shop, task, kind):
    still = {"learning_rate": TINY, "weight_decay": 0.0} if (task, kind) in HEADS else STILL
    losses = shop.losses(task, kind, epochs=2, batch_size=1, **still)
    epochs = np.array(losses).reshape(2, -1)
    np.testing.assert_allclose(np.sort(epochs[1]), np.sort(epochs[0]), rtol=1e-6)
    assert not np.allclose(epochs[1], epochs[0], rtol=1e-6)


@pytest.mark.parametrize(("task", "kind"), table(BY_ADAPTERS_AND_IN_FULL, slow=["full"]))
def test_images_that_are_mixed_take_their_share_of_the_targets_with_them(shop, task, kind):
    """By Beta(0, 0) all of an image is itself or another one: the batch as a whole stays what it was."""
    settings = settings_without(SHORT | STILL | {"iters": 5, "batch_size": 6})
    more = {"drop_path": 0.0} if kind == "full" else {}
    plain = shop.losses(task, kind, **settings, **more)
    swapped = shop.losses(task, kind, mixup=1e-6, **settings, **more)
    np.testing.assert_allclose(swapped, plain, rtol=1e-4)
    assert not np.allclose(shop.losses(task, kind, mixup=1.0, **settings, **more), plain, rtol=1e-3)


def test_every_step_mixes_its_images_in_a_way_of_its_own(shop, tmp_path):
    """Of two images, which all batches hold, it is the share alone that decides the loss."""
    data = write_labels(tmp_path / "labels", per_class=2)
    shutil.rmtree(data / "grey")
    keywords = {"fine_tune_type": "lora", "iters": 6, "batch_size": 2, "steps_per_eval": 1, "patience": 0, **STILL}
    fit(data, shop.encoder, tmp_path / "head", mixup=1.0, **keywords)
    history = json.loads((tmp_path / "head" / "head.json").read_text())["history"]
    assert len({round(entry["loss"], 4) for entry in history[1:]}) > 2


def test_the_mask_hides_its_share_of_the_patches(shop):
    settings = settings_without(SHORT | STILL | {"iters": 5})
    plain = np.array(shop.losses("classify", "lora", **settings))
    few, many = (
        np.abs(np.array(shop.losses("classify", "lora", mask_ratio=hidden / 9, **settings)) - plain).mean()
        for hidden in (1, 8)
    )
    assert 0 < few < many / 2


def test_what_is_held_out_is_seen_as_it_is(shop):
    """Scores while nothing is learned are those of the images themselves, whatever is done to training images."""
    settings = settings_without(SHORT | STILL, "augment") | {"iters": 3}
    info = shop.info("classify", "lora", flip=True, mixup=1.0, steps_per_eval=1, patience=0, **settings)
    assert len({entry["score"] for entry in info["history"]}) == 1
    head = shop.head("classify", "lora", flip=True, mixup=1.0, steps_per_eval=1, patience=0, **settings)
    plain = shop.head("classify", "lora", augment=False, steps_per_eval=1, patience=0, **settings)
    images = sorted(map(str, shop.data["classify"].rglob("*.png")))
    for (path, one), (other, two) in zip(predict(head, images), predict(plain, images), strict=True):
        assert path == other
        np.testing.assert_allclose(one.probabilities, two.probabilities, atol=1e-6)
    assert info["metrics"]["val"]["top1"] == info["history"][-1]["score"]


@pytest.mark.parametrize("kind", ["attentive", "lora"])
def test_the_best_step_is_chosen_on_val(shop, tmp_path, kind):
    """Where labels are mixed up in `val`, what is good for training and for `test` is bad there."""
    data = tmp_path / "parts"
    for part in ("train", "val", "test"):
        write_labels(data / part, per_class=4, seed={"train": 1, "val": 2, "test": 3}[part])
    (data / "val" / "dark").rename(data / "val" / "aside")
    (data / "val" / "grey").rename(data / "val" / "dark")
    (data / "val" / "light").rename(data / "val" / "grey")
    (data / "val" / "aside").rename(data / "val" / "light")
    settings = SHORT | {"iters": 10, "learning_rate": 1e-2 if kind == "attentive" else 1e-4}
    fit(data, shop.encoder, tmp_path / "head", fine_tune_type=kind, cache=tmp_path / "cache", **settings)
    info = json.loads((tmp_path / "head" / "head.json").read_text())
    assert info["metrics"]["val"]["top1"] == max(entry["score"] for entry in info["history"])
    assert info["history"][-1]["score"] < 0.5


def test_scores_are_those_of_the_images_as_they_are(shop, tmp_path):
    """`fit` scores its held-out images as `predict` sees them."""
    head = shop.head("classify", "lora", **SHORT | STILL)
    info = json.loads((head / "head.json").read_text())
    found = {path: info["classes"][int(p.probabilities.argmax())] for path, p in predict(head, images_of(shop))}
    own = load_head(head)
    logits = np.array(own.learner(own.processor(images_of(shop)))["logits"], np.float64)
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    predicted = np.log([p.probabilities for _, p in predict(head, images_of(shop))])
    assert np.abs(predicted - exact).max() < 1e-3 * np.abs(exact).max()
    accuracy = np.mean([Path(path).parent.name == label for path, label in found.items()])
    assert evaluate(head, shop.data["classify"]).scores["top1"] == pytest.approx(accuracy)


def images_of(shop):
    return sorted(map(str, shop.data["classify"].rglob("*.png")))


@pytest.mark.parametrize(("kind", "of_zeros"), [("attentive", 1), ("lora", 0), ("full", 0)])
def test_training_begins_with_the_linear_probe_and_the_right_labels(shop, kind, of_zeros):
    """A head of zeros has a loss of log 3 for three classes, as many as there are among the candidates each."""
    settings = {"learning_rate": TINY, "weight_decay": 0.0} if kind == "attentive" else STILL | {"drop_path": 0.0}
    (loss,) = shop.losses("classify", kind, iters=1, batch_size=12, **settings)
    assert loss < (of_zeros + 0.5) * math.log(3)


# What is trained and what is frozen


def test_the_last_blocks_are_those_that_are_trained(shop):
    before = weights(shop.encoder)
    after = before | arrays(shop.head("classify", "full", **SHORT | {"num_layers": 1}) / "encoder.safetensors")
    went = moved(before, after)
    assert all(far == 0 for name, far in went.items() if name.startswith(("blocks.0.", "p")))
    assert all(far > 0 for name, far in went.items() if name.startswith("blocks.1.") and name.endswith("weight"))
    adapters = arrays(shop.head("classify", "lora", **SHORT | {"num_layers": 1}) / "adapters.safetensors")
    assert {name.split(".")[1] for name in adapters} == {"1"}


def test_in_full_everything_is_trained(shop):
    before = weights(shop.encoder)
    after = arrays(shop.head("classify", "full", **SHORT) / "encoder.safetensors")
    assert before.keys() == after.keys()
    assert all(far > 0 for far in moved(before, after).values())


def test_the_encoders_own_pooling_head_stays_as_it_is(shop, tmp_path):
    """No task asks it, so that no gradient comes to it, and it is not decayed either."""
    encoder = write_encoder(tmp_path / "encoder", replace(ENCODER, use_head=True))
    keywords = {"fine_tune_type": "full", "cache": tmp_path / "cache", **SHORT, "weight_decay": 9.0}
    fit(shop.data["classify"], encoder, tmp_path / "head", **keywords)
    before, after = weights(encoder), arrays(tmp_path / "head" / "encoder.safetensors")
    assert any(name.startswith("head.") for name in before)
    assert all((array == before[name]).all() == name.startswith("head.") for name, array in after.items())


def test_layers_learn_the_slower_the_nearer_to_the_pixels(shop):
    before = weights(shop.encoder)
    settings = SHORT | {"weight_decay": 0.0, "iters": 1}
    even, decayed = (
        moved(before, arrays(shop.head("classify", "full", layer_decay=decay, **settings) / "encoder.safetensors"))
        for decay in (1.0, 0.5)
    )
    names = ["patch_embed.proj.weight", *(f"blocks.{i}.mlp.down.weight" for i in range(2)), "norm.weight"]
    shares = [decayed[name] / even[name] for name in names]
    assert shares == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1], rel=0.02)


def test_adapters_are_as_wide_as_asked(shop):
    adapters = arrays(shop.head("classify", "lora", **SHORT | {"lora_rank": 3}) / "adapters.safetensors")
    assert {array.shape[1] for name, array in adapters.items() if name.endswith("lora_a")} == {3}
    assert {array.shape[0] for name, array in adapters.items() if name.endswith("lora_b")} == {3}


def test_adapters_count_by_their_scale(shop, tmp_path):
    head = shop.head("classify", "lora", **SHORT | {"lora_scale": 7.0})
    copy = shutil.copytree(head, tmp_path / "copy")
    config = json.loads((head / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 7
    found = {}
    for scale in (0, 7, 14):
        config["lora_parameters"]["scale"] = scale
        (copy / "adapter_config.json").write_text(json.dumps(config))
        found[scale] = np.stack([one.probabilities for _, one in predict(copy, images_of(shop))])
    assert (found[7] == np.stack([one.probabilities for _, one in predict(head, images_of(shop))])).all()
    assert 0 < np.abs(found[7] - found[0]).max() < np.abs(found[14] - found[0]).max()


def test_training_goes_on_from_adapters(shop):
    before = shop.head("classify", "lora", **SHORT | {"lora_rank": 3})
    on = fitted(shop, "classify", "lora", adapter_path=str(before), **SHORT | STILL)
    assert (on / "adapters.safetensors").read_bytes() == (before / "adapters.safetensors").read_bytes()


def test_training_goes_on_with_the_dropout_of_its_adapters(shop, tmp_path):
    before = shop.head("classify", "lora", **SHORT | {"lora_dropout": 0.5})
    copy = shutil.copytree(before, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["lora_parameters"]["dropout"] = 0.0
    (copy / "adapter_config.json").write_text(json.dumps(config))
    one, other = (fitted(shop, "classify", "lora", adapter_path=str(folder), **SHORT) for folder in (before, copy))
    assert result(one) != result(other)


# Candidates


def test_of_several_rates_the_best_is_kept_as_if_it_had_been_the_only_one(shop):
    settings = {"iters": 12, "batch_size": 7, "steps_per_eval": 12}
    low, high = (
        shop.info("segment", "linear", learning_rate=rate, **settings)["metrics"]["val"]["miou"]
        for rate in (1e-3, 3e-3)
    )
    info = shop.info("segment", "linear", **settings)
    assert low < high, "in a few steps the higher rate gets farther"
    assert info["settings"]["learning_rate"] == 3e-3
    assert info["metrics"]["val"]["miou"] == pytest.approx(high, abs=0.01)
    assert info["metrics"]["val"]["miou"] == pytest.approx(max(entry["score"] for entry in info["history"]))
    one = arrays(shop.head("segment", "linear", **settings) / "head.safetensors")
    two = arrays(shop.head("segment", "linear", learning_rate=3e-3, **settings) / "head.safetensors")
    assert max(moved(one, two).values()) < 1e-4


def candidates(state, name):
    """A tensor of each candidate in a state file, by the candidate's number."""
    found = (
        (re.search(rf"^model\.\w+\.(\d+)\.{re.escape(name)}$", key), array) for key, array in arrays(state).items()
    )
    return {int(match[1]): array for match, array in found if match}


def test_each_candidate_learns_at_its_own_rate_and_the_one_that_starts_as_the_probe_at_the_lowest(shop):
    """The first step of AdamW goes as far as the rate."""
    before, after = (
        candidates(stopped(shop, "attentive", after=steps, batch_size=12, weight_decay=0.0), "linear.weight")
        for steps in (0, 1)
    )
    went = [np.abs(after[number] - before[number]).max() for number in sorted(before)]
    assert went == pytest.approx([1e-3, 3e-3, 1e-2, 1e-3], rel=1e-2)


def test_candidates_of_one_rate_are_decayed_each_as_it_should_be(shop):
    """Of the paper's fourteen the last two, which differ by a decay of 0.05."""
    before, after = (
        candidates(stopped(shop, "attentive", after=steps, batch_size=12, recipe="paper", augment=False), "k.weight")
        for steps in (0, 1)
    )
    assert len(after) == 14
    np.testing.assert_array_equal(before[13], before[12])
    apart, wanted = after[12] - after[13], 2e-3 * 0.05 * before[13]
    assert np.abs(apart - wanted).max() < 0.05 * np.abs(wanted).max()


def test_gradients_of_a_candidate_are_cut_as_if_it_were_the_only_one(shop, tmp_path):
    """Of an encoder whose features are so large that the gradients must be cut."""
    encoder = shutil.copytree(shop.encoder, tmp_path / "encoder")
    tensors = mx.load(str(encoder / "model.safetensors"))
    (name,) = (name for name in tensors if name.endswith("trunk.post_trunk_norm.weight"))
    tensors[name] = 1000 * tensors[name]
    mx.save_safetensors(str(encoder / "model.safetensors"), tensors, metadata={"format": "pt"})
    one, two = (
        length_of_moments(stopped(shop, "linear", task="segment", encoder=encoder, batch_size=7, **rate))
        for rate in ({"learning_rate": 1e-3}, {})
    )
    assert two == pytest.approx(2**0.5 * one, rel=1e-3)


# Heads that are written


@pytest.fixture
def detector(shop, tmp_path):
    """A detector, and a copy whose centre-ness a test may change."""
    head = shop.head("detect", "decoder", **SHORT)
    return head, Path(shutil.copytree(head, tmp_path / "copy"))


def test_a_box_far_from_its_centre_scores_less(shop, detector):
    head, copy = detector
    images = sorted(map(str, (shop.data["detect"] / "test").glob("*.png")))
    scores = []
    for bias in (20.0, 1.0):
        tensors = mx.load(str(head / "head.safetensors"))
        for name, value in (("centre.bias", bias), ("classes.bias", 3.0)):
            tensors[name] = mx.full(tensors[name].shape, value)
        mx.save_safetensors(str(copy / "head.safetensors"), tensors)
        scores.append([found.scores.max() for _, found in predict(copy, images)])
    near, far = np.array(scores)
    assert (far < 0.95 * near).all()


def test_a_head_computes_in_the_dtype_that_it_was_trained_in(shop):
    head = shop.head("classify", "linear", dtype="bfloat16")
    images = images_of(shop)
    own, half, full = (
        np.stack([found.probabilities for _, found in predict(head, images, **settings)])
        for settings in ({}, {"dtype": "bfloat16"}, {"dtype": "float32"})
    )
    assert (own == half).all()
    assert (own != full).any()


@pytest.mark.parametrize("task", ["classify", pytest.param("segment", marks=pytest.mark.slow), "detect"])
def test_evaluate_draws_the_cards_images_where_it_is_told(shop, task, tmp_path, capsys):
    kind = "linear" if task == "classify" else "decoder"
    head = shop.head(task, kind, **{} if task == "classify" else SHORT)
    capsys.readouterr()
    assert main(["evaluate", str(head), str(shop.data[task]), "--card", str(tmp_path / "card"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] >= 3
    drawn = sorted((tmp_path / "card").iterdir())
    assert drawn
    for file in drawn:
        with Image.open(file) as image:
            assert min(image.size) > 20
    assert main(["evaluate", str(head), str(shop.data[task]), "--json"]) == 0
    assert sorted((tmp_path / "card").iterdir()) == drawn


# Caches


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "own-cache"))


@pytest.mark.parametrize("changed", ["later", "at once"])
def test_a_file_that_changes_after_it_was_checked_is_checked_again(shop, own_cache, tmp_path, changed):
    """Of the same size: long after it was written, or within what a clock of files can tell apart."""
    data = write_labels(tmp_path / "labels")
    stamp = int((time.time() + (3600 if changed == "at once" else -3600)) * 1e9)
    for file in data.rglob("*.png"):
        os.utime(file, ns=(stamp, stamp))
    keywords = {"fine_tune_type": "knn", "cache": tmp_path / "features"}
    fit(data, shop.encoder, tmp_path / "one", **keywords)
    fit(data, shop.encoder, tmp_path / "same", **keywords)
    file = data / "grey" / "3.png"
    size = file.stat().st_size
    file.write_bytes(b"x" * size)
    stamp += 0 if changed == "at once" else int(60e9)
    os.utime(file, ns=(stamp, stamp))
    with pytest.raises(ValueError, match=r"3\.png"):
        fit(data, shop.encoder, tmp_path / "two", **keywords)


def test_an_image_that_changes_while_features_are_computed_is_named(shop, tmp_path):
    data = write_labels(tmp_path / "labels")
    file = data / "grey" / "3.png"

    def say(line):
        """The first lines are said once all files are checked."""
        Image.new("RGB", (47, 47), (1, 2, 3)).save(file)

    with pytest.raises(ValueError, match=r"grey/3\.png changed while it was read: run it again"):
        fit(data, shop.encoder, tmp_path / "head", task="classify", fine_tune_type="linear", say=say)
    assert not (tmp_path / "head").exists()


def other_preprocessing(encoder, folder):
    shutil.copytree(encoder, folder)
    file = folder / "preprocessor_config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"image_mean": [0.1, 0.6, 0.3]}))
    return folder


@pytest.mark.parametrize("kind", ["linear", pytest.param("attentive", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["preprocessing", "dtype", "weights", "size"])
def test_features_are_computed_again_for_whatever_decides_them(shop, tmp_path, what, kind):
    settings = {} if kind == "linear" else SHORT
    before = shop.new()
    fit(shop.data["classify"], shop.encoder, before, cache=tmp_path / "shared", fine_tune_type=kind, **settings)
    encoder, more = shop.encoder, {}
    if what == "preprocessing":
        encoder = other_preprocessing(shop.encoder, tmp_path / "other")
    elif what == "weights":
        encoder = write_encoder(tmp_path / "other", ENCODER, seed=4)
    else:
        more = {"dtype": {"dtype": "bfloat16"}, "size": {"image_size": 28}}[what]
    keywords = {"fine_tune_type": kind, **settings, **more}
    shared, alone = shop.new(), shop.new()
    fit(shop.data["classify"], encoder, shared, cache=tmp_path / "shared", **keywords)
    fit(shop.data["classify"], encoder, alone, cache=tmp_path / "fresh", **keywords)
    assert result(shared) == result(alone) != result(before)


def test_features_are_computed_once(shop, tmp_path):
    """A second head takes what lies in the cache: with zeros in it, it learns from zeros."""
    cache = tmp_path / "features"
    fit(shop.data["classify"], shop.encoder, tmp_path / "one", fine_tune_type="knn", cache=cache)
    rows = max((file for file in cache.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    rows.write_bytes(bytes(rows.stat().st_size))
    fit(shop.data["classify"], shop.encoder, tmp_path / "two", fine_tune_type="linear", cache=cache)
    assert not arrays(tmp_path / "two" / "head.safetensors")["mean"].any()


def test_features_that_were_cut_off_are_computed_and_the_others_are_not(shop, tmp_path):
    cache, counts = tmp_path / "features", []

    def on_progress(done, total, unit):
        if unit == "images":
            counts.append(done)

    keywords = {"fine_tune_type": "linear", "cache": cache}
    fit(shop.data["classify"], shop.encoder, tmp_path / "one", **keywords)
    rows = max((file for file in cache.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(rows, int(0.6 * rows.stat().st_size))  # as if killed while it was written
    fit(shop.data["classify"], shop.encoder, tmp_path / "two", on_progress=on_progress, **keywords)
    assert 0 < counts[0] < 18 == counts[-1]
    one, two = (arrays(tmp_path / name / "head.safetensors") for name in ("one", "two"))
    for name in ("mean", "std"):
        np.testing.assert_allclose(two[name], one[name], atol=1e-5)


def test_a_full_disk_is_one_line_and_leaves_no_head(shop, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    keywords = {"fine_tune_type": "linear", "cache": tmp_path / "features"}
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"no space left .*choose another --cache; finished work is kept"),
    ):
        patch.setattr(os, "fsync", full)
        fit(shop.data["classify"], shop.encoder, tmp_path / "head", **keywords)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"need .* bytes.*choose another --cache"):
        patch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
        fit(shop.data["classify"], shop.encoder, tmp_path / "head", **keywords | {"cache": tmp_path / "other"})
    assert not (tmp_path / "head").exists()
    fit(shop.data["classify"], shop.encoder, tmp_path / "head", **keywords)


def test_a_half_checkpoint_in_its_own_dtype_is_no_other_ones_features(shop, tmp_path):
    """Weights that both dtypes hold exactly have the same fingerprint in the cache's name but for the dtype."""
    exact = shutil.copytree(shop.encoder, tmp_path / "exact")
    tensors = mx.load(str(exact / "model.safetensors"))
    rounded = {name: array.astype(mx.bfloat16).astype(mx.float32) for name, array in tensors.items()}
    mx.save_safetensors(str(exact / "model.safetensors"), rounded, metadata={"format": "pt"})
    results = []
    for dtype, cache in (("float32", "shared"), ("bfloat16", "shared"), ("bfloat16", "fresh")):
        output = shop.new()
        fit(shop.data["classify"], exact, output, fine_tune_type="linear", dtype=dtype, cache=tmp_path / cache)
        results.append(result(output))
    assert results[0] != results[1] == results[2]
