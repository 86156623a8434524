"""Hidden patches are dropped before the blocks; the others keep their positions and their order."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import load
from mlx_aimv2.backend import run_blocks
from tests.small_models import FIXED, NATIVE, write_lit

pytestmark = pytest.mark.rounding


def pixels_for(model, count: int = 2) -> mx.array:
    side = model.vision.config.image_size
    height, width = (side, side) if side else (3 * model.vision.config.patch_size, 5 * model.vision.config.patch_size)
    return mx.random.normal((count, height, width, 3), key=mx.random.key(5))


def mask_for(model, pixels: mx.array, hidden: int) -> np.ndarray:
    rows, columns = model.vision.grid(pixels)
    chance = np.random.default_rng(3)
    places = np.arange(rows * columns)
    return np.stack([np.isin(places, chance.permutation(places)[:hidden]) for _ in range(len(pixels))])


@pytest.mark.parametrize("folder", [FIXED, NATIVE])
def test_hidden_patches_are_dropped_and_positions_kept(folder):
    model, _ = load(folder)
    pixels = pixels_for(model)
    mask = mask_for(model, pixels, 3)
    embedded = np.array(model.embed(pixels))
    visible = np.stack([image[~hidden] for image, hidden in zip(embedded, mask, strict=True)])
    np.testing.assert_array_equal(np.array(model.embed(pixels, patch_mask=mx.array(mask))), visible)
    *_, x = run_blocks(model.blocks, mx.array(visible))
    out = model(pixels, patch_mask=mx.array(mask), output_hidden_states=True)
    np.testing.assert_allclose(np.array(out.last_hidden_state), np.array(model.norm(x)), atol=1e-5)
    assert all(state.shape == visible.shape for state in out.hidden_states)


def test_hiding_nothing_changes_nothing():
    model, _ = load(FIXED)
    pixels = pixels_for(model)
    nothing = mx.zeros(mask_for(model, pixels, 0).shape, mx.bool_)
    np.testing.assert_array_equal(
        np.array(model(pixels, patch_mask=nothing).last_hidden_state), np.array(model(pixels).last_hidden_state)
    )


def test_a_hidden_patch_has_no_influence():
    model, _ = load(FIXED)
    pixels = pixels_for(model)
    mask = mask_for(model, pixels, 1)
    patch = model.config.patch_size
    changed = np.array(pixels)
    for image, place in zip(changed, mask.argmax(axis=1), strict=True):
        row, column = divmod(int(place), model.config.image_size // patch)
        image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 7
    vectors = [model.encode_image(mx.array(x), patch_mask=mx.array(mask)) for x in (pixels, changed)]
    np.testing.assert_array_equal(np.array(vectors[0]), np.array(vectors[1]))
    assert not np.allclose(np.array(model.encode_image(mx.array(changed))), np.array(model.encode_image(pixels)))


def test_the_lit_model_hides_patches_too(tmp_path):
    model, _ = load(write_lit(tmp_path / "lit"))
    pixels = pixels_for(model)
    mask = mx.array(mask_for(model, pixels, 4))
    vector = model.encode_image(pixels, patch_mask=mask)
    assert vector.shape == (2, 19)
    pooled = model.vision(pixels, patch_mask=mask).pooler_output
    np.testing.assert_allclose(np.array(vector), np.array(model.visual_projection(pooled)), rtol=1e-5)
    ids = mx.array([[3, 30], [4, 30]])
    np.testing.assert_allclose(
        np.array(model(pixels, ids, patch_mask=mask).image_embeds),
        np.array(model.encode_image(pixels, patch_mask=mask, normalize=True)),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mask: mask[:1], r"patch_mask must be bool \(images, patches\) = \(2, \d+\), .*; got bool \(1, \d+\)"),
        (lambda mask: mask.astype(np.float32), "got float32"),
        (lambda mask: mask[:, :-1], "must be bool"),
        (lambda mask: mask.tolist(), "must be an array of bool .*, got list"),
        (lambda mask: np.ones_like(mask), "hides all .* patches: leave at least one"),
        (lambda mask: np.concatenate([mask[:1], np.zeros_like(mask[1:])]), "number of patches in each image, got 0"),
    ],
)
def test_a_wrong_mask_is_told(change, words):
    model, _ = load(FIXED)
    pixels = pixels_for(model)
    wrong = change(mask_for(model, pixels, 2))
    with pytest.raises(ValueError, match=words):
        model(pixels, patch_mask=mx.array(wrong) if isinstance(wrong, np.ndarray) else wrong)
