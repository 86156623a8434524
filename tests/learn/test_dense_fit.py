"""`fit`, `predict` and `evaluate` on masks and boxes, from a folder of scenes to overlays."""

import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageFile

from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel
from mlx_aimv2.cli import main
from mlx_aimv2.learn import evaluate, fit
from mlx_aimv2.learn.learner import Learner, visible_patches
from tests.small_encoder import small_encoder
from tests.small_models import FIXED
from tests.small_training import write_encoder
from tests.test_examples import FOLDER, imported

KINDS = {"segment": "masks", "detect": "boxes"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Eight small scenes for training, four each held out."""
    folder = tmp_path_factory.mktemp("scenes")
    sizes = ["--train", "8", "--held-out", "4", "--side", "84"]
    imported(FOLDER / "make_scenes.py").main([str(folder), *sizes])
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An encoder of nine patches, where it is not its size that counts."""
    return write_encoder(tmp_path_factory.mktemp("tiny") / "encoder")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out


def test_scenes_hold_the_same_objects_in_masks_and_boxes(scenes):
    boxes = json.loads((scenes / "boxes" / "train" / "_annotations.coco.json").read_text())
    for entry in boxes["images"]:
        mask = np.asarray(Image.open(scenes / "masks" / "train" / "masks" / entry["file_name"].replace("jpg", "png")))
        own = [found for found in boxes["annotations"] if found["image_id"] == entry["id"]]
        assert own
        inside = np.zeros(mask.shape, bool)
        for found in own:
            left, top, width, height = found["bbox"]
            part = mask[top : top + height, left : left + width]
            inside[top : top + height, left : left + width] = True
            ink = part == found["category_id"] + 1
            assert ink.any(axis=0)[[0, -1]].all()
            assert ink.any(axis=1)[[0, -1]].all()
        assert not mask[~inside].any()


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("kind", ["decoder", "full", "lora"])
def test_a_head_for_boxes_and_masks_is_made_used_and_scored(task, kind, scenes, tmp_path, capsys):
    data = scenes / KINDS[task]
    flags = ["--fine-tune-type", kind, "--image-size", 84, "--iters", 2, "--batch-size", 4]
    out = run(capsys, "fit", data, "-m", small_encoder(), "-o", "head", *flags)
    assert f"task {task}: " in out.err
    info = json.loads((tmp_path / "head" / "head.json").read_text())
    assert info["image_size"] == 84
    card = (tmp_path / "head" / "README.md").read_text()
    assert "overlays.jpg" in card
    image = next((data / "val").rglob("*.jpg"))
    found = json.loads(run(capsys, "predict", "head", image, "--json", "-o", "out").out)
    assert (found["height"], found["width"]) == (84, 84)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert f"{image.stem}-overlay.jpg" in names
    assert ("predictions.coco.json" if task == "detect" else "classes.txt") in names
    scored = json.loads(run(capsys, "evaluate", "head", data, "--json").out)
    metric = {"segment": "miou", "detect": "ap"}[task]
    # Features are kept in half precision, images run in whole.
    assert scored[metric] == pytest.approx(info["metrics"]["test"][metric], abs=2e-3)


@pytest.mark.parametrize("task", KINDS)
def test_data_that_is_wrong_ends_in_one_line_before_anything_is_trained(task, scenes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(scenes / KINDS[task], data)
    image = sorted((data / "train").rglob("*.jpg"))[0]
    image.write_bytes(b"no image")
    assert main(["fit", str(data), "-m", str(FIXED), "-o", "head"]) == 2
    err = capsys.readouterr().err
    assert "is not an image" in err
    assert "Traceback" not in err
    assert not (tmp_path / "head").exists()


def test_a_size_that_no_patch_divides_is_refused(scenes, capsys):
    code = main(["fit", str(scenes / "boxes"), "-m", str(small_encoder()), "-o", "head", "--image-size", "100"])
    assert code == 2
    assert "image_size must be a multiple of the patch of 14 pixels, at most 2,044, got 100; use 98 or 112" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("shape", ["random", "block"])
@pytest.mark.parametrize("task", KINDS)
def test_a_dense_head_is_trained_with_hidden_patches_and_used_without(task, shape, scenes, tiny, tmp_path):
    settings = {"fine_tune_type": "full", "iters": 2, "batch_size": 3, "steps_per_eval": 1}
    fitted = fit(scenes / KINDS[task], tiny, tmp_path / "head", mask_ratio=0.5, mask_shape=shape, **settings)
    assert min(fitted.scores["test"].values()) >= 0
    assert evaluate(fitted.folder, scenes / KINDS[task]).scores == fitted.scores["test"]


def test_a_learned_vector_stands_where_a_patch_is_hidden():
    """Other places hold what the encoder makes of the visible patches, whatever the hidden ones show."""
    encoder = Aimv2VisionModel(Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5))
    learner = Learner(encoder, lambda tokens, grid: {"tokens": tokens}, fills=True)
    learner.hidden = mx.arange(22).astype(mx.float32)
    pixels, visible = mx.random.normal((2, 15, 15, 3), key=mx.random.key(1)), np.array([[1, 2, 6, 8], [0, 3, 4, 5]])
    tokens = np.array(learner(pixels, visible=mx.array(visible))["tokens"])
    is_hidden = np.ones((2, 9), bool)
    np.put_along_axis(is_hidden, visible, False, axis=1)
    np.testing.assert_array_equal(tokens[is_hidden], np.tile(np.arange(22), (10, 1)))
    wanted = np.array(encoder(pixels, patch_mask=mx.array(is_hidden)).last_hidden_state)
    np.testing.assert_allclose(tokens[~is_hidden].reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden", [0, 1, 17, 34])
def test_as_many_patches_are_hidden_as_are_asked_for_in_blocks_of_neighbours(hidden):
    rng = np.random.default_rng(0)
    alone = {"random": 0, "block": 0}
    for shape, _ in itertools.product(alone, range(99)):
        left = visible_patches((5, 7), hidden, shape, rng)
        assert len(left) == 35 - hidden
        assert (np.diff(left) > 0).all()
        is_hidden = np.ones((7, 9), bool)
        is_hidden[1:-1, 1:-1].flat[left] = False
        is_hidden[[0, -1]] = is_hidden[:, [0, -1]] = False
        around = is_hidden[:-2, 1:-1] | is_hidden[2:, 1:-1] | is_hidden[1:-1, :-2] | is_hidden[1:-1, 2:]
        alone[shape] += (is_hidden[1:-1, 1:-1] & ~around).sum()
    assert hidden != 17 or alone["block"] < alone["random"] / 5


@pytest.mark.parametrize("task", ["segment", pytest.param("detect", marks=pytest.mark.slow)])
def test_a_frozen_encoder_sees_each_image_once_for_all_epochs(task, scenes, tiny, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(scenes / KINDS[task], data)
    for file in data.rglob("*.jpg"):
        os.utime(file, (1e9, 1e9))  # what has just changed is not remembered as a good image
    settings = {"fine_tune_type": "decoder", "batch_size": 8, "steps_per_eval": 4}
    fit(data, tiny, tmp_path / "first", iters=1, **settings)
    decoded, load = Counter(), ImageFile.ImageFile.load_prepare

    def counted(image):
        if image.format == "JPEG":
            decoded[image.fp.getvalue()] += 1
        load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", counted)
    fit(data, tiny, tmp_path / "head", epochs=4, cache=tmp_path / "new", **settings)
    # The four test images are drawn on the model card, too.
    assert sorted(decoded.values()) == [1] * 12 + [2] * 4


def test_predictions_keep_the_paths_of_their_images_and_replace_nothing(scenes, tiny, tmp_path, capsys):
    run(capsys, "fit", scenes / "boxes", "-m", tiny, "-o", "head", "--iters", 1)
    first, second = sorted((scenes / "boxes" / "val").rglob("*.jpg"))[:2]
    for name, source in {
        "in/a/x.jpg": first,
        "in/b/x.jpg": second,
        "in/x.v1.jpg": first,
        "in/x.v1.png": second,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).save(tmp_path / name)
    run(capsys, "predict", "head", "in", "-o", "out")
    names = {str(file.relative_to("out")) for file in Path("out").rglob("*") if file.is_file()}
    overlays = {"a/x-overlay.jpg", "b/x-overlay.jpg", "x.v1.jpg-overlay.jpg", "x.v1.png-overlay.jpg"}
    assert names == overlays | {"predictions.coco.json"}
    run(capsys, "predict", "head", "in/a/x.jpg", "in/b/x.jpg", "-o", "two")
    assert {str(file.relative_to("two")) for file in Path("two").rglob("*.jpg")} == {
        "a/x-overlay.jpg",
        "b/x-overlay.jpg",
    }
    before = sorted(file.read_bytes() for file in Path("in").rglob("*.*"))
    for output in ("in", "out", "in/a/x.jpg"):
        assert main(["predict", "nowhere", "in", "-o", output]) == 2
        assert f"Cannot save to the path {output} as it already exists" in capsys.readouterr().err
        assert main(["evaluate", "nowhere", str(scenes / "boxes"), "--card", output]) == 2
        assert f"Cannot save to the path {output} as it already exists" in capsys.readouterr().err
    assert before == sorted(file.read_bytes() for file in Path("in").rglob("*.*"))
    run(capsys, "evaluate", "head", scenes / "boxes", "--card", "card")
    assert [file.name for file in Path("card").iterdir()] == ["overlays.jpg"]
