"""Mean intersection over union is a plain count, and unlabelled pixels count nowhere."""

import numpy as np

from mlx_aimv2.learn.classify.results import accuracy, confusion, mean_recall
from mlx_aimv2.learn.segment.results import iou_by_class, mean_iou, pixel_confusion


def plain(truth, predicted, classes):
    scores = []
    for label in range(classes):
        both = either = 0
        for t, p in zip(truth.ravel(), predicted.ravel(), strict=True):
            if t != 255:
                both += t == label and p == label
                either += t == label or p == label
        if either:
            scores.append(both / either)
    return sum(scores) / len(scores)


def test_it_is_a_plain_count():
    rng = np.random.default_rng(3)
    for _ in range(7):
        truth = rng.choice([0, 1, 2, 4, 255], (11, 13)).astype(np.uint8)
        predicted = rng.choice([0, 1, 2, 3], (11, 13)).astype(np.uint8)
        counts = pixel_confusion(truth[:5], predicted[:5], 7) + pixel_confusion(truth[5:], predicted[5:], 7)
        assert abs(mean_iou(counts) - plain(truth, predicted, 7)) < 1e-12


def test_pixels_are_counted_over_all_images_before_the_ratio_is_taken():
    few, many = np.zeros((1, 2), np.uint8), np.zeros((1, 98), np.uint8)
    wrong = np.ones((1, 2), np.uint8)
    counts = pixel_confusion(few, wrong, 2) + pixel_confusion(many, many, 2)
    assert (mean_iou(counts), accuracy(counts)) == (0.49, 0.98)


def test_a_class_that_is_nowhere_does_not_count():
    truth = np.array([[0, 1, 1, 255]], np.uint8)
    assert mean_iou(pixel_confusion(truth, np.array([[0, 1, 1, 7]], np.uint8), 9)) == 1
    assert np.isnan(iou_by_class(pixel_confusion(truth, truth * 0, 9))[3])


def test_rows_are_the_ground_truth_and_every_class_counts():
    counts = confusion(np.array([0, 255, 0, 1]), np.array([1, 255, 1, 0]), 256)
    assert (counts[255, 255], counts.sum()) == (1, 4)
    counts = pixel_confusion(np.array([[0, 0, 1]]), np.array([[1, 1, 0]]), 3)
    assert counts.tolist() == [[0, 2, 0], [1, 0, 0], [0, 0, 0]]


def test_recall_is_the_mean_over_the_classes_that_there_are():
    assert mean_recall(np.array([[2, 0, 0], [1, 1, 0], [0, 0, 0]])) == 0.75


def test_nothing_labelled_scores_nothing():
    empty = np.full((3, 5), 255, np.uint8)
    counts = pixel_confusion(empty, empty * 0, 2)
    assert (mean_iou(counts), accuracy(counts)) == (0, 0)
