"""Segmentation and detection as tasks: examples, heads, losses and predictions fit each other."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_aimv2 import load
from mlx_aimv2.embed.loader import Decoder
from mlx_aimv2.learn import detect, segment
from mlx_aimv2.learn.dense import Placement
from mlx_aimv2.learn.detect.boxes_average_precision import Detections, GroundTruth, areas
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.loading import at_size
from tests.small_models import FIXED, NATIVE

pytestmark = pytest.mark.rounding

SIZE = (67, 43)  # height and width of the one image
BOX = (11, 23, 37, 59)
TASKS = (segment.TASK, detect.TASK)


def ground_truth(box, label):
    boxes = np.array([box], float)
    return GroundTruth(boxes, np.array([label]), np.array([False]), areas(boxes))


@pytest.fixture
def samples(tmp_path):
    """The same image with a mask and with a box."""
    levels = np.full((*SIZE, 3), 40, np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    levels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 220
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 2
    mask[:3] = 255
    Image.fromarray(levels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    path = str(tmp_path / "image.png")
    truth = ground_truth(BOX, 2)
    return {
        segment.TASK: Sample(path, b"", SIZE, str(tmp_path / "mask.png")),
        detect.TASK: Sample(path, b"", SIZE, truth),
    }


def encoder(source=FIXED, patches=None):
    model, processor = load(source)
    side = None if patches is None else patches * model.config.patch_size
    return at_size(model.vision, processor, side, whole=True)


def head_of(task, model, kind=None, classes=3):
    mx.random.seed(5)
    return task.head.make_head(kind or next(iter(task.types)), model.config, classes, {})


def outputs_of(task, head, model, pixels):
    return head(model(pixels).last_hidden_state, model.grid(pixels))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("source", "patches"), [(FIXED, None), (FIXED, 7), (NATIVE, 5)])
def test_an_image_goes_through_to_a_loss_and_back_to_its_own_pixels(task, source, patches, samples):
    model, processor = encoder(source, patches)
    example = task.data.example(samples[task], processor, rng=None)
    assert all((example[name] == array).all() for name, array in task.data.targets(samples[task], processor).items())
    batch = {name: mx.array(np.stack([array] * 2)) for name, array in example.items()}
    outputs = outputs_of(task, head_of(task, model), model, batch["pixels"])
    losses = task.head.loss(outputs, batch)
    assert losses.shape == (2,)
    assert np.isfinite(np.array(losses)).all()
    assert all(array.shape[0] == 2 for array in outputs.values())
    prediction = task.results.decode({name: np.array(array[0]) for name, array in outputs.items()}, SIZE)
    classes = ("sky", "sea", "land")
    assert json.loads(json.dumps(task.results.as_json(prediction, classes)))["height"] == SIZE[0]
    assert task.results.as_text(prediction, classes)


@pytest.mark.parametrize("task", TASKS)
def test_the_loader_gives_the_pixels_of_the_example(task, samples):
    _, processor = encoder()
    decoded = Decoder(processor)(samples[task].path)
    assert decoded.upright == SIZE
    pixels = np.array(processor.normalised(mx.array(decoded.levels)))
    np.testing.assert_array_equal(pixels, task.data.example(samples[task], processor, rng=None)["pixels"])


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_a_function_of_its_chance(task, samples):
    _, processor = encoder()
    first, again, other = (
        task.data.example(samples[task], processor, rng=np.random.default_rng(seed), flip=True) for seed in (3, 3, 4)
    )
    assert all((first[name] == again[name]).all() for name in first)
    assert not (first["pixels"] == other["pixels"]).all()
    assert {name: array.shape for name, array in first.items()} == {n: a.shape for n, a in other.items()}


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_of_a_head_has_a_gradient(task, samples):
    model, processor = encoder(patches=8)
    example = task.data.example(samples[task], processor, rng=None)
    batch = {name: mx.array(array[None]) for name, array in example.items()}
    tokens = model(batch["pixels"]).last_hidden_state
    head = head_of(task, model)
    # Its last layers start from numbers other than zero, so that all layers before them matter.
    _, gradients = nn.value_and_grad(head, lambda t: task.head.loss(head(t, (8, 8)), batch).sum())(tokens)
    idle = [name for name, gradient in tree_flatten(gradients) if not np.array(gradient).any()]
    assert [name for name in idle if not name.startswith(("scales", "smooth", "norms", "half"))] == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.slow
def test_a_head_learns_one_image_by_heart(task, samples):
    import mlx.optimizers as optim

    model, processor = encoder(patches=8)
    example = task.data.example(samples[task], processor, rng=None)
    batch = {name: mx.array(array[None]) for name, array in example.items()}
    tokens = model(batch["pixels"]).last_hidden_state
    head = head_of(task, model)
    step, optimizer = nn.value_and_grad(head, lambda t: task.head.loss(head(t, (8, 8)), batch).sum()), optim.Adam(1e-2)
    for _ in range(150):
        _, gradients = step(tokens)
        optimizer.update(head, gradients)
        mx.eval(head.parameters(), optimizer.state)
    outputs = {name: np.array(array[0]) for name, array in head(tokens, (8, 8)).items()}
    found = task.results.decode(outputs, SIZE)
    scores, _ = task.results.score([samples[task]], [found], ("sky", "sea", "land"))
    assert scores[task.metric] > 0.85


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_mask_holds_the_numbers_of_its_classes_alone_at_whatever_size(samples, seed):
    _, processor = encoder(patches=5)
    rng = None if seed is None else np.random.default_rng(seed)
    mask = segment.data.example(samples[segment.TASK], processor, rng=rng)["mask"]
    assert mask.shape == (70, 70)
    assert set(np.unique(mask)) <= {0, 2, 255}


def test_the_linear_segmentation_head_decides_by_patch(samples):
    model, _ = encoder()
    head = head_of(segment, model, "linear")
    tokens = mx.random.normal((2, 15, model.config.hidden_size), key=mx.random.key(3))
    logits = head(tokens, (3, 5))["logits"]
    patch = model.config.patch_size
    assert logits.shape == (2, 3 * patch, 5 * patch, 3)
    if patch % 2:
        centre = logits[:, patch // 2 :: patch, patch // 2 :: patch].reshape(2, 15, 3)
        np.testing.assert_allclose(np.array(centre), np.array(head.linear(tokens)), atol=1e-5)


def test_the_loss_of_masks_is_cross_entropy_and_dice_over_labelled_pixels():
    logits = mx.random.normal((2, 3, 5, 4), key=mx.random.key(1))
    mask = np.random.default_rng(2).integers(0, 3, (2, 3, 5)).astype(np.uint8)
    mask[0, 0] = 255
    got = segment.head.loss({"logits": logits}, {"mask": mx.array(mask)})
    p = np.array(mx.softmax(logits, axis=-1))[0, 1:].reshape(-1, 4)
    truth = mask[0, 1:].ravel()
    cross = -np.log(p[np.arange(10), truth]).mean()
    dice = [2 * p[truth == c, c].sum() / (p[:, c].sum() + (truth == c).sum()) for c in np.unique(truth)]
    np.testing.assert_allclose(got[0].item(), cross + 1 - np.mean(dice), rtol=1e-5)
    assert segment.head.loss({"logits": logits}, {"mask": mx.full((2, 3, 5), 255)}).tolist() == [0, 0]


def test_a_mask_comes_back_at_the_images_own_size():
    logits = np.zeros((8, 6, 3), np.float32)
    logits[:, :3, 0], logits[:, 3:, 2] = 9, 9
    found = segment.results.decode({"logits": logits}, (31, 60))
    assert found.labels.shape == found.confidence.shape == (31, 60)
    assert (found.labels[:, :28] == 0).all()
    assert (found.labels[:, 32:] == 2).all()
    assert found.confidence[0, -1] == pytest.approx(1, abs=1e-3)


def test_a_class_is_as_sure_as_its_own_pixels_are():
    labels = np.array([[1, 1, 1], [0, 0, 1]], np.uint8)
    found = segment.results.Segmentation(labels, np.where(labels == 1, 0.9, 0.5).astype(np.float32))
    shown = segment.results.as_json(found, ("sea", "land"))["classes"]
    assert [(one["label"], one["share"], one["confidence"]) for one in shown] == [
        ("land", pytest.approx(4 / 6), pytest.approx(0.9)),
        ("sea", pytest.approx(2 / 6), pytest.approx(0.5)),
    ]


def test_the_table_counts_the_images_that_have_a_class(samples):
    found = segment.results.Segmentation(np.ones(SIZE, np.uint8), np.ones(SIZE, np.float32))
    _, rows = segment.results.score([samples[segment.TASK]], [found], ("sky", "sea", "land"))
    assert [row[1] for row in rows[1:]] == ["1", "0", "1"]


def test_boxes_come_back_in_the_images_own_pixels():
    outputs = {
        "classes": np.array([[-9.0, 9], [-9, 8], [-9, -9], [-9, 7]]),
        "centre": np.array([9.0, 9, 9, 9]),
        "points": np.array([[28.0, 14, 7], [29, 14, 7], [5, 5, 7], [28, 70, 28]]),
        "distances": np.array([[8.0, 4, 8, 4], [9, 4, 7, 4], [1, 1, 1, 1], [4, 4, 4, 4]]),
        "canvas": np.array([56.0, 56]),
    }
    found = detect.results.decode(outputs, (112, 168))
    np.testing.assert_allclose(found.boxes, [[60, 20, 108, 36]])  # the double, the unsure one and one outside are gone
    assert found.labels.tolist() == [1]
    assert found.scores[0] > 0.99


def test_a_box_that_nobody_is_sure_of_is_kept_and_not_printed():
    outputs = {
        "classes": np.array([[9.0, -9], [-9, -2.0]]),
        "centre": np.array([9.0, -2.0]),
        "points": np.array([[14.0, 14, 7], [40, 40, 7]]),
        "distances": np.full((2, 4), 5.0),
        "canvas": np.array([56.0, 56]),
    }
    found = detect.results.decode(outputs, (56, 56))
    assert found.scores.tolist() == [pytest.approx(1, abs=1e-3), pytest.approx(0.119, abs=1e-3)]
    assert [one["label"] for one in detect.results.as_json(found, ("sea", "land"))["objects"]] == ["sea", "land"]
    assert detect.results.as_text(found, ("sea", "land")).split()[2:] == ["sea", "9", "9", "19", "19"]


def test_colours_of_training_images_are_changed(tmp_path):
    Image.new("RGB", (43, 67), (100, 100, 100)).save(tmp_path / "grey.png")
    Image.new("L", (43, 67)).save(tmp_path / "mask.png")
    sample = Sample(str(tmp_path / "grey.png"), b"", SIZE, str(tmp_path / "mask.png"))
    _, processor = encoder(patches=5)
    rngs = [None, *map(np.random.default_rng, range(9))]
    middles = [segment.data.example(sample, processor, rng=rng)["pixels"][35, 35, 0] for rng in rngs]
    assert min(middles[1:]) < middles[0] < max(middles[1:])


def test_an_object_that_is_hardly_seen_is_left_undecided(samples):
    truth = ground_truth((0, 0, 20, 20), 1)
    place = Placement((56, 56), (56, 56), 1, 1, -16, 0)
    _, processor = encoder()
    label = detect.data.targets(Sample("", b"", (56, 56), truth), processor, place)["label"]
    assert (label == 1).sum() == 0
    assert (label == -2).any()


@pytest.mark.parametrize("task", TASKS)
def test_what_is_found_can_be_seen(task, samples, tmp_path):
    classes = ("background", "sea", "land")
    truth = samples[task].target
    if task is segment.TASK:
        labels = segment.data.read_mask(truth)
        prediction = segment.results.Segmentation(np.where(labels == 255, 0, labels), np.ones(SIZE, np.float32))
    else:
        prediction = Detections(truth.boxes, truth.labels, np.array([0.75]), SIZE)
    record = task.results.save_prediction(samples[task].path, prediction, classes, tmp_path / "out")
    task.results.save_all([record], classes, tmp_path)
    with Image.open(tmp_path / "out-overlay.jpg") as overlay:
        assert max(overlay.size) == 448
        shown = np.asarray(overlay.convert("RGB").resize(SIZE[::-1])).astype(int)
    # The colour of the class lies within the box or at its edge, and nowhere outside.
    assert np.abs(shown[5:20] - 40).max() < 30
    assert np.abs(shown[BOX[1] : BOX[3], BOX[0] : BOX[2]] - 220).max() > 60
    if task is segment.TASK:
        with Image.open(tmp_path / "out-mask.png") as mask:
            assert mask.mode == "P"
            np.testing.assert_array_equal(np.asarray(mask), prediction.labels)
        assert (tmp_path / "classes.txt").read_text() == "background\nsea\nland\n"
    else:
        written = json.loads((tmp_path / "predictions.coco.json").read_text())
        assert written["annotations"][0]["bbox"] == [11, 23, 26, 36]


@pytest.mark.parametrize("task", TASKS)
def test_the_card_begins_with_the_worst_images(task, tmp_path):
    """Of a dark image, where all is right, and a light one, where all is wrong."""
    samples, predictions = [], []
    for level in (40, 220):
        path, is_right = str(tmp_path / f"{level}.png"), level == 40
        Image.new("RGB", SIZE[::-1], (level,) * 3).save(path)
        Image.new("L", SIZE[::-1]).save(tmp_path / f"mask-{level}.png")
        if task is segment.TASK:
            samples.append(Sample(path, b"", SIZE, str(tmp_path / f"mask-{level}.png")))
            labels = np.full(SIZE, 0 if is_right else 1, np.uint8)
            predictions.append(segment.results.Segmentation(labels, np.ones(SIZE, np.float32)))
        else:
            there = np.array([BOX], float)
            target = GroundTruth(there, np.array([1]), np.array([False]), areas(there))
            samples.append(Sample(path, b"", SIZE, target))
            boxes = there - (0 if is_right else 11)
            predictions.append(Detections(boxes, np.array([1]), np.array([0.9]), SIZE))
    ((_, name),) = task.results.card(samples, predictions, ("sea", "land"), tmp_path)
    with Image.open(tmp_path / name) as card:
        left, right = np.array_split(np.asarray(card.convert("L"))[:250], 2, axis=1)
    assert np.median(left) > np.median(right) + 30


@pytest.mark.parametrize("task", TASKS)
def test_the_card_shows_truth_and_prediction(task, samples, tmp_path):
    model, processor = encoder(patches=8)
    pixels = mx.array(task.data.example(samples[task], processor, rng=None)["pixels"][None])
    outputs = outputs_of(task, head_of(task, model), model, pixels)
    prediction = task.results.decode({name: np.array(array[0]) for name, array in outputs.items()}, SIZE)
    classes = ("sky", "sea", "land")
    ((_, name),) = task.results.card([samples[task]], [prediction], classes, tmp_path)
    assert (tmp_path / name).stat().st_size > 1000
    _, rows = task.results.score([samples[task]], [prediction], classes)
    assert [row[0] for row in rows] == ["class", *classes]
    assert rows[3][1] == "1"
