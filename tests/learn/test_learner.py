"""The encoder as it is trained: blocks are skipped for some of the images, and on average nothing changes by that."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel
from mlx_aimv2.backend import run_blocks
from mlx_aimv2.learn.learner import run_training_blocks

pytestmark = pytest.mark.rounding


def test_later_blocks_are_skipped_more_often_and_add_the_more_where_they_are_not():
    """Of two blocks the first one is never skipped and the second one for half of the images."""
    blocks = Aimv2VisionModel(Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5)).blocks
    x = mx.broadcast_to(mx.random.normal((1, 9, 22), key=mx.random.key(1)), (13, 9, 22))
    first, second = (np.array(states[0]) for states in run_blocks(blocks, x))
    rows = np.array(run_training_blocks(blocks, x, checkpoint=False, drop_path=0.5, key=mx.random.key(2)))
    near = 1e-4 * np.abs(second).max()
    skipped = [np.abs(row - first).max() < near for row in rows]
    doubled = [np.abs(row - (2 * second - first)).max() < near for row in rows]
    assert np.logical_xor(skipped, doubled).all()
    assert 6 <= sum(skipped) <= 7


def test_each_block_is_skipped_for_images_of_its_own():
    """There are images that skip the second of three blocks and not the third, though that is skipped more often."""
    blocks = Aimv2VisionModel(Aimv2VisionConfig(22, 13, 3, 2, image_size=15, patch_size=5)).blocks
    x = mx.broadcast_to(mx.random.normal((1, 9, 22), key=mx.random.key(1)), (33, 9, 22))
    first, _, _ = (np.array(states) for states in run_blocks(blocks, x))
    (third,) = run_blocks(blocks[2:], mx.array(first))
    wanted = 2 * np.array(third)[0] - first[0]
    rows = np.array(run_training_blocks(blocks, x, checkpoint=False, drop_path=0.5, key=mx.random.key(2)))
    assert any(np.abs(row - wanted).max() < 1e-4 * np.abs(wanted).max() for row in rows)


def test_of_an_odd_number_of_images_now_one_more_and_now_one_less_is_skipped():
    blocks = Aimv2VisionModel(Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5)).blocks
    x = mx.random.normal((5, 9, 22), key=mx.random.key(1))
    first, _ = (np.array(states) for states in run_blocks(blocks, x))
    keys = [mx.random.key(number) for number in range(9)]
    rows = [np.array(run_training_blocks(blocks, x, checkpoint=False, drop_path=0.5, key=key)) for key in keys]
    near = 1e-4 * np.abs(first).max()
    assert {int((np.abs(one - first).max(axis=(1, 2)) < near).sum()) for one in rows} == {2, 3}
