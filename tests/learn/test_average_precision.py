"""Average precision is COCO's, with every one of its exceptions; nothing is averaged that is not there."""

import contextlib
import io

import numpy as np
import pytest

from mlx_aimv2.learn.detect.boxes_average_precision import Detections, GroundTruth, areas, summary

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def ground_truth(boxes, labels, crowd=(False, False)):
    return GroundTruth(boxes, labels, np.array(crowd), areas(boxes))


def detections(boxes, labels, scores):
    return Detections(boxes, labels, scores, (200, 200))


def random_boxes(rng, count):
    corner = rng.uniform(0, 200, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(3, 150, (count, 2))], axis=1).round(2)


def random_case(seed, classes=3, images=3):
    """Images with objects, some crowds, results near them and elsewhere, with ties among scores and overlaps."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(images):
        count = int(rng.integers(0, 7))
        boxes = random_boxes(rng, count)
        labels = rng.integers(0, classes, count)
        area = areas(boxes) * rng.uniform(0.4, 1, count)
        truths.append(GroundTruth(boxes, labels, rng.random(count) < 0.2, area))
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, 4, (2 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        results = np.concatenate([near, boxes, boxes[:1], random_boxes(rng, int(rng.integers(0, 130)))])
        kinds = np.concatenate([np.repeat(labels, 2), labels, labels[:1], rng.integers(0, classes, len(results))])
        found.append(detections(results, kinds[: len(results)], rng.random(len(results)).round(1)))
    return truths, found


def by_pycocotools(truths, found, classes):
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    annotations, results = [], []
    for image, (truth, result) in enumerate(zip(truths, found, strict=True)):
        for box, label, crowd, area in zip(truth.boxes, truth.labels, truth.crowd, truth.area, strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image + 1, "category_id": int(label) + 1, "bbox": xywh(box)}
                | {"iscrowd": int(crowd), "area": float(area)}
            )
        for box, label, score in zip(result.boxes, result.labels, result.scores, strict=True):
            results.append(
                {"image_id": image + 1, "category_id": int(label) + 1, "bbox": xywh(box), "score": float(score)}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco()
        data.dataset = {
            "images": [{"id": n + 1} for n in range(len(truths))],
            "categories": [{"id": n + 1} for n in range(classes)],
            "annotations": annotations,
        }
        data.createIndex()
        run = evaluation(data, data.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats[:6]


def xywh(box):
    return [float(n) for n in (box[0], box[1], box[2] - box[0], box[3] - box[1])]


def compare(seeds):
    for seed in seeds:
        truths, found = random_case(seed)
        if not sum(len(result.boxes) for result in found):
            continue
        own, _ = summary(truths, found, 3)
        wanted = by_pycocotools(truths, found, 3)
        np.testing.assert_allclose(np.nan_to_num([own[n] for n in NAMES], nan=-1), wanted, atol=1e-6, err_msg=str(seed))


def test_it_is_pycocotools_on_some_random_sets():
    compare(range(7))


@pytest.mark.slow
def test_it_is_pycocotools_on_two_hundred_random_sets():
    compare(range(200))


def test_a_perfect_result_has_one_and_none_has_zero():
    boxes, labels = np.array([[3.0, 5, 20, 31], [40, 2, 90, 97]]), np.array([0, 1])
    nothing = detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    full, _ = summary([ground_truth(boxes, labels)], [detections(boxes, labels, np.array([0.9, 0.2]))], 2)
    assert (full["ap"], full["ap_small"], full["ap_medium"]) == pytest.approx((1, 1, 1))
    assert np.isnan(full["ap_large"])
    assert summary([ground_truth(boxes, labels)], [nothing], 2)[0]["ap"] == 0.0


def test_half_of_the_objects_found_is_half_of_the_recalls():
    boxes, labels = np.array([[3.0, 5, 20, 31], [40, 2, 90, 97]]), np.zeros(2, int)
    got, _ = summary([ground_truth(boxes, labels)], [detections(boxes[:1], labels[:1], np.ones(1))], 1)
    assert got["ap50"] == pytest.approx(51 / 101)


def test_a_box_within_a_crowd_is_neither_right_nor_wrong():
    boxes, labels = np.array([[0.0, 0, 100, 100], [110, 5, 131, 37]]), np.zeros(2, int)
    inside = np.array([[10.0, 10, 20, 20], [30, 30, 41, 47], boxes[1]])
    found = detections(inside, np.zeros(3, int), np.array([0.9, 0.8, 0.7]))
    assert summary([ground_truth(boxes, labels, [True, False])], [found], 1)[0]["ap"] == pytest.approx(1)
    assert summary([ground_truth(boxes, labels)], [found], 1)[0]["ap"] < 0.3
