"""The pre-training objective: prefix attention, outputs that see nothing of what they predict, the losses' values."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import layers
from mlx_aimv2.backend import x86
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.pretrain.generate import Steps
from mlx_aimv2.pretrain.objective import (
    Batch,
    DecoderConfig,
    Pretraining,
    draw_lengths,
    drawable,
    image_loss,
    initialise,
    is_counted,
    prefix_mask,
    text_loss,
)

pytestmark = pytest.mark.rounding

VISION = Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5)
DECODER = DecoderConfig(26, 17, 2, 2, vocab_size=31, max_position_embeddings=11)
PATCHES = 9
EOS = 1
IDS = [[0, 5, 7, 29, EOS], [0, 3, EOS, EOS, EOS], [0, 11, 12, EOS, EOS]]


@pytest.fixture
def model():
    made = Pretraining(VISION, DECODER, eos=EOS)
    initialise(made, 1, seed=3)
    return made


@pytest.fixture
def batch():
    chance = np.random.default_rng(5)
    pixels = chance.normal(size=(3, 15, 15, 3)).astype(np.float32)
    return Batch(mx.array(pixels), mx.array(IDS), mx.array([1, 4, 8]))


def changed(batch, image, patch):
    """The batch with other pixels in one patch of one image."""
    pixels = np.array(batch.pixels)
    row, column = divmod(patch, 3)
    pixels[image, row * 5 : row * 5 + 5, column * 5 : column * 5 + 5] += 3
    return Batch(mx.array(pixels), batch.ids, batch.lengths)


def test_lengths_are_drawn_from_one_to_all_patches_but_one():
    found = draw_lengths(2000, 7, np.random.default_rng(2))
    counts = np.bincount(found, minlength=8)
    assert counts[0] == counts[7] == 0 and counts[1:7].min() > 250


def test_an_image_of_one_patch_has_no_prefix():
    with pytest.raises(ValueError, match="at least two"):
        draw_lengths(3, 1, np.random.default_rng(2))


def test_the_prefix_is_seen_by_all_and_the_rest_by_what_follows():
    mask = np.array(prefix_mask(mx.array([2]), 5))[0].astype(int)
    assert mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("patch", range(1, PATCHES))
@pytest.mark.parametrize("image", range(3))
def test_features_change_only_from_the_changed_patch_on(model, batch, image, patch):
    mask = prefix_mask(batch.lengths, PATCHES)
    before = np.array(model.encoder(batch.pixels, mask=mask).last_hidden_state)
    after = np.array(model.encoder(changed(batch, image, patch).pixels, mask=mask).last_hidden_state)
    moved = np.abs(after - before).max(axis=-1) > 1e-6
    in_prefix = patch < int(batch.lengths[image].item())
    expected = np.zeros((3, PATCHES), bool)
    expected[image] = True if in_prefix else np.arange(PATCHES) >= patch
    assert (moved == expected).all()


@pytest.mark.parametrize("image", range(3))
def test_no_counted_prediction_depends_on_the_patch_it_predicts(model, batch, image):
    before = np.array(model.predict(batch)[0])
    for patch in range(int(batch.lengths[image].item()), PATCHES):
        after = np.array(model.predict(changed(batch, image, patch))[0])
        assert np.abs(after[image, :patch] - before[image, :patch]).max() < 1e-6
        if patch < PATCHES - 1:
            assert np.abs(after[image, patch:] - before[image, patch:]).max() > 1e-4


def test_no_token_depends_on_itself_and_all_depend_on_the_image(model, batch):
    before = np.array(model.predict(batch)[1])
    ids = np.array(IDS)
    for place in range(1, 4):
        other = ids.copy()
        other[:, place] = 17
        after = np.array(model.predict(Batch(batch.pixels, mx.array(other), batch.lengths))[1])
        assert np.abs(after[:, :place] - before[:, :place]).max() < 1e-6
        assert np.abs(after[:, place:] - before[:, place:]).max() > 1e-4
    after = np.array(model.predict(changed(batch, 1, PATCHES - 1))[1])
    assert np.abs(after[1] - before[1]).max(axis=-1).min() > 1e-6


def test_the_losses_are_those_of_an_independent_computation(model, batch):
    patches, tokens = (np.array(x, np.float64) for x in model.predict(batch))
    pixels = np.array(batch.pixels, np.float64)
    for image in range(3):
        errors, entropies = [], []
        for i in range(int(batch.lengths[image].item()), PATCHES):
            row, column = divmod(i, 3)
            target = pixels[image, row * 5 : row * 5 + 5, column * 5 : column * 5 + 5].reshape(-1)
            target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((patches[image, i - 1] - target) ** 2).mean())
        for t, wanted in enumerate(IDS[image][1:]):
            logits = tokens[image, t]
            entropies.append(np.log(np.exp(logits).sum()) - logits[wanted])
            if wanted == EOS:
                break
        found = [float(each[image].item()) for each in model(batch)]
        assert found == pytest.approx([np.mean(errors), np.mean(entropies)], abs=1e-5)


def steps_of(model, batch, length):
    """Predictions of patches and tokens, each computed when it is its turn."""
    patches, steps = layers.patches_of(batch.pixels, 5), Steps(model, (3, 3))
    parts = [patches[:, :length], *(patches[:, i : i + 1] for i in range(length, PATCHES))]
    predicted = mx.concatenate([steps.patches(part) for part in parts], axis=1)[:, :-1]
    tokens = [steps.tokens(batch.ids[:, t : t + 1]) for t in range(batch.ids.shape[1] - 1)]
    return patches, predicted, mx.concatenate(tokens, axis=1)


@pytest.mark.parametrize("generative", [False, True])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("length", [1, 4, 8])
def test_step_by_step_through_the_caches_the_losses_are_those_of_training(batch, length, native, generative):
    vision = replace(VISION, hidden_size=24, image_size=None, is_native=True) if native else VISION
    model = Pretraining(vision, DECODER, eos=EOS, generative=generative)
    initialise(model, 1, seed=3)
    patches, predicted, tokens = steps_of(model, batch, length)
    lengths, targets = mx.array([length] * 3), batch.ids[:, 1:]
    found = image_loss(predicted, patches, lengths), text_loss(tokens, targets, is_counted(targets, EOS))
    for one, other in zip(found, model(Batch(batch.pixels, batch.ids, lengths)), strict=True):
        assert mx.abs(one - other).max().item() < 1e-5


def test_a_generative_model_learns_what_normalising_takes_from_a_patch_beside(batch):
    patches, lengths = layers.patches_of(batch.pixels, 5), batch.lengths
    mean, deviation = patches.mean(axis=-1, keepdims=True), mx.std(patches, axis=-1, keepdims=True, ddof=1)
    own = mx.concatenate([(patches - mean) / deviation, mean, deviation], axis=-1)[:, 1:]
    assert mx.abs(drawable(own) - patches[:, 1:]).max().item() < 1e-5
    assert image_loss(own, patches, lengths).max().item() < 1e-5
    off = own + mx.array([0.0] * 75 + [0.3, 0.4])
    np.testing.assert_allclose(np.array(image_loss(off, patches, lengths)), 0.25, rtol=1e-4)
    np.testing.assert_allclose(image_loss(off[..., :-2], patches, lengths), 0, atol=1e-5)


def test_alpha_weighs_the_image_loss(model, batch):
    total, image, text = (float(x.item()) for x in model.losses(batch).values())
    assert total == pytest.approx(text + 0.4 * image, abs=1e-6)
    assert float(model.losses(batch, 0.0)["loss"].item()) == pytest.approx(text, abs=1e-6)


def test_patches_are_cut_row_by_row():
    pixels = mx.arange(2 * 6 * 9 * 2).reshape(2, 6, 9, 2)
    patches = np.array(layers.patches_of(pixels, 3))
    assert patches.shape == (2, 6, 18)
    assert (patches[1, 4] == np.array(pixels)[1, 3:6, 3:6].reshape(-1)).all()


@pytest.mark.parametrize("chunk", [1 << 19, 14])
def test_a_mask_means_the_same_on_both_paths(monkeypatch, chunk):
    monkeypatch.setattr(x86, "CHUNK", chunk)
    chance = np.random.default_rng(4)
    q, k, v = (mx.array(chance.normal(size=(3, 2, 7, 5)).astype(np.float32)) for _ in range(3))
    mask = prefix_mask(mx.array([1, 3, 6]), 7)
    plain = np.array(layers.attention(q, k, v, mask=mask))
    assert np.abs(np.array(x86.attention(q, k, v, mask=mask)) - plain).max() < 1e-5
    assert np.abs(np.array(layers.attention(q, k, v)) - plain).max() > 1e-2


def test_a_mask_of_all_is_full_attention(model, batch):
    everything = mx.ones((3, PATCHES, PATCHES), mx.bool_)
    masked = np.array(model.encoder(batch.pixels, mask=everything).last_hidden_state)
    assert np.abs(masked - np.array(model.encoder(batch.pixels).last_hidden_state)).max() < 1e-5


def test_weights_start_as_wide_as_their_inputs_ask():
    """What a block writes is the smaller the more blocks write; tables are 0.02 wide."""
    made = Pretraining(VISION, DECODER, eos=EOS)
    initialise(made, 2, seed=3)
    block = made.encoder.blocks[1]
    for weight, spread in (
        (block.mlp.up.weight, 22**-0.5),
        (block.mlp.down.weight, 13**-0.5 / 2),
        (block.attn.proj.weight, 22**-0.5 / 2),
        (made.encoder.pos_embed, 0.02),
        (made.decoder.token_embed.weight, 0.02),
    ):
        assert np.array(weight).std() == pytest.approx(spread, rel=4 / (2 * weight.size) ** 0.5)


def test_the_place_of_a_token_counts(model, batch):
    before = np.array(model.predict(batch)[1])
    model.decoder.pos_embed = model.decoder.pos_embed[::-1]
    assert np.abs(np.array(model.predict(batch)[1]) - before).max() > 1e-3


def test_the_same_seed_makes_the_same_weights():
    made = [Pretraining(VISION, DECODER, eos=EOS) for _ in range(3)]
    for model, seed in zip(made, (3, 3, 4), strict=True):
        initialise(model, 2, seed=seed)
    first, again, other = (np.array(model.encoder.blocks[1].mlp.down.weight) for model in made)
    assert (first == again).all() and (first != other).all()
