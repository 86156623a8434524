"""Overlaps, distances and suppression of boxes equal their definitions."""

import mlx.core as mx
import numpy as np

from mlx_aimv2.learn.detect import boxes_average_precision as boxes
from mlx_aimv2.learn.detect.head import giou_of_distances


def random_boxes(seed, count):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 40, (count, 2))], axis=1)


def test_overlap_counts_the_pixels_of_whole_boxes():
    first, second = np.array([[2, 3, 13, 19]]), np.array([[7, 5, 23, 17], [13, 3, 20, 19], [2, 3, 13, 19]])
    canvas = np.zeros((4, 31, 31), bool)
    for layer, (left, top, right, bottom) in zip(canvas, [*first, *second], strict=True):
        layer[top:bottom, left:right] = True
    wanted = [(canvas[0] & other).sum() / (canvas[0] | other).sum() for other in canvas[1:]]
    np.testing.assert_allclose(boxes.overlaps(first, second)[0], wanted)


def test_within_a_crowd_the_own_area_counts():
    box, crowd = np.array([[5.0, 5, 9, 11]]), np.array([[0.0, 0, 50, 50]])
    assert boxes.overlaps(box, crowd, crowd=np.array([True]))[0, 0] == 1
    assert boxes.overlaps(box, crowd)[0, 0] == 24 / 2500


def test_boxes_without_area_overlap_nothing():
    line = np.array([[5.0, 5, 5, 11]])
    assert boxes.overlaps(line, line)[0, 0] == 0


def test_giou_of_distances_is_that_of_the_boxes():
    rng = np.random.default_rng(5)
    point, sides = np.array([31.0, 37.0]), rng.uniform(1, 20, (2, 7, 4))
    first, second = (np.concatenate([point - s[:, :2], point + s[:, 2:]], axis=1) for s in sides)
    hull = np.concatenate([np.minimum(first, second)[:, :2], np.maximum(first, second)[:, 2:]], axis=1)
    iou = np.diag(boxes.overlaps(first, second))
    union = (boxes.areas(first) + boxes.areas(second)) / (1 + iou)
    wanted = iou - (boxes.areas(hull) - union) / boxes.areas(hull)
    got = np.array(giou_of_distances(mx.array(sides[0]), mx.array(sides[1])))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_suppression_keeps_the_best_of_each_heap_and_class():
    heap = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 1, 10, 11], [50, 50, 60, 63]])
    scores, labels = np.array([0.5, 0.9, 0.7, 0.1]), np.array([0, 0, 1, 0])
    assert boxes.suppress(heap, scores, labels).tolist() == [1, 2, 3]
    assert boxes.suppress(heap, scores, labels * 0).tolist() == [1, 3]
    assert boxes.suppress(heap, scores, labels, threshold=0.95).tolist() == [1, 2, 0, 3]


def test_what_was_suppressed_suppresses_nothing():
    row = np.array([[0.0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]])  # neighbours overlap, the ends hardly
    assert boxes.suppress(row, np.array([0.9, 0.8, 0.7]), np.zeros(3, int), threshold=0.4).tolist() == [0, 2]


def test_of_equal_scores_the_first_stays():
    twins = np.repeat(random_boxes(2, 1), 3, axis=0)
    assert boxes.suppress(twins, np.full(3, 0.5), np.zeros(3, int)).tolist() == [0]


def test_suppressing_nothing_gives_nothing():
    assert boxes.suppress(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)).tolist() == []
