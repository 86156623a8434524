"""Runs of pre-training: they learn, resume to the bit, share the work, and end in one line where they cannot go on."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_aimv2.cli import main
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.conversion import safetensors_file
from mlx_aimv2.loading import load, resample_positions
from mlx_aimv2.pretrain import pretrain
from mlx_aimv2.pretrain.captioned import open_data
from mlx_aimv2.pretrain.objective import DecoderConfig, Pretraining
from mlx_aimv2.pretrain.settings import Schedule, Settings, scaled_rate
from mlx_aimv2.train.augment import Augmentation
from tests.programs import launched, needs_launch

WORDS = ("apple", "bear", "cloud", "door", "eagle", "fish", "grape", "hat")
SETTINGS = Settings(
    vision=Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5),
    decoder=DecoderConfig(26, 17, 2, 2, vocab_size=700, max_position_embeddings=11),
    batch=4,
    steps=6,
    learning_rate=3e-3,
    warm_up=1,
    seed=5,
)
QUIET = Schedule(log=1, validate=0, save=3, samples=0)


@pytest.fixture
def folder(tmp_path):
    """Eight images of noise, each with a caption of its own."""
    place, chance = tmp_path / "in", np.random.default_rng(8)
    place.mkdir()
    rows = []
    for number, word in enumerate(WORDS):
        Image.fromarray(chance.integers(0, 256, (3, 3, 3), np.uint8)).resize((15, 15)).save(place / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"{word} number {number}"})
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def weights(model):
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def equal(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def logged(output):
    lines = (output.with_name(output.name + ".training") / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_eight_pairs_are_learned_by_heart(folder, tmp_path):
    settings = replace(
        SETTINGS,
        vision=Aimv2VisionConfig(32, 48, 2, 2, image_size=15, patch_size=5),
        decoder=DecoderConfig(32, 48, 2, 2, vocab_size=700, max_position_embeddings=11),
        batch=8,
        steps=250,
        learning_rate=5e-3,
        augmentation=Augmentation(min_area=1, flip=False),
    )
    pretrain(open_data(folder), tmp_path / "out", settings=settings, schedule=QUIET)
    assert logged(tmp_path / "out")[-1]["text_loss"] < 0.05


def test_the_result_is_a_checkpoint_that_load_takes(folder, tmp_path):
    encoder = pretrain(open_data(folder), tmp_path / "out", settings=SETTINGS, schedule=QUIET)
    model, processor = load(tmp_path / "out")
    assert equal(weights(model), weights(encoder))
    assert processor(folder / "0.png").shape == (1, 15, 15, 3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "aimv2"


def test_a_resumed_run_gives_the_same_bits(folder, tmp_path):
    data = open_data(folder)
    whole = pretrain(data, tmp_path / "whole", settings=SETTINGS, schedule=QUIET)

    def interrupted(line):
        if line.startswith("step 5 "):  # the state of step 3 is on disk
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(data, tmp_path / "part", settings=SETTINGS, schedule=replace(QUIET, log=1), report=interrupted)
    assert not (tmp_path / "part").exists()
    with pytest.raises(FileExistsError, match="--resume"):
        pretrain(data, tmp_path / "part", settings=SETTINGS, schedule=QUIET)
    resumed = pretrain(data, tmp_path / "part", settings=SETTINGS, schedule=QUIET, resume=True)
    assert equal(weights(resumed), weights(whole))
    assert logged(tmp_path / "part")[-1]["loss"] == logged(tmp_path / "whole")[-1]["loss"]


def test_other_settings_on_resume_are_refused_by_name(folder, tmp_path):
    data, output = open_data(folder), tmp_path / "out"
    pretrain(data, output, settings=SETTINGS, schedule=QUIET)
    output.rename(tmp_path / "elsewhere")
    other = replace(SETTINGS, learning_rate=1e-3, alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha 0\.4, now 0\.5; learning-rate 0\.003, now 0\.001"):
        pretrain(data, output, settings=other, schedule=QUIET, resume=True)


def test_resuming_what_never_began_is_an_error(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="leave --resume out"):
        pretrain(open_data(folder), tmp_path / "out", settings=SETTINGS, resume=True)


def test_accumulated_parts_give_what_one_batch_gives(folder, tmp_path):
    data = open_data(folder)
    one = weights(pretrain(data, tmp_path / "one", settings=SETTINGS, schedule=QUIET))
    parts = weights(pretrain(data, tmp_path / "two", settings=replace(SETTINGS, accumulate=2), schedule=QUIET))
    assert max(np.abs(one[name] - parts[name]).max() for name in one) < 1e-5


def test_half_precision_computes_in_it_and_keeps_the_weights(folder, tmp_path):
    settings = replace(SETTINGS, dtype="bfloat16", steps=2)
    encoder = pretrain(open_data(folder), tmp_path / "out", settings=settings, schedule=QUIET)
    assert {array.dtype for _, array in tree_flatten(encoder.parameters())} == {mx.float32}
    full = pretrain(open_data(folder), tmp_path / "full", settings=replace(settings, dtype="float32"), schedule=QUIET)
    assert not equal(weights(encoder), weights(full))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_state(folder, tmp_path):
    settings = replace(SETTINGS, learning_rate=1e30, steps=9)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step .*--learning-rate"):
        pretrain(open_data(folder), tmp_path / "out", settings=settings, schedule=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_at_a_checkpoint_keeps_the_state_before(folder, tmp_path, monkeypatch):
    write, count = safetensors_file.write, 0

    def full(path, tensors, *, metadata):
        nonlocal count
        count += 1
        if count == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(path, tensors, metadata=metadata)

    monkeypatch.setattr(safetensors_file, "write", full)
    with pytest.raises(OSError, match=r"No space left on device.*--resume"):
        pretrain(open_data(folder), tmp_path / "out", settings=SETTINGS, schedule=QUIET)
    left = sorted(file.name for file in (tmp_path / "out.training").iterdir())
    assert left == ["log.jsonl", "state.safetensors", "tokenizer.json", "tokenizer_config.json"]
    monkeypatch.undo()
    resumed = pretrain(open_data(folder), tmp_path / "out", settings=SETTINGS, schedule=QUIET, resume=True)
    whole = pretrain(open_data(folder), tmp_path / "whole", settings=SETTINGS, schedule=QUIET)
    assert equal(weights(resumed), weights(whole))


def test_fewer_images_than_a_batch_are_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match="8 images with captions, fewer than a batch of 9"):
        pretrain(open_data(folder), tmp_path / "out", settings=replace(SETTINGS, batch=9))
    assert not (tmp_path / "out.training").exists()


def test_sizes_that_do_not_divide_are_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="17 pixels do not divide into patches of 5"):
        replace(SETTINGS, vision=replace(SETTINGS.vision, image_size=17))
    with pytest.raises(ValueError, match="batch of 4 does not divide into 3 parts"):
        pretrain(open_data(folder), tmp_path / "out", settings=replace(SETTINGS, accumulate=3))


def test_validation_losses_and_samples_appear(folder, tmp_path):
    data = open_data(folder)
    schedule = Schedule(log=2, validate=3, save=0, samples=3)
    pretrain(data, tmp_path / "out", settings=SETTINGS, schedule=schedule, validation=data)
    entries = logged(tmp_path / "out")
    assert [e["step"] for e in entries if "validation_text_loss" in e] == [3, 6]
    images = sorted((tmp_path / "out.training").glob("patches-*.png"))
    assert [file.name for file in images] == ["patches-000003.png", "patches-000006.png"]
    with Image.open(images[0]) as image:
        assert image.size == (2 * 15, 4 * 15)


def test_the_rate_is_the_papers_at_its_batch():
    assert scaled_rate(1024, 8192) == 1e-3
    assert scaled_rate(3072, 8192) == 4e-4
    assert scaled_rate(1024, 2048) == pytest.approx(5e-4)


def test_a_native_encoder_sees_batches_of_many_sizes(folder, tmp_path, monkeypatch):
    seen, compute = set(), Pretraining.losses

    def spied(model, batch, alpha):
        seen.add(batch.pixels.shape)
        return compute(model, batch, alpha)

    monkeypatch.setattr(Pretraining, "losses", spied)
    native = Aimv2VisionConfig(24, 13, 2, 2, is_native=True, patch_size=5)
    settings = replace(SETTINGS, vision=native, patches=(4, 30))
    pretrain(open_data(folder), tmp_path / "out", settings=settings, schedule=QUIET, validation=open_data(folder))
    assert len(seen) > 2
    model, processor = load(tmp_path / "out")
    assert processor.is_native and model.config.is_native


def test_a_run_goes_on_at_a_higher_resolution(folder, tmp_path):
    data = open_data(folder)
    first = pretrain(data, tmp_path / "low", settings=SETTINGS, schedule=QUIET)
    high = replace(SETTINGS, vision=replace(SETTINGS.vision, image_size=20), weight_decay=0.0, learning_rate=1e-12)
    second = pretrain(data, tmp_path / "high", settings=replace(high, start=str(tmp_path / "low")), schedule=QUIET)
    one, other = weights(first), weights(second)
    assert other["pos_embed"].shape == (16, 22)
    assert all(np.abs(one[name] - other[name]).max() < 1e-6 for name in one if name != "pos_embed")
    wanted = resample_positions(mx.array(one["pos_embed"]), (3, 3), (4, 4))
    assert np.abs(other["pos_embed"] - np.array(wanted)).max() < 1e-6
    before = logged(tmp_path / "low")[-1]["text_loss"]
    assert logged(tmp_path / "high")[0]["text_loss"] == pytest.approx(before, abs=0.7)  # the decoder goes on too


def test_a_start_of_other_sizes_is_an_error(folder, tmp_path):
    data = open_data(folder)
    pretrain(data, tmp_path / "low", settings=SETTINGS, schedule=QUIET)
    other = replace(SETTINGS, vision=replace(SETTINGS.vision, intermediate_size=17))
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight is \(13, 22\), this run's is \(17, 22\)"):
        pretrain(data, tmp_path / "high", settings=replace(other, start=str(tmp_path / "low")), schedule=QUIET)


COMMAND = [
    "--batch",
    "4",
    "--learning-rate",
    "3e-3",
    "--warm-up",
    "1",
    "--seed",
    "5",
    "--vocab-size",
    "700",
    "--save-every",
    "0",
    "--samples-every",
    "0",
]


@pytest.fixture
def sizes(tmp_path):
    decoder = {"hidden_size": 26, "intermediate_size": 17, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 22, "intermediate_size": 13, "num_hidden_layers": 2, "num_attention_heads": 2}
    content = vision | {"image_size": 15, "patch_size": 5, "is_native": False, "decoder_config": decoder}
    (tmp_path / "sizes.json").write_text(json.dumps(content))
    return tmp_path / "sizes.json"


def test_the_verb_trains(folder, sizes, tmp_path, capsys):
    words = ["pretrain", str(folder), "-o", str(tmp_path / "out"), "--size", str(sizes), "--steps", "2", *COMMAND]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert load(tmp_path / "out")[0].config.hidden_size == 22


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "tiny"], "--size is large, huge, 1B, 3B or a config.json, got tiny"),
        (["--image-size", "16"], "16 pixels do not divide"),
        (["--patches", "9", "4"], "--patches are the fewest, 2 at least, and the most; got 9 4"),
        (["--native"], "a native model's hidden_size is a multiple of 4, got 22"),
        (["--start", "gone"], "gone"),
        (["--min-area", "0"], "min_area must be from 0.01 to 1"),
        (["--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(folder, sizes, tmp_path, capsys, words, said):
    assert main(["pretrain", str(folder), "-o", str(tmp_path / "out"), "--size", str(sizes), *COMMAND, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.slow
@needs_launch
def test_two_ranks_give_what_one_gives(folder, sizes, tmp_path):
    words = ["pretrain", str(folder), "--size", str(sizes), "--steps", "20", *COMMAND]
    assert main([*words, "-o", str(tmp_path / "one")]) == 0
    launched("-m", "mlx_aimv2", *words, "-o", str(tmp_path / "two"))
    one, two = (weights(load(tmp_path / name)[0]) for name in ("one", "two"))
    assert max(np.abs(one[name] - two[name]).max() for name in one) < 1e-5
