"""FCOS's targets and losses are those of the paper, and no position is without an answer."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2.learn.detect import head as fcos

pytestmark = pytest.mark.rounding


def loss(outputs, label, distances):
    return fcos.loss(outputs, {"label": label, "distances": distances})


def assigned(boxes, *, grid=(8, 8), labels=None, crowd=None):
    boxes = np.array(boxes, float).reshape(-1, 4)
    where = fcos.points(grid, 14)
    labels = np.arange(len(boxes)) if labels is None else np.array(labels)
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    return where, *fcos.assign(where, boxes, labels, crowd)


def test_points_are_the_centres_of_every_level():
    where = fcos.points((3, 5), 14)
    assert len(where) == 6 * 10 + 3 * 5 + 2 * 3 + 1 * 2
    assert where[0].tolist() == [3.5, 3.5, 7]
    assert where[11].tolist() == [10.5, 10.5, 7]
    assert where[60 + 5 + 1].tolist() == [21, 21, 14]
    assert where[-1].tolist() == [84, 28, 56]


def test_distances_lead_from_a_position_to_its_box():
    where, label, distances = assigned([[20, 24, 51, 61]])
    answers = label == 0
    assert answers.any()
    found = np.concatenate([where[:, :2] - distances[:, :2], where[:, :2] + distances[:, 2:]], axis=1)[answers]
    np.testing.assert_allclose(found, np.tile([20, 24, 51, 61], (answers.sum(), 1)), atol=1e-4)
    assert (label[~answers] == fcos.NOTHING).all()
    assert (distances[~answers] == 0).all()


def test_only_positions_near_the_centre_answer():
    where, label, _ = assigned([[3, 3, 55, 55]])
    away = np.abs(where[label == 0, :2] - 29).max(axis=1)
    assert (away < 1.5 * where[label == 0, 2]).all()


@pytest.mark.parametrize(("side", "stride"), [(31, 7), (130, 14), (280, 28), (500, 56)])
def test_larger_objects_belong_to_coarser_levels(side, stride):
    where, label, _ = assigned([[5, 5, 5 + side, 5 + side]], grid=(41, 43))
    assert set(where[label == 0, 2]) == {stride}


def test_of_two_objects_the_smaller_one_has_the_position():
    where, label, _ = assigned([[10, 10, 66, 66], [30, 30, 46, 46]])
    inside = (np.abs(where[:, :2] - 38).max(axis=1) < 8) & (where[:, 2] == 7)
    assert (label[inside] == 1).all()


def test_a_box_between_all_positions_still_has_one():
    _, label, distances = assigned([[8, 8, 9, 9]])
    assert (label == 0).sum() == 1
    assert (distances >= 0).all()


def test_within_a_crowd_nothing_is_decided():
    where, label, _ = assigned([[0, 0, 56, 56], [70, 70, 100, 100]], crowd=[True, False])
    inside = (where[:, :2] < 56).all(axis=1)
    assert (label[inside] == fcos.UNDECIDED).all()
    assert (label == 1).any()
    assert not (label == 0).any()


def test_no_object_gives_nothing_anywhere():
    _, label, distances = assigned([])
    assert (label == fcos.NOTHING).all()
    assert not distances.any()


def test_focal_loss_is_the_papers():
    logits = np.random.default_rng(2).normal(0, 3, (5, 7, 3)).astype(np.float32)
    labels = np.random.default_rng(3).integers(-1, 3, (5, 7))
    p = 1 / (1 + np.exp(-logits.astype(float)))
    wanted = labels[..., None] == np.arange(3)
    truth = np.where(wanted, p, 1 - p)
    weight = np.where(wanted, 0.25, 0.75)
    loss = (-weight * (1 - truth) ** 2 * np.log(truth)).sum(axis=-1)
    np.testing.assert_allclose(np.array(fcos.focal(mx.array(logits), mx.array(labels))), loss, rtol=1e-4, atol=1e-6)


def test_centreness_is_one_in_the_middle_and_zero_at_a_side():
    got = fcos.centreness(mx.array([[5.0, 7, 5, 7], [0, 7, 10, 7], [2, 3, 8, 12]]))
    np.testing.assert_allclose(np.array(got), [1, 0, math.sqrt(2 / 8 * 3 / 12)], atol=1e-6)


def outputs(seed=0, batch=3, positions=11, classes=5):
    keys = mx.random.split(mx.random.key(seed), 3)
    return {
        "classes": mx.random.normal((batch, positions, classes), key=keys[0]),
        "distances": mx.exp(mx.random.normal((batch, positions, 4), key=keys[1])) * 10,
        "centre": mx.random.normal((batch, positions), key=keys[2]),
    }


def test_an_images_loss_does_not_depend_on_the_batch():
    found = outputs()
    label = mx.array(np.random.default_rng(1).integers(-2, 5, (3, 11)))
    distances = mx.array(np.random.default_rng(2).uniform(1, 9, (3, 11, 4)).astype(np.float32))
    whole = loss(found, label, distances)
    alone = [
        loss({k: v[i : i + 1] for k, v in found.items()}, label[i : i + 1], distances[i : i + 1]) for i in range(3)
    ]
    np.testing.assert_allclose(np.array(whole), np.array(mx.concatenate(alone)), rtol=1e-6)


def test_gradients_are_finite_where_no_object_is():
    found = outputs()
    label = mx.full((3, 11), fcos.NOTHING)
    gradient = mx.grad(lambda d: loss({**found, "distances": d}, label, mx.zeros((3, 11, 4))).sum())
    assert not np.array(gradient(found["distances"])).any()
    gradient = mx.grad(lambda c: loss({**found, "centre": c}, label, mx.zeros((3, 11, 4))).sum())
    assert not np.array(gradient(found["centre"])).any()


def test_a_box_is_learned_though_it_is_seen_from_its_edge_alone():
    """As one is that is too small to hold any position."""
    found, label = outputs(), mx.zeros((3, 11), mx.int32)
    distances = mx.broadcast_to(mx.array([0.0, 3, 5, 4]), (3, 11, 4))
    gradient = mx.grad(lambda d: loss({**found, "distances": d}, label, distances).sum())
    assert (np.abs(np.array(gradient(found["distances"]))).max(axis=2) > 0).all()


def test_what_is_undecided_costs_nothing():
    found, distances = outputs(), mx.zeros((3, 11, 4))
    assert loss(found, mx.full((3, 11), fcos.UNDECIDED), distances).tolist() == [0, 0, 0]
    assert min(loss(found, mx.full((3, 11), fcos.NOTHING), distances).tolist()) > 0.5


def test_the_right_answer_costs_little():
    label = mx.array([[0, -1, 2]])
    distances = mx.array([[[3.0, 5, 3, 5], [0, 0, 0, 0], [7, 2, 7, 2]]])
    right = {
        "classes": mx.array([[[9.0, -9, -9], [-9, -9, -9], [-9, -9, 9]]]),
        "distances": mx.maximum(distances, 1),
        "centre": mx.array([[9.0, -9, 9]]),
    }
    assert loss(right, label, distances).item() < 1e-3
