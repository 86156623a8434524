"""A pooling takes the hidden state and the mean, head, tokens or map that it names."""

import numpy as np
import pytest

from mlx_aimv2.embed.encode import embed
from tests.image_files import image

pytestmark = pytest.mark.rounding


def test_lit_gives_what_texts_are_compared_with(folder, lit):
    model, processor = lit
    one = next(iter(embed([folder / "3.png"], model, processor)))
    wanted = np.array(model.encode_image(processor([one.path]))[0])
    np.testing.assert_allclose(one.vector, wanted, rtol=1e-4, atol=1e-4)
    assert one.vector.shape == (model.config.projection_dim,)


def test_tokens_and_maps_are_the_last_hidden_state(folder, native):
    model, processor = native
    image(folder / "wide.png", (14 * 12 + 5, 14 * 11 + 3))
    pixels = processor([folder / "wide.png"])
    wanted = np.array(model(pixels).last_hidden_state[0])
    (tokens,) = embed([folder / "wide.png"], model, processor, pool="tokens")
    (grid,) = embed([folder / "wide.png"], model, processor, pool="map")
    np.testing.assert_allclose(tokens.vector, wanted, rtol=1e-4, atol=1e-4)
    assert grid.vector.shape == (11, 12, 64)
    np.testing.assert_array_equal(grid.vector[3, 7], tokens.vector[3 * 12 + 7])


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_a_layer_is_transformers_hidden_state_as_it_is(folder, fixed, layer):
    model, processor = fixed
    pixels = processor([folder / "0.png"])
    state = model(pixels, output_hidden_states=True).hidden_states[layer]
    for norm, wanted in ((False, state), (True, model.norm(state))):
        (one,) = embed([folder / "0.png"], model, processor, pool="tokens", layer=layer, norm=norm)
        np.testing.assert_allclose(one.vector, np.array(wanted[0]), rtol=1e-4, atol=1e-4)


def test_the_last_layer_with_the_norm_is_the_default(folder, fixed):
    (plain,) = embed([folder / "0.png"], *fixed)
    (explicit,) = embed([folder / "0.png"], *fixed, pool="mean", layer=-1, norm=True)
    np.testing.assert_array_equal(plain.vector, explicit.vector)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "cls"}, "mean, head, tokens, map"),
        ({"pool": "head"}, "no pooling head"),
        ({"layer": 4}, "-4 to 3"),
        ({"layer": -5}, "-4 to 3"),
        ({"norm": True}, "needs a layer"),
        ({"max_patches": 0}, "at least 1"),
    ],
)
def test_settings_that_the_model_does_not_support_are_refused(folder, fixed, settings, message):
    with pytest.raises(ValueError, match=message):
        list(embed([folder], *fixed, **settings))


def test_the_head_reads_the_last_layer_only(folder, lit):
    with pytest.raises(ValueError, match="last layer"):
        list(embed([folder], *lit, pool="head", layer=-2))
