"""`fit`, `predict` and `evaluate` end to end, and what ends in one line instead."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_aimv2 import plot
from mlx_aimv2.backend.device import slow_here
from mlx_aimv2.cli import main
from mlx_aimv2.embed.cache import open_features
from mlx_aimv2.images import to_rgb
from mlx_aimv2.learn import classify, evaluate, fit, fuse, predict
from mlx_aimv2.learn.head_folder import load_head
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.learn.task_options import RECIPES
from tests.labelled import CHECKPOINT, write_digits
from tests.small_models import NATIVE


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def digits(tmp_path):
    return write_digits(tmp_path / "digits")


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    return fit(write_digits(folder / "digits"), CHECKPOINT, folder / "head").folder


@pytest.fixture
def head(fitted_once, tmp_path):
    """A linear head on the digits, which a test may change."""
    return shutil.copytree(fitted_once, tmp_path / "head")


SHORT = {
    "linear": {},
    "knn": {},
    "attentive": {"epochs": 2, "batch_size": 8},
    "lora": {"iters": 2, "batch_size": 4},
    "dora": {"iters": 2, "batch_size": 4, "grad_checkpoint": True, "num_layers": 2},
    "full": {"iters": 2, "batch_size": 4, "mask_ratio": 0.5, "mixup": 0.2, "flip": True, "drop_path": 0.5},
}


@pytest.mark.parametrize("kind", SHORT)
def test_every_type_predicts_again_from_its_folder_what_it_was_scored_on(digits, tmp_path, kind):
    fitted = fit(digits, CHECKPOINT, tmp_path / "head", fine_tune_type=kind, **SHORT[kind])
    assert fitted.scores["test"]["top1"] >= 5 / 6
    assert evaluate(tmp_path / "head", digits).images == 36
    info = json.loads((tmp_path / "head" / "head.json").read_text())
    paths = sorted(digits.rglob("*.png"))
    names = [info["classes"][int(one.probabilities.argmax())] for _, one in predict(tmp_path / "head", paths)]
    right = np.mean([name == path.parent.name for name, path in zip(names, paths, strict=True)])
    assert right == pytest.approx(evaluate(tmp_path / "head", digits).scores["top1"])
    assert not (tmp_path / "head.training").exists()


def test_the_folder_holds_a_card_with_a_table_and_images(head):
    card = (head / "README.md").read_text()
    assert "| digit 2 | 12 |" in card
    assert "![Confusion matrix](confusion.png)" in card
    with Image.open(head / "confusion.png") as image:
        assert min(image.size) > 80


@pytest.mark.parametrize(
    ("label", "shown", "cell"),
    [
        ("a|b", r"a\|b", "a|b"),
        ("<script>x<*script>", r"\<script\>x\<\*script\>", "<script>x<*script>"),
        ("![a](http:b)", r"\!\[a\](http\:b)", "![a](http:b)"),
        ("=1+1", "=1+1", "'=1+1"),
        ("-cmd", "-cmd", "'-cmd"),
        ("-1", "-1", "-1"),
        ("@SUM(A1)", "@SUM(A1)", "'@SUM(A1)"),
    ],
)
def test_a_label_is_text_on_the_card_and_in_a_spreadsheet(digits, tmp_path, label, shown, cell):
    (digits / "digit 2").rename(digits / label)
    fit(digits, CHECKPOINT, tmp_path / "head")
    assert f"| {shown} | 12 |" in (tmp_path / "head" / "README.md").read_text()
    assert main(["predict", "head", str(digits / label), "-o", "written"]) == 0
    with (tmp_path / "written" / "predictions.csv").open(newline="") as stream:
        assert cell in {row["label"] for row in csv.DictReader(stream)}


def test_the_list_of_labels_may_be_in_another_unicode_form(digits, tmp_path):
    (digits / "digit 2").rename(digits / "caf\xe9")
    fit(digits, CHECKPOINT, tmp_path / "head", labels=["digit 0", "digit 1", " cafe\u0301"])
    assert load_head(tmp_path / "head").classes == ("caf\xe9", "digit 0", "digit 1")


def test_the_command_says_what_it_guessed_and_ends_in_an_honest_line(digits, capsys):
    assert main(["fit", str(digits), "-m", str(CHECKPOINT), "-o", "mine"]) == 0
    out, err = capsys.readouterr()
    assert "task classify: " in err and "has a folder for each of 3 labels" in err
    assert "fine-tune type linear, the default" in err
    assert re.match(
        r"top1 \d+\.\d\d % on 36 images, cross-validated in 5 folds \(95 % interval \d+\.\d to \d+\.\d\)", out
    )
    assert out.splitlines()[1] == "mine"
    assert main(["evaluate", "mine", str(digits), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 36


def test_predict_names_what_it_cannot_read_and_does_the_rest(head, digits, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    images = [str(digits / "digit 1" / "003.png"), "broken.png", "nowhere.png"]
    assert main(["predict", str(head), *images, "--json", "-o", "written"]) == 1
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert json.loads(line)["label"] == "digit 1"
    assert sum(entry["probability"] for entry in json.loads(line)["labels"]) == pytest.approx(1)
    assert "nowhere.png does not exist" in err and "broken.png is not an image" in err
    assert "digit 1" in (tmp_path / "written" / "predictions.csv").read_text()


def test_predictions_of_files_whose_names_are_no_text_are_written_as_text(tmp_path):
    classify.results.save_all([["caf\udce9.png", "digit 1", "0.9"]], ("digit 1",), tmp_path)
    written = (tmp_path / "predictions.csv").read_text(encoding="utf-8")
    assert written.splitlines() == ["path,label,probability", r"caf\udce9.png,digit 1,0.9"]


def test_another_encoder_is_refused(head, tmp_path):
    other = shutil.copytree(CHECKPOINT, tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    weights["trunk.post_trunk_norm.weight"] = 1.1 * weights["trunk.post_trunk_norm.weight"]
    mx.save_safetensors(str(other / "model.safetensors"), weights)
    with pytest.raises(ValueError, match=r"was trained on another encoder \(the weights: .*encoder there.* -m MODEL"):
        load_head(head, model=str(other))
    assert load_head(head, model=str(shutil.copytree(CHECKPOINT, tmp_path / "same"))).classes[0] == "digit 0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "was written by a newer version of mlx-aimv2 .format 2, this one reads 1."),
        ({"classes": "abc"}, "is damaged: classes is 'abc'"),
        ({"task": "paint"}, "is damaged: task is 'paint'"),
        ({"encoder": {}}, "is damaged: encoder is {}"),
        ({"image_size": 1 << 40}, "is damaged: image_size is 1099511627776"),
        ({"image_size": 0}, "is damaged: image_size is 0"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused(head, change, words):
    info = json.loads((head / "head.json").read_text()) | change
    (head / "head.json").write_text(json.dumps(info))
    with pytest.raises((ValueError, OSError), match=words):
        load_head(head)


def test_a_head_for_very_large_images_says_so(head):
    info = json.loads((head / "head.json").read_text())
    (head / "head.json").write_text(json.dumps(info | {"image_size": 14 * 130}))
    with pytest.warns(UserWarning, match="takes images of 16,900 patches: each may take minutes"):
        load_head(head)


def test_no_head_and_half_a_head_are_told(head, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a folder written by fit \(no head.json\): make one with"):
        load_head(tmp_path)
    (head / "head.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match=r"head.safetensors: truncated or not a safetensors file"):
        load_head(head)


@pytest.mark.parametrize("file", ["head.safetensors", "adapters.safetensors", "encoder.safetensors"])
def test_weights_that_are_no_numbers_or_do_not_fit_are_refused_by_whoever_uses_them(digits, tmp_path, capsys, file):
    head = tmp_path / "head"
    kind = "full" if file.startswith("encoder") else "lora"
    fit(digits, CHECKPOINT, head, fine_tune_type=kind, iters=1, batch_size=4)
    arrays = mx.load(str(head / file))
    name = sorted(arrays)[-1]
    mx.eval(arrays)
    uses = [["predict", head, digits, "--json"], ["evaluate", head, digits]]
    uses += [["fuse", "--adapter-path", head, "--save-path", tmp_path / "fused"]]
    for broken, words in (
        (arrays[name] * mx.nan, f"{file} is damaged: {name} has values that are not numbers"),
        (arrays[name][None], f"{file} is not for this encoder: {name} is (1, "),
    ):
        mx.save_safetensors(str(head / file), arrays | {name: broken})
        for use in uses:
            capsys.readouterr()
            assert main([str(word) for word in use]) == 2
            said = capsys.readouterr()
            assert words in said.err and not said.out
    assert not (tmp_path / "fused").exists()


def test_an_encoder_that_gives_no_numbers_leaves_no_head(digits, tmp_path):
    broken = shutil.copytree(CHECKPOINT, tmp_path / "broken")
    arrays = mx.load(str(broken / "model.safetensors"))
    name = "trunk.post_trunk_norm.weight"
    mx.save_safetensors(str(broken / "model.safetensors"), arrays | {name: arrays[name] * mx.nan})
    for kind in ("linear", "knn", "attentive", "lora"):
        with pytest.raises(ValueError, match=r"not finite|no number"):
            fit(digits, broken, tmp_path / kind, fine_tune_type=kind, **SHORT[kind])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "cache", "digits"]


def test_an_encoder_that_has_moved_is_asked_for_by_fuse_too(digits, tmp_path):
    encoder = shutil.copytree(CHECKPOINT, tmp_path / "encoder")
    fit(digits, encoder, tmp_path / "head", fine_tune_type="lora", iters=1, batch_size=4)
    encoder.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"head needs is missing: .*encoder.*fuse take -m MODEL"):
        fuse(tmp_path / "head", tmp_path / "fused")
    fuse(tmp_path / "head", tmp_path / "fused", model=str(tmp_path / "moved"))


def computed(*arguments, **settings):
    """How many images `fit` has the encoder see: what its progress counts after the images that the cache has."""
    counts = []
    fit(*arguments, **settings, on_progress=lambda done, total, unit: counts.append(done) if unit == "images" else None)
    return counts[-1] - counts[0]


def test_an_interrupted_cache_goes_on_where_it_was(digits, tmp_path):
    fit(digits, CHECKPOINT, tmp_path / "one")
    rows = next((tmp_path / "cache" / "features").rglob("rows.bin"))
    keys = rows.with_name("keys.bin")
    whole = {keys.read_bytes()[32 * i : 32 * i + 32]: rows.read_bytes()[512 * i : 512 * i + 512] for i in range(36)}
    rows.write_bytes(rows.read_bytes()[: 512 * 20 + 100])  # killed within the 21st row
    keys.write_bytes(keys.read_bytes()[: 32 * 19 + 5])
    assert computed(digits, CHECKPOINT, tmp_path / "two") == 36 - 19
    again = {keys.read_bytes()[32 * i : 32 * i + 32]: rows.read_bytes()[512 * i : 512 * i + 512] for i in range(36)}
    assert again.keys() == whole.keys()
    for key, row in whole.items():
        np.testing.assert_allclose(np.frombuffer(again[key], "<f4"), np.frombuffer(row, "<f4"), atol=1e-5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_rows_that_do_not_fit_have_no_keys(tmp_path):
    with open_features(tmp_path, (2000,), np.dtype("<f4")) as cache:
        cache.rows_file = Path("/dev/full")
        with pytest.raises(OSError, match="no space left for the features in /dev/full: free some, or choose another"):
            cache.append([(b"k" * 32, np.ones(2000, np.float32))])
    assert (tmp_path / "keys.bin").read_bytes() == b""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 0.1}, "--learning-rate would have no effect with --fine-tune-type linear"),
        ({"fine_tune_type": "attentive", "mask_ratio": 0.5}, "--mask-ratio would have no effect"),
        ({"fine_tune_type": "lora", "layer_decay": 0.5}, "--layer-decay would have no effect"),
        (
            {"fine_tune_type": "lora", "adapter_path": "before", "lora_rank": 3, "num_layers": 2},
            "--num-layers, --lora-rank would have no effect with --fine-tune-type lora and --adapter-path",
        ),
        ({"fine_tune_type": "lora", "iters": 3, "epochs": 3}, "choose either --iters or --epochs"),
        ({"fine_tune_type": "lora", "num_layers": 9}, "--num-layers must be at most 4"),
        ({"fine_tune_type": "full", "mask_ratio": 1.0}, "--mask-ratio must be at least 0, below 1, got 1.0"),
        ({"fine_tune_type": "magic"}, "--fine-tune-type of classify must be linear, attentive, knn, lora, dora, full"),
        ({"recipe": "paper"}, "--recipe paper is for --fine-tune-type attentive"),
        ({"image_size": 60}, "image_size must be a multiple of the patch of 14 pixels.*use 56 or 70"),
        ({"labels": ["digit 0", "digit 1"]}, "the label digit 2 is not in the list digit 0, digit 1"),
        ({"resume": True}, "nothing to resume"),
        (
            {"fine_tune_type": "full", "dtype": "float16"},
            "full needs --dtype float32, got float16; lora and dora do not",
        ),
    ],
)
def test_options_that_contradict_are_refused(digits, tmp_path, settings, words):
    with pytest.raises((ValueError, OSError), match=words):
        fit(digits, CHECKPOINT, tmp_path / "head", **settings)
    assert not (tmp_path / "head").exists()


def test_an_encoder_in_half_precision_is_trained_in_full_as_float32(digits, tmp_path):
    from mlx_aimv2.convert import convert

    half = convert(CHECKPOINT, tmp_path / "half", dtype="bfloat16", verify=False)
    fit(digits, half, tmp_path / "head", fine_tune_type="full", iters=1, batch_size=4)
    learner = load_head(tmp_path / "head").learner
    assert {str(array.dtype) for _, array in tree_flatten(learner.parameters())} == {"mlx.core.float32"}
    for name, dtype, wanted in (("auto", {}, mx.float32), ("own", {"dtype": None}, mx.bfloat16)):
        lines: list[str] = []
        fit(digits, half, tmp_path / name, say=lines.append, **dtype)
        is_slow = f"note: {slow_here(wanted)}" in lines
        assert is_slow == (wanted == mx.bfloat16 and mx.default_device().type == mx.DeviceType.cpu)
        assert load_head(tmp_path / name).learner.encoder.dtype == wanted  # a head keeps what it was made with


def test_the_papers_recipe_tries_its_fourteen_settings(digits, tmp_path):
    lines = []
    about = {"fine_tune_type": "attentive", "recipe": "paper", "epochs": 2}
    fit(digits, CHECKPOINT, tmp_path / "head", **about, augment=False, say=lines.append)
    info = json.loads((tmp_path / "head" / "head.json").read_text())
    assert len(RECIPES["paper"].learning_rates) * len(RECIPES["paper"].weight_decays) == 14
    assert info["settings"]["learning_rate"] in RECIPES["paper"].learning_rates
    assert any("are the best on val" in line for line in lines)


def test_the_papers_recipe_has_both_columns_of_its_table():
    """And timm's rand-m9-mstd0.5-inc1, crops of 8 % and more, and jitter of 0.3 for both."""
    assert [(one.batch_size, one.warm_up_epochs, one.min_rate) for one in RECIPES.values()] == [
        (1024, 5, 1e-5),
        (512, 0, 1e-5),
    ]
    for one in RECIPES.values():
        changed = one.augmentation
        assert (changed.min_area, changed.flip, changed.jitter) == (0.08, True, 0.3)
        assert (changed.operations, changed.strength, changed.probability) == (2, (0.9, 0.05), 0.5)


def test_the_papers_recipe_learns_on_images_that_are_changed_at_random_each_time(digits, tmp_path, monkeypatch):
    opened = Counter()
    monkeypatch.setattr("mlx_aimv2.learn.probes.to_rgb", lambda path: opened.update([path]) or to_rgb(path))

    def losses(name, **more):
        settings = {"recipe": "paper-others", "iters": 3, "steps_per_eval": 1, "learning_rate": 1e-2}
        fit(digits, CHECKPOINT, tmp_path / name, fine_tune_type="attentive", **settings, **more)
        history = json.loads((tmp_path / name / "head.json").read_text())["history"]
        return [entry["loss"] for entry in history[1:]]

    as_is = losses("as-is", augment=False)
    assert not opened
    changed = losses("changed")
    assert len(opened) == 24 and min(opened.values()) >= 3  # all are in each batch
    assert abs(changed[2] - as_is[2]) > 1e-3 * as_is[2]


def test_a_native_encoder_learns_on_images_of_one_size(digits, tmp_path):
    lines = []
    fitted = fit(digits, NATIVE, tmp_path / "head", image_size=63, say=lines.append)
    assert sum("the checkpoint was trained on 112 and more" in line for line in lines) == 1
    info = json.loads((tmp_path / "head" / "head.json").read_text())
    side = info["image_size"]
    assert side <= 63 and side % load_head(tmp_path / "head").processor.patch_size == 0
    assert load_head(tmp_path / "head").processor.preprocessing.final_size == (side, side)
    assert fitted.images == {"train": 36, "val": 0, "test": 36}


def test_a_head_asks_for_the_commit_of_its_encoder_that_it_was_trained_on(head, tmp_path, monkeypatch):
    copy = shutil.copytree(head, tmp_path / "copy")
    info = json.loads((copy / "head.json").read_text())
    info["encoder"] |= {"checkpoint": "somebody/encoder", "commit": "a" * 40}
    (copy / "head.json").write_text(json.dumps(info))
    asked = []

    def read_source(name, *, revision=None):
        asked.append((name, revision))
        raise FileNotFoundError("offline")

    monkeypatch.setattr("mlx_aimv2.learn.head_folder.read_source", read_source)
    for model in (None, "other/encoder"):
        with pytest.raises(FileNotFoundError, match="offline"):
            list(predict(copy, [], model=model))
    assert asked == [("somebody/encoder", "a" * 40), ("other/encoder", None)]


def test_the_surest_of_the_mistakes_come_first_on_the_card(head, digits, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plot, "contact_sheet", lambda rows, *, captions, **_: shown.extend(captions) or rows[0][0])
    path = sorted(map(str, Path(digits).rglob("*.png")))[0]
    samples = [Sample(path, bytes([number]) * 32, (1, 2), 0) for number in range(3)]
    probabilities = ([0.4, 0.6, 0.0], [0.05, 0.05, 0.9], [0.9, 0.1, 0.0])
    predictions = [classify.results.Classification(np.array(row)) for row in probabilities]
    classify.results.card(samples, predictions, ("a", "b", "c"), tmp_path)
    assert shown == [["a\nnot c", "a\nnot b"]]


def test_a_head_that_is_there_is_not_overwritten(head, digits):
    with pytest.raises(FileExistsError, match="already exists"):
        fit(digits, CHECKPOINT, head)


def test_the_interval_is_wilsons(digits, tmp_path):
    """By the formula in the books, of so many images of which so many are right."""
    line = fit(digits, CHECKPOINT, tmp_path / "head").line
    found = re.search(
        r"(\d+\.\d+) % on (\d+) images, cross-validated in 5 folds \(95 % interval (\d+\.\d) to (\d+\.\d)\)", line
    )
    share, count, low, high = float(found[1]) / 100, int(found[2]), float(found[3]), float(found[4])
    middle, z = share + 1.96**2 / (2 * count), 1.96
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    wanted = [100 * (middle + side * half) / (1 + z * z / count) for side in (-1, 1)]
    assert [low, high] == pytest.approx(wanted, abs=0.06)


def test_evaluate_and_predict_print_a_table_and_the_best_labels(head, digits, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(head), str(digits)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:7] for line in lines[1:4]] == ["digit 0", "digit 1", "digit 2"]
    assert re.fullmatch(r"top1 \d+\.\d\d %, mean_class \d+\.\d\d %, ece \d+\.\d\d % on 36 images", lines[-1])
    image = str(next((digits / "digit 1").iterdir()))
    shutil.copy(image, digits / "loose.png")
    assert any("loose.png is not in a label's folder" in note for note in evaluate(head, digits).notes)
    assert main(["predict", str(head), image]) == 0
    path, *labels = capsys.readouterr().out.splitlines()
    assert path == image and len(labels) == 3
    assert re.fullmatch(r" *\d+\.\d\d %  digit \d", labels[0])


def test_a_keyword_that_there_is_not_is_named_as_one_of_fit(tmp_path):
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'epoch'"):
        fit(tmp_path, "nowhere", tmp_path / "head", epoch=3)


def test_a_small_set_is_cross_validated_and_all_of_it_is_learned(digits, tmp_path):
    fitted = fit(digits, CHECKPOINT, tmp_path / "head")
    assert fitted.images == {"train": 36, "val": 0, "test": 36} and set(fitted.scores) == {"test"}
    assert "on 36 images, cross-validated in 5 folds" in fitted.line
    assert "one of 5 heads that never saw it" in (tmp_path / "head" / "README.md").read_text()
    assert len((tmp_path / "head" / "trained_on.sha256").read_bytes()) == 8 * 36
    held_out = fit(digits, CHECKPOINT, tmp_path / "other", holdout=0.25)
    assert held_out.images == {"train": 18, "val": 9, "test": 9}


def test_a_cross_validation_does_not_see_what_it_scores(digits, tmp_path):
    """Labels that say nothing are learned by heart, and the estimate knows better."""
    rng = np.random.default_rng(4)
    files = sorted(digits.rglob("*.png"))
    for i, file in enumerate(rng.permutation(np.array(files, dtype=object))):
        file.rename(digits / f"digit {i % 3}" / f"mixed-{i}.png")
    fitted = fit(digits, CHECKPOINT, tmp_path / "head", fine_tune_type="knn")
    assert evaluate(tmp_path / "head", digits).scores["top1"] > 0.6 > fitted.scores["test"]["top1"]


def test_refit_learns_all_images_and_keeps_the_estimate_and_the_settings(digits, tmp_path):
    before = fit(digits, CHECKPOINT, tmp_path / "before", holdout=0.25)
    after = fit(digits, CHECKPOINT, tmp_path / "after", holdout=0.25, refit=True)
    assert before.scores == after.scores and before.images == after.images
    infos = [json.loads((tmp_path / name / "head.json").read_text()) for name in ("before", "after")]
    assert infos[0]["settings"]["penalty"] == infos[1]["settings"]["penalty"]
    assert [len((tmp_path / name / "trained_on.sha256").read_bytes()) // 8 for name in ("before", "after")] == [18, 36]
    assert "fitted once more on all images" in (tmp_path / "after" / "README.md").read_text()
    (note,) = [line for line in evaluate(tmp_path / "after", digits).notes if "too optimistic" in line]
    assert note.startswith("36 of the 36 images scored")
    one, two = (mx.load(str(tmp_path / name / "head.safetensors"))["mean"] for name in ("before", "after"))
    assert not mx.array_equal(one, two)


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_one_image_a_label_is_enough(tmp_path, kind):
    digits = write_digits(tmp_path / "few", per_class=1)
    fitted = fit(digits, CHECKPOINT, tmp_path / "head", fine_tune_type=kind)
    assert fitted.scores == {} and "no image was held out" in fitted.line
    assert [one.label for _, one in predict(tmp_path / "head", digits)] == ["digit 0", "digit 1", "digit 2"]
    with pytest.raises(ValueError, match="has no label with two images: knn and linear need only one image"):
        fit(digits, CHECKPOINT, tmp_path / "other", fine_tune_type="lora")


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_balanced_classes_find_more_of_the_rare_ones_and_the_card_says_so(tmp_path, kind):
    data = write_digits(tmp_path / "uneven", per_class=40)
    for label, kept in (("digit 1", 3), ("digit 2", 4)):
        for file in sorted((data / label).iterdir())[kept:]:
            file.unlink()
    said = []
    plain = fit(data, CHECKPOINT, tmp_path / "plain", fine_tune_type=kind, say=said.append)
    even = fit(data, CHECKPOINT, tmp_path / "even", fine_tune_type=kind, class_weights="balanced", metric="mean_class")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "Labels have from 3 to 40 images for training. With `--class-weights balanced`" in card
    assert any("would be top1" in line for line in said)
    assert "classes are weighted to count equally" in (tmp_path / "even" / "README.md").read_text()
    found = [fitted.scores["test"]["mean_class"] for fitted in (plain, even)]
    assert found[1] >= found[0] + (0.02 if kind == "linear" else 0), found


def test_what_is_chosen_by_must_be_a_score_of_the_task(digits, tmp_path):
    with pytest.raises(ValueError, match="--metric of classify must be top1, mean_class, got miou"):
        fit(digits, CHECKPOINT, tmp_path / "head", metric="miou")
    with pytest.raises(ValueError, match="--refit would have no effect with --fine-tune-type lora"):
        fit(digits, CHECKPOINT, tmp_path / "head", fine_tune_type="lora", refit=True)


def test_a_run_draws_its_curves_and_keeps_val_loss_and_rate(digits, tmp_path):
    settings = {"fine_tune_type": "attentive", "epochs": 2, "batch_size": 8, "steps_per_eval": 2}
    fit(digits, CHECKPOINT, tmp_path / "head", **settings)
    history = json.loads((tmp_path / "head" / "head.json").read_text())["history"]
    assert all({"step", "loss", "score", "val_loss", "rate"} <= entry.keys() for entry in history)
    assert 0 < history[1]["loss"] < 2 and history[1]["rate"] > history[-1]["rate"] >= 0
    assert "training.png" in (tmp_path / "head" / "README.md").read_text()
    with Image.open(tmp_path / "head" / "training.png") as image:
        assert image.height > image.width / 2
