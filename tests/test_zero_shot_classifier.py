"""Labels, templates and images become the right probabilities, once and in batches, for any number of images."""

import math
import os
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import ZeroShotClassifier, load, zero_shot
from tests.exact import NEAR, roundings
from tests.small_lit import GOLDEN

pytestmark = pytest.mark.rounding

LABELS = ["cat", "dog", "red fox"]
VISION_ONLY = GOLDEN / "reference" / "fixed"


@pytest.fixture
def by_hand(lit_pair, monkeypatch):
    """The lit_pair with vectors that a test gives: {text: vector} and one vector for every image."""
    model, processor = lit_pair

    def give(texts: dict[str, list[float]], image: list[float]) -> None:
        def widened(vector: list[float]) -> list[float]:
            return [*vector, *[0.0] * (29 - len(vector))]

        table = {tuple(processor.tokenize(text)[0].tolist()): widened(vector) for text, vector in texts.items()}

        def encode_text(ids: mx.array) -> mx.array:
            return mx.array([table[tuple(row[: row.index(777) + 1])] for row in ids.tolist()])

        monkeypatch.setattr(model, "encode_text", encode_text, raising=False)
        monkeypatch.setattr(model, "encode_image", lambda pixels: mx.array([widened(image)] * len(pixels)))

    return give


# --- what comes out


def test_logits_are_those_of_the_pair_and_probabilities_their_softmax(lit_pair, noise_images):
    model, processor = lit_pair
    ids = processor.tokenize([f"a photo of a {label}" for label in LABELS])
    wanted = np.array(model(processor(noise_images), ids).logits_per_image)
    found = zero_shot(model, processor, noise_images, LABELS)
    assert len(found) == 5 and found[0].labels == tuple(LABELS)
    assert roundings([prediction.logits for prediction in found], wanted) <= NEAR
    shares = np.exp(wanted - wanted.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    assert roundings([prediction.probabilities for prediction in found], shares) <= 100 * NEAR  # logits reach 100
    assert [prediction.label for prediction in found] == [LABELS[i] for i in wanted.argmax(axis=1)]


def test_hand_made_cosines_give_hand_made_numbers(lit_pair, by_hand, noise_images):
    by_hand({"a photo of a cat": [0, 5], "a photo of a dog": [2, 0]}, [0.06, 0.08])
    (found,) = zero_shot(*lit_pair, noise_images[0], ["cat", "dog"])
    assert np.allclose(found.logits, [80, 60], atol=1e-3)  # the scale of 115 is held at 100
    assert math.isclose(found.probabilities[1], math.exp(-20) / (1 + math.exp(-20)), rel_tol=1e-4)
    assert (found.label, found.top(1)) == ("cat", [("cat", float(found.probabilities[0]))])


def test_templates_are_averaged_as_unit_vectors_and_the_mean_is_made_one(lit_pair, by_hand, noise_images):
    texts = {"a cat": [30, 0], "two cat": [0, 0.1], "a dog": [0, 0, 9], "two dog": [0, 0, 4]}
    by_hand(texts, [1, 0])
    classifier = ZeroShotClassifier(*lit_pair, ["cat", "dog"], templates=["a {}", "two {}"])
    assert np.allclose(np.array(classifier.text_embeds)[:, :3], [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]])
    (found,) = classifier(noise_images[:1])
    assert np.allclose(found.logits, [100 * 0.5**0.5, 0], atol=1e-3)


def test_the_label_goes_wherever_the_template_has_its_place_and_may_hold_braces(lit_pair, by_hand):
    by_hand({"{} and {}, {0}": [1.0], "dog and dog, {0}": [0, 1.0]}, [1.0])
    classifier = ZeroShotClassifier(*lit_pair, ["{}", "dog"], templates="{} and {}, {0}")
    assert np.array(classifier.text_embeds)[:, :2].tolist() == [[1, 0], [0, 1]]


def test_top_is_sorted_and_cut(lit_pair, noise_images):
    (found,) = zero_shot(*lit_pair, noise_images[:1], LABELS)
    assert found.top(2) == sorted(zip(LABELS, found.probabilities.tolist(), strict=True), key=lambda p: -p[1])[:2]
    assert len(found.top()) == 3


def test_half_precision_keeps_unit_vectors_and_logits_in_float32(lit_folder, noise_images):
    classifier = ZeroShotClassifier(*load(lit_folder, dtype="float16"), LABELS)
    assert classifier.text_embeds.dtype == mx.float32
    assert np.allclose(np.linalg.norm(np.array(classifier.text_embeds), axis=1), 1, atol=1e-6)
    assert classifier(noise_images)[0].logits.dtype == np.float32


# --- what it knows


def test_labels_are_read_once_for_any_number_of_images(lit_pair, noise_images, monkeypatch):
    classifier = ZeroShotClassifier(*lit_pair, LABELS)
    monkeypatch.setattr(lit_pair[0], "encode_text", None, raising=False)  # a second reading would fail
    assert [p.label for p in classifier(noise_images)] == [classifier(image)[0].label for image in noise_images]


def test_small_batches_give_what_one_batch_gives(lit_pair, noise_images, monkeypatch):
    model, processor = lit_pair
    labels, templates = [*LABELS, "a very old coffee cup", "moon"], ["a photo of the {} in the sun", "{}"]
    whole = ZeroShotClassifier(*lit_pair, labels, templates=templates)
    wanted = [prediction.logits for prediction in whole(noise_images)]
    tokens, rows = [], []
    encode_text, encode_image = model.encode_text, model.encode_image
    monkeypatch.setattr(model, "encode_text", lambda ids: tokens.append(ids.size) or encode_text(ids), raising=False)
    monkeypatch.setattr(model, "encode_image", lambda p: rows.append(len(p)) or encode_image(p), raising=False)
    monkeypatch.setattr("mlx_aimv2.embed.loader.BATCH_TOKENS", 25)
    parts = ZeroShotClassifier(*lit_pair, labels, templates=templates)
    assert roundings(parts.text_embeds, whole.text_embeds) <= NEAR
    assert roundings([prediction.logits for prediction in parts(noise_images)], wanted) <= NEAR
    lengths = [processor.tokenize(t.replace("{}", label)).size for label in labels for t in templates]
    assert len(tokens) > 3 and max(tokens) <= 25  # several calls, none too large,
    assert sum(tokens) <= 1.2 * sum(lengths)  # and texts of like length together
    assert rows == [2, 2, 1]  # noise_images of 9 tokens


def test_one_image_an_array_of_images_and_no_image(lit_pair, noise_images):
    classifier = ZeroShotClassifier(*lit_pair, LABELS)
    arrays = np.stack([np.asarray(Image.open(image)) for image in noise_images])
    wanted = [prediction.logits for prediction in classifier(noise_images)]
    assert roundings([prediction.logits for prediction in classifier(arrays)], wanted) <= NEAR
    image = Image.open(noise_images[1])
    assert roundings([prediction.logits for prediction in classifier([image, image])], [wanted[1]] * 2) <= NEAR
    assert roundings(classifier(arrays[2])[0].logits, wanted[2]) <= NEAR
    assert classifier([]) == []


def test_open_images_are_decoded_by_one_thread_and_files_by_several(lit_pair, noise_images, monkeypatch):
    model, processor = lit_pair
    threads, levels = set(), processor.levels

    def slowly(image: object, **keywords: object) -> np.ndarray:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return levels(image, **keywords)

    monkeypatch.setattr(processor, "levels", slowly)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    classifier = ZeroShotClassifier(model, processor, LABELS)
    image = Image.open(noise_images[0])
    assert len(classifier([image, image, image])) == 3 and len(threads) == 1
    threads.clear()  # the system gives an ended thread's number to a new one
    assert len(classifier(noise_images)) == 5 and len(threads) == 3


def test_an_image_that_cannot_be_read_gives_its_error_in_its_place(lit_pair, noise_images, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.embed.loader.BATCH_TOKENS", 18)
    classifier = ZeroShotClassifier(*lit_pair, LABELS)
    results = list(classifier.each([noise_images[0], "nowhere.png", "gone.png", *noise_images[1:]]))
    assert [isinstance(result, FileNotFoundError) for result in results] == [False, True, True, *[False] * 4]
    assert "nowhere.png" in str(results[1])
    wanted = [prediction.logits for prediction in classifier(noise_images)]
    assert roundings([results[i].logits for i in (0, 3, 4, 5, 6)], wanted) <= NEAR
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        classifier([noise_images[0], "nowhere.png"])


# --- what cannot be


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "give at least two labels, got 0"),
        (["cat"], "give at least two labels, got 1: one alone fits every image with probability 1"),
        (["cat", "dog", "cat"], "labels given more than once: cat"),
        (["cat", 3], "label 1 must be a non-empty string, got 3"),
        (["cat", None], "label 1 must be a non-empty string, got None"),
        (["cat", " "], "label 1 must be a non-empty string, got ' '"),
        ("cat,dog", "labels must be a list of strings, got one string: 'cat,dog'"),
        (["red fox", "Red  FOX"], "'red fox' and 'Red  FOX' are the same text .* capitals do not count"),
    ],
)
def test_labels_that_make_no_classes_are_refused(lit_pair, labels, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(*lit_pair, labels)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (["a {}", "a photo"], r"template 'a photo' has no \{\} where the label goes"),
        ("", r"template '' has no \{\}"),
        ([7], r"template 7 has no \{\}"),
        ([], "no templates"),
        ("dog " * 40 + "{}", "same text to the model: .* beyond the context"),
    ],
)
def test_templates_that_hold_no_label_are_refused(lit_pair, templates, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(*lit_pair, LABELS, templates=templates)


def test_numbers_beyond_half_precision_are_told_and_not_ranked(lit_folder, noise_images):
    model, processor = load(lit_folder, dtype="float16")
    classifier = ZeroShotClassifier(model, processor, LABELS)
    for encoder in (model.vision_model, model.text_model):
        encoder.norm.weight = encoder.norm.weight * 60000
    with pytest.raises(ValueError, match=r"not finite in float16: load it with dtype float32"):
        classifier(noise_images)
    with pytest.raises(ValueError, match=r"not finite in float16: load it with dtype float32"):
        ZeroShotClassifier(model, processor, LABELS)


def test_a_vision_only_checkpoint_names_the_one_that_reads_words_before_any_image():
    model, processor = load(VISION_ONLY)
    for ask in (
        lambda: zero_shot(model, processor, "nowhere.png", LABELS),
        lambda: processor.tokenize(LABELS),
        lambda: model.encode_text(mx.array([[1]])),
    ):
        with pytest.raises(ValueError, match=r"no text encoder.*apple/aimv2-large-patch14-224-lit"):
            ask()
