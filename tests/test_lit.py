"""The LiT model reads texts and images as Apple's own code does, and refuses what it cannot read."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2 import Aimv2Model, load
from tests.exact import ALLOWED, NEAR, error, pair, roundings
from tests.small_lit import CONFIG, REFERENCE, small_lit

pytestmark = pytest.mark.rounding

EOS = CONFIG.text_config.eos_token_id


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def inputs(expected) -> tuple[mx.array, mx.array]:
    pixels = mx.array(expected["pixel_values"].transpose(0, 2, 3, 1))
    return pixels, mx.array(expected["input_ids"].astype(np.int32))


def outputs(model: Aimv2Model, pixels: mx.array, ids: mx.array) -> dict[str, mx.array]:
    """Everything that Apple's outputs hold, under their names."""
    pair = model(pixels, ids)
    return {
        "image_pooled": pair.vision_model_output.pooler_output,
        "text_pooled": pair.text_model_output.pooler_output,
        "image_features": model.encode_image(pixels),
        "text_features": model.encode_text(ids),
        "image_embeds": pair.image_embeds,
        "text_embeds": pair.text_embeds,
        "logits_per_image": pair.logits_per_image,
        "logits_per_text": pair.logits_per_text,
    }


def texts(*lengths: int) -> list[list[int]]:
    """Rows of ids that end after so many tokens."""
    dice = np.random.default_rng(3)
    return [[776, *dice.integers(0, 700, length - 2).tolist(), EOS] for length in lengths]


def padded(rows: list[list[int]]) -> mx.array:
    longest = max(map(len, rows))
    return mx.array([row + [EOS] * (longest - len(row)) for row in rows])


def images(count: int) -> mx.array:
    return mx.random.normal((count, 42, 42, 3), key=mx.random.key(5))


def test_every_output_is_apples(inputs, expected):
    model, _ = load(REFERENCE)
    exact = pair(REFERENCE, expected["pixel_values"], expected["input_ids"])
    for name, found in outputs(model, *inputs).items():
        assert found.shape == expected[name].shape
        assert error(found, exact[name]) <= ALLOWED * error(expected[name], exact[name]), name


def test_half_precision_moves_the_logits_by_a_few_of_its_own_roundings(inputs):
    exact = load(REFERENCE)[0](*inputs).logits_per_image
    half = load(REFERENCE, dtype="float16")[0](*inputs).logits_per_image
    assert mx.abs(half - exact).max().item() <= 8 * mx.finfo(mx.float16).eps * 100  # logits are cosines times 100


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_and_unit_vectors_are_float32_and_features_of_the_models_dtype(inputs, dtype):
    model, _ = load(REFERENCE, dtype=dtype)
    found = {name: array.dtype for name, array in outputs(model, *inputs).items()}
    features = ("image_pooled", "text_pooled", "image_features", "text_features")
    assert {found.pop(name) for name in features} == {getattr(mx, dtype)}
    assert set(found.values()) == {mx.float32}
    pixels, ids = inputs
    unit = (model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True))
    assert {array.dtype for array in unit} == {getattr(mx, dtype)}


def test_normalize_gives_the_embeddings_of_the_pair(inputs):
    model, _ = load(REFERENCE)
    pixels, ids = inputs
    output = model(pixels, ids)
    assert roundings(model.encode_image(pixels, normalize=True), output.image_embeds) <= NEAR
    assert roundings(model.encode_text(ids, normalize=True), output.text_embeds) <= NEAR
    assert roundings(mx.linalg.norm(output.text_embeds, axis=1), mx.ones(4)) <= NEAR


def test_shapes():
    pair = small_lit()(images(5), padded(texts(7, 3)))
    assert (pair.image_embeds.shape, pair.text_embeds.shape) == ((5, 29), (2, 29))
    assert (pair.logits_per_image.shape, pair.logits_per_text.shape) == ((5, 2), (2, 5))
    assert pair.vision_model_output.last_hidden_state.shape == (5, 9, 60)
    assert pair.text_model_output.last_hidden_state.shape == (2, 7, 36)


def test_texts_of_unequal_length_give_alone_what_they_give_in_a_batch():
    model, rows = small_lit(), texts(7, 3, 23, 2)
    batch = model.encode_text(padded(rows), normalize=True)
    for row, vector in zip(rows, batch, strict=True):
        assert roundings(model.encode_text(mx.array([row]), normalize=True)[0], vector) <= NEAR


def test_what_follows_the_first_end_of_text_changes_nothing():
    model, (row,) = small_lit(), texts(5)
    words = [[*row, 11, 12, EOS], [*row, 13, EOS, 14]]
    vectors = model.encode_text(mx.array(words))
    assert roundings(vectors[0], vectors[1]) <= NEAR


def test_a_token_sees_what_stands_before_it_and_not_what_follows():
    model, (row,) = small_lit().text_model, texts(9)
    changed = row.copy()
    changed[4] = (row[4] + 1) % 700
    states = [model(mx.array([ids])).last_hidden_state[0] for ids in (row, changed)]
    moved = np.abs(np.array(states[0] - states[1])).max(axis=1) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 5


def test_hidden_states_of_the_text_encoder_begin_with_the_embedding():
    model, ids = small_lit().text_model, mx.array(texts(5))
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert mx.allclose(output.hidden_states[0], model.token_embed.weight[ids] + model.pos_embed[:5])
    assert roundings(model.norm(output.hidden_states[-1]), output.last_hidden_state) <= NEAR
    assert model(ids).hidden_states is None


@pytest.mark.parametrize(
    ("limit", "trained", "used"),
    [(100.0, -1.0, 1.0), (100.0, math.log(7), 7.0), (100.0, math.log(115), 100.0), (13.0, math.log(115), 13.0)],
)
def test_the_scale_of_the_logits_is_held_between_one_and_the_checkpoints_limit(limit, trained, used):
    model = small_lit(replace(CONFIG, max_logit_scale=limit))
    model.logit_scale = mx.array(trained)
    same = mx.eye(29)[:2]
    assert mx.allclose(model.logits(same, same), used * mx.eye(2), rtol=1e-6)


def test_half_precision_logits_are_a_product_in_float32():
    model = small_lit()
    model.set_dtype(mx.float16)
    vectors = mx.random.normal((3, 29), key=mx.random.key(1)).astype(mx.float16)
    wanted = 100 * np.array(vectors).astype(np.float64) @ np.array(vectors).astype(np.float64).T
    assert np.allclose(np.array(model.logits(vectors, vectors)), wanted, rtol=1e-6, atol=1e-4)


def test_the_pooling_head_is_attention_with_one_learned_query_and_a_linear_map_with_bias():
    head = small_lit().vision_model.head
    tokens = np.array(mx.random.normal((2, 9, 60), key=mx.random.key(2))).astype(np.float64)
    weights = {name: np.array(array).astype(np.float64) for name, array in tree_flatten(head.parameters())}
    query = weights["cls_token"].reshape(5, 12)
    keys = (tokens @ weights["k.weight"].T).reshape(2, 9, 5, 12)
    values = (tokens @ weights["v.weight"].T).reshape(2, 9, 5, 12)
    scores = np.einsum("hd,bnhd->bhn", query, keys) / np.sqrt(12)
    shares = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    pooled = np.einsum("bhn,bnhd->bhd", shares, values).reshape(2, 60)
    wanted = pooled @ weights["linear.weight"].T + weights["linear.bias"]
    assert np.allclose(np.array(head(mx.array(tokens.astype(np.float32)))), wanted, atol=1e-5)


WHOLE, TOKENIZED = r"ids must be whole numbers \(texts, length\)", r"mlx array, as processor\.tokenize returns it, got "


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (mx.array([[776, 778, EOS]]), "token id 778 is outside the vocabulary of 778"),
        (mx.array([[776, 9999, EOS]]), "token id 9999 is outside"),
        (mx.array([[776, -1, EOS]]), "token id -1 is outside"),
        (mx.array(texts(24)), "at most 23 tokens per text, got 24"),
        (mx.array([[776, 5, EOS], [776, 5, 6]]), r"no EOS \(id 777\)"),
        (mx.array([1, EOS]), WHOLE),
        (mx.array([[1.0, 777.0]]), WHOLE),
        (mx.zeros((0, 3), mx.int32), WHOLE),
        ("a cat", f"{TOKENIZED}str"),
        (["a cat"], f"{TOKENIZED}list"),
        ([[776, EOS]], f"{TOKENIZED}list"),
    ],
    ids=range(11),
)
def test_ids_that_cannot_be_read_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        small_lit().encode_text(ids)


def test_a_vocabulary_and_an_end_of_text_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"eos_token_id 777 does not fit a vocabulary of 777"):
        replace(CONFIG.text_config, vocab_size=777)


def test_images_without_texts_are_told_what_gives_their_features():
    with pytest.raises(TypeError, match=r"model\.vision\(pixels\) gives the tokens"):
        small_lit()(mx.zeros((1, 42, 42, 3)))
