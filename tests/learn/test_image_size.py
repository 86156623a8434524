"""An encoder at another image size: its positions are resampled as torch does it, everything else stays."""

import mlx.core as mx
import numpy as np
import pytest
from small_models import FIXED, NATIVE

from mlx_aimv2 import load
from mlx_aimv2.learn.image_size import at_size, cubic_weights, resample


def test_resampling_to_the_same_grid_changes_nothing():
    table = mx.random.normal((3 * 5, 7), key=mx.random.key(1))
    np.testing.assert_allclose(np.array(resample(table, (3, 5), (3, 5))), np.array(table), atol=1e-6)


@pytest.mark.slow
def test_resampling_is_torchs_bicubic():
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(3).normal(size=(3, 5, 7)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None], (11, 13), mode="bicubic", align_corners=False
    )[0].permute(1, 2, 0)
    got = resample(mx.array(table.reshape(15, 7)), (3, 5), (11, 13))
    np.testing.assert_allclose(np.array(got), wanted.reshape(-1, 7).numpy(), atol=1e-5)


def test_rows_and_columns_keep_their_places():
    row, column = np.mgrid[0:4, 0:6]
    table = mx.array(np.stack([row, column], axis=2).reshape(24, 2).astype(np.float32))
    got = np.array(resample(table, (4, 6), (8, 6))).reshape(8, 6, 2)
    np.testing.assert_allclose(got[2:6, 3, 0], [0.75, 1.25, 1.75, 2.25], atol=0.1)
    np.testing.assert_allclose(got[3, :, 1], np.arange(6), atol=1e-5)


def test_cubic_weights_add_up_to_one():
    np.testing.assert_allclose(cubic_weights(5, 17).sum(axis=1), 1, atol=1e-6)


def test_a_fixed_encoder_takes_the_new_size_and_the_old_one_stays():
    model, processor = load(FIXED)
    own, patch = model.config.image_size, model.config.patch_size
    side = own + 2 * patch
    larger, resized = at_size(model.vision, processor, side)
    image = np.zeros((own, 2 * own, 3), np.uint8)
    assert larger(resized(image)).last_hidden_state.shape[1] == (side // patch) ** 2
    assert larger.blocks[0].attn.qkv.weight.tolist() == model.blocks[0].attn.qkv.weight.tolist()
    assert model(processor(image)).last_hidden_state.shape[1] == (own // patch) ** 2


def test_the_own_size_changes_nothing():
    model, processor = load(FIXED)
    for size in (None, model.config.image_size):
        assert at_size(model.vision, processor, size) == (model.vision, processor)


def test_whole_images_are_stretched_and_others_cut():
    model, processor = load(FIXED)
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 255
    image[:, :2] = 255
    _, whole = at_size(model.vision, processor, None, whole=True)
    cut, all_of_it = (p.pixels(image)[5, 0].mean() for p in (processor, whole))
    assert cut < 0 < all_of_it


def test_a_native_encoder_gets_a_square():
    model, processor = load(NATIVE)
    same, resized = at_size(model.vision, processor, 6 * model.config.patch_size, whole=True)
    assert same is model.vision
    assert resized.preprocessing.final_size == (6 * model.config.patch_size,) * 2
    assert at_size(model.vision, processor, None, whole=True)[1].preprocessing.final_size[0] in range(434, 449)


@pytest.mark.parametrize("size", [1, 57, 10**6])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_one_that_is(size):
    model, processor = load(FIXED)
    with pytest.raises(ValueError, match=r"--image-size must be a multiple of the patch of \d+ pixels.* take \d+"):
        at_size(model.vision, processor, size)
