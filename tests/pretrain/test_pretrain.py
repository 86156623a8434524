"""Runs of `pretrain`: they learn, go on elsewhere, share the work, and end in one line where they cannot go on."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import mlx_aimv2
from mlx_aimv2 import Aimv2VisionConfig, load
from mlx_aimv2.cli import main
from mlx_aimv2.pretrain import LitSettings, Settings, generate
from mlx_aimv2.train.loop import train
from tests.small_training import (
    DECODER,
    TINY,
    VISION,
    WORDS,
    CaptionWorkshop,
    files_of_at_most,
    moved,
    result,
    stopped_by,
    weights,
)

LAUNCH = Path(sys.executable).parent / "mlx.launch"


@pytest.fixture
def shop(tmp_path):
    return CaptionWorkshop(tmp_path)


def said(shop, capsys, *flags, verb="pretrain", output=None):
    """The line with which a command ends that makes nothing."""
    output = output or shop.new()
    capsys.readouterr()
    code = main([*shop.words(verb, *flags), "-o", str(output)])
    error = capsys.readouterr().err.splitlines()
    assert code == 2, error
    return error[-1]


@pytest.mark.slow
def test_seven_pairs_are_learned_by_heart(shop):
    flags = ("--batch-size", 7, "--iters", 250, "--learning-rate", 5e-3, "--min-area", 1, "--no-flip")
    assert shop.log("pretrain", *flags)[-1]["text_loss"] < 0.05


@pytest.mark.slow
def test_eight_pairs_learned_by_heart_are_completed_and_named(tmp_path):
    """From any prefix; of 255 levels a pixel is off by 2 on average, which the loss of 0.001 that is left allows."""
    shop = CaptionWorkshop(tmp_path, count=8)
    block = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"patch_size": 5, "image_size": 15, "is_native": False}
    shop.size.write_text(json.dumps(block | vision | {"decoder_config": block | {"max_position_embeddings": 11}}))
    flags = ("--batch-size", 8, "--iters", 400, "--learning-rate", 5e-3, "--min-area", 1, "--no-flip", "--alpha", 1)
    output = shop.run("pretrain", "--generative", *flags)
    files = [shop.data[1] / f"{i}.png" for i in range(8)]
    whole = generate(output, files)
    for prefix in (1, 4, 8):
        found = generate(output, files, prefix=prefix)
        assert found.captions == whole.captions == [f"{word} {i}" for i, word in enumerate(WORDS)]
        errors = np.abs(found.images.astype(float) - whole.images)
        assert 0 < errors.mean() < 4


def test_what_is_generated_begins_with_the_prefix_and_is_drawn_from_the_seed(shop):
    output, files = shop.run("pretrain", "--generative"), [shop.data[1] / f"{i}.png" for i in range(2)]
    whole = generate(output, files)
    found = generate(output, files, prefix=4)
    is_same = (found.images == whole.images).reshape(2, 3, 5, 3, 5, 3).all(axis=(2, 4, 5))
    assert is_same.reshape(2, 9)[:, :4].all() and not is_same.reshape(2, 9)[:, 4:].any()
    one, again, other = (generate(output, files, temperature=5.0, seed=seed).captions for seed in (1, 1, 2))
    assert one == again != other
    assert generate(output, files, seed=1).captions == generate(output, files, seed=2).captions


def test_what_cannot_be_generated_is_one_line(shop):
    paper, image = shop.run("pretrain"), shop.data[1] / "0.png"
    assert len(generate(paper, image).captions) == 1
    with pytest.raises(ValueError, match="without mean and contrast: train with --generative"):
        generate(paper, image, prefix=3)
    for prefix in (0, 10):
        with pytest.raises(ValueError, match=f"from 1 to the 9 patches of these images, got {prefix}"):
            generate(paper, image, prefix=prefix)
    (paper / "decoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no decoder\.safetensors"):
        generate(paper, image)


def test_a_run_from_an_encoder_without_decoder_says_so(shop, capsys):
    assert shop.run("pretrain", "--start", shop.encoder, "--size", small_size(shop)).is_dir()
    assert f"{shop.encoder} has no decoder.safetensors: the decoder starts at random" in capsys.readouterr().err


def small_size(shop):
    """The sizes of the workshop's encoder."""
    file = shop.folder / "like-encoder.json"
    own = VISION | {"hidden_size": 22, "intermediate_size": 13, "image_size": 15, "is_native": False}
    file.write_text(json.dumps(own | {"decoder_config": DECODER}))
    return file


def test_the_result_is_a_checkpoint_that_load_takes(shop, capsys):
    output = shop.run("pretrain")
    assert capsys.readouterr().out.strip() == str(output)
    model, processor = load(output)
    assert model.config.hidden_size == VISION["hidden_size"]
    assert processor(shop.data[1] / "0.png").shape == (1, 15, 15, 3)
    assert json.loads((output / "config.json").read_text())["model_type"] == "aimv2"


def test_a_finished_run_is_not_begun_again(shop, capsys):
    output = shop.run("pretrain")
    assert "already exists" in said(shop, capsys, output=output)
    output.rename(shop.folder / "elsewhere")
    assert "continue with --resume, or remove that folder" in said(shop, capsys, output=output)


def test_other_settings_on_resume_are_refused_by_name(shop, capsys):
    output = shop.run("pretrain")
    output.rename(shop.folder / "elsewhere")
    line = said(shop, capsys, "--alpha", 0.5, "--warm-up", 2, "--resume", output=output)
    assert "alpha 0.4, now 0.5" in line and "warm-up 1, now 2" in line


def test_resuming_what_never_began_is_an_error(shop, capsys):
    assert "leave --resume out" in said(shop, capsys, "--resume")


def test_half_precision_computes_in_it_and_keeps_the_weights(shop):
    half = weights(shop.run("pretrain", "--dtype", "bfloat16"))
    assert {array.dtype for array in half.values()} == {np.dtype(np.float32)}
    assert all(far > 0 for far in moved(half, shop.weights("pretrain")).values())
    assert any((np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)) != x).any() for x in half.values())


def test_a_loss_that_is_no_number_ends_the_run(shop, capsys):
    output = shop.new()
    line = said(shop, capsys, "--learning-rate", 1e30, "--iters", 9, output=output)
    assert "the loss is " in line and "--learning-rate" in line
    assert not output.exists()


def test_a_state_that_cannot_be_written_leaves_the_one_before(shop, capsys):
    output, flags = shop.new(), ("--iters", 5, "--save-every", 1)
    checked = ("--validation", shop.data[1], "--steps-per-eval", 3)
    words = [*shop.words("pretrain", *flags, *checked), "-o", str(output)]
    with stopped_by("step 3 "):
        assert main(words) != 0
    capsys.readouterr()
    with files_of_at_most(100_000):
        assert main([*words, "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written" in line and "--resume" in line
    assert main([*words, "--resume"]) == 0
    assert result(output) == shop.bits("pretrain", *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batch-size", 8), "7 images with captions, fewer than a batch of 8"),
        (("--image-size", 17), "17 pixels do not divide into patches of 5"),
        (("--size", "tiny"), "--size must be large, huge, 1B, 3B or a config.json, got tiny"),
        (("--patches", 9, 4), "--patches must be the fewest, 2 at least, and the most, got 9 4"),
        (("--start", "gone"), "gone"),
        (("--min-area", 0), "--min-area must be from 0.01 to 1"),
        (("--iters", 0), "--iters must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(shop, capsys, flags, words):
    output = shop.new()
    assert words in said(shop, capsys, *flags, output=output)
    assert not output.exists()


def test_a_native_encoder_of_odd_width_is_one_line(shop, capsys):
    shop.size.write_text(json.dumps(VISION | {"hidden_size": 22, "image_size": 15, "decoder_config": DECODER}))
    assert "a native model's hidden_size is a multiple of 4, got 22" in said(shop, capsys, "--native")


def test_validation_losses_and_samples_appear(shop):
    flags = ("--validation", shop.data[1], "--steps-per-eval", 3, "--samples-every", 3, "--iters", 6)
    entries = shop.log("pretrain", *flags)
    assert [entry["step"] for entry in entries if "validation_text_loss" in entry] == [3, 6]
    output = shop.run("pretrain", *flags)
    images = sorted(output.with_name(f"{output.name}.training").glob("patches-*.png"))
    assert [file.name for file in images] == ["patches-000003.png", "patches-000006.png"]
    with Image.open(images[0]) as image:
        assert image.size == (2 * 15, 4 * 15)


def test_samples_are_drawn_of_held_out_images_where_there_are_any(shop):
    held_out = shutil.copytree(shop.data[1], shop.folder / "held-out")
    for file in held_out.glob("*.png"):
        Image.new("RGB", (23, 23), (255, 255, 255)).save(file)
    output = shop.run("pretrain", "--validation", held_out, "--samples-every", 1, "--iters", 1)
    with Image.open(output.with_name(f"{output.name}.training") / "patches-000001.png") as drawn:
        assert np.asarray(drawn)[:, :15].min() == 255


def test_a_run_that_goes_on_elsewhere_keeps_its_words(shop):
    first = shop.run("pretrain", captions=3)
    second = shop.run("pretrain", "--start", first)
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_rate_and_warm_up_are_those_of_the_whole_step_and_run():
    vision = Aimv2VisionConfig(22, 13, 1, 2, image_size=15, patch_size=5)
    one, other = (
        Settings(vision=vision, iters=240, batch_size=size, grad_accumulation_steps=parts)
        for size, parts in ((12, 1), (4, 3))
    )
    assert one.rate == other.rate
    assert [settings.plan().warm_up for settings in (one, other)] == [2, 2]
    assert LitSettings(iters=90).plan().warm_up == 9


def test_a_schedule_of_zero_gradients_leaves_951_thousandths_of_a_matrix_and_all_of_a_norm():
    vision = Aimv2VisionConfig(1024, 13, 1, 2, image_size=15, patch_size=5)
    plan = Settings(vision=vision, iters=1000, learning_rate=1e-3).plan()
    model = nn.Module()
    model.norm, model.layer, model.pos_embed = nn.RMSNorm(3), nn.Linear(2, 3), mx.ones((5, 2))
    model.layer.update({"weight": mx.ones((3, 2)), "bias": mx.ones(3)})

    def nothing(model, batch, key):
        return {"loss": 0 * sum(x.sum() for _, x in tree_flatten(model.parameters()))}

    train(model, nothing, lambda number: (None, 0), plan)
    assert model.layer.weight[0, 0].item() == pytest.approx(0.951, abs=5e-4)
    for kept in (model.norm.weight, model.layer.bias, model.pos_embed):
        assert (kept == 1).all().item()


@pytest.mark.parametrize(("width", "rate"), [(1024, 1e-3), (1025, 8e-4), (2048, 8e-4), (3072, 4e-4)])
def test_each_width_has_the_papers_rates(width, rate):
    vision = Aimv2VisionConfig(width, 13, 1, 1, image_size=15, patch_size=5)
    plan = Settings(vision=vision, batch_size=8192, iters=1_500_000).plan()
    assert (plan.learning_rate, plan.min_rate) == (pytest.approx(rate), pytest.approx(1e-5))
    assert plan.warm_up == 12_500


def test_the_rate_is_the_papers_at_its_batch(shop):
    """1e-3 at a batch of 8,192, by the root of the batch; the first step of Adam goes as far as the rate."""
    flags = ("--weight-decay", 0, "--iters", 2)
    words = shop.words("pretrain", *flags)
    place = words.index("--learning-rate")
    del words[place : place + 2]
    output = shop.new()
    assert main([*words, "-o", str(output)]) == 0
    rate = 1e-3 * (3 / 8192) ** 0.5
    start = shop.weights("pretrain", *flags, "--learning-rate", TINY)
    by_hand = moved(start, shop.weights("pretrain", *flags, "--learning-rate", rate))
    own = moved(start, weights(output))
    assert all(own[name] == pytest.approx(by_hand[name], rel=1e-3) for name in own)


def test_a_native_encoder_sees_batches_of_many_sizes(shop):
    """The longest side of an image decides how many patches it has: their number changes what is lost."""
    flags = ("--validation", shop.data[1], "--steps-per-eval", 2)
    model, processor = load(shop.run("pretrain --native", *flags))
    assert processor.is_native and model.config.is_native
    few, many = (shop.bits("pretrain --native", "--patches", *patches) for patches in ((4, 6), (20, 30)))
    assert few != many != shop.bits("pretrain --native")


def test_a_run_goes_on_at_a_higher_resolution(shop):
    first = shop.run("pretrain")
    still = ("--weight-decay", 0, "--learning-rate", TINY)
    flags = (*still, "--start", first, "--iters", 1)
    one, other = weights(first), shop.weights("pretrain", *flags, "--image-size", 20)
    assert other["pos_embed"].shape == (16, 20)
    assert all(np.abs(one[name] - other[name]).max() < 1e-6 for name in one if name != "pos_embed")
    assert np.abs(other["pos_embed"][[0, 3, 12, 15]] - one["pos_embed"][[0, 2, 6, 8]]).max() < 0.05
    learned = ("--iters", 15, "--learning-rate", 1e-2)
    start, before, after = (
        shop.log("pretrain", *more)[-1]["text_loss"]
        for more in (
            (*still, "--iters", 1),
            learned,
            (*still, "--iters", 1, "--start", shop.run("pretrain", *learned), "--image-size", 20),
        )
    )
    assert abs(after - before) < (start - before) / 2  # the decoder goes on too


def test_a_start_of_other_sizes_is_an_error(shop, capsys):
    first = shop.run("pretrain")
    shop.size.write_text(json.dumps(VISION | {"image_size": 15, "intermediate_size": 17, "decoder_config": DECODER}))
    line = said(shop, capsys, "--start", first)
    assert "mlp.gate.weight is (13, 20), this run's is (17, 20)" in line


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
@pytest.mark.parametrize("verb", ["pretrain", "lit"])
def test_two_ranks_give_what_one_gives(shop, verb):
    flags = ("--batch-size", 4, "--iters", 20)
    output = shop.new()
    launch(["-m", "mlx_aimv2", *shop.words(verb, *flags), "-o", str(output)])
    one, two = (dict(tree_flatten(load(folder)[0].parameters())) for folder in (shop.run(verb, *flags), output))
    assert max(float(mx.abs(one[name] - two[name]).max().item()) for name in one) < 1e-5


def launch(command):
    """Runs Python with a command under mlx.launch, on two ranks."""
    port = random.randrange(20000, 60000)
    launcher = [sys.executable, str(LAUNCH), "-n", "2", "--backend", "ring", "-p", str(port)]
    environment = os.environ | {"PYTHONPATH": str(Path(mlx_aimv2.__file__).parents[1])}
    # An end of input would keep the launcher busy, so it gets a pipe.
    with subprocess.Popen(
        [*launcher, sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            process.wait(180)
        finally:
            process.kill()
