"""Do labels, templates and images become the right probabilities, once and in batches, in Python and in the shell?"""

import importlib
import json
import math
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import Aimv2Config, Aimv2TextConfig, ZeroShotClassifier, bundled, load, zero_shot
from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from tests.small_lit import COLOURS, CONFIG, GOLDEN, TOKENIZER_FILES, colour_lit, small_lit, write

LABELS = ["cat", "dog", "red fox"]
VISION_ONLY = GOLDEN / "reference" / "fixed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("lit"))


@pytest.fixture(scope="module")
def pair(folder):
    return load(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """Five small noisy images."""
    place, dice = tmp_path_factory.mktemp("images"), np.random.default_rng(11)
    files = [place / f"{n}.png" for n in range(5)]
    for file in files:
        Image.fromarray(dice.integers(0, 256, (47, 43, 3), np.uint8)).save(file)
    return [str(file) for file in files]


@pytest.fixture
def by_hand(pair, monkeypatch):
    """The pair with vectors that a test gives: {text: vector} and one vector for every image."""
    model, processor = pair

    def give(texts: dict[str, list[float]], image: list[float]) -> None:
        def widened(vector: list[float]) -> list[float]:
            return [*vector, *[0.0] * (29 - len(vector))]

        table = {tuple(processor.tokenize(text)[0].tolist()): widened(vector) for text, vector in texts.items()}

        def encode_text(ids: mx.array) -> mx.array:
            return mx.array([table[tuple(row[: row.index(777) + 1])] for row in ids.tolist()])

        monkeypatch.setattr(model, "encode_text", encode_text, raising=False)
        monkeypatch.setattr(model, "encode_image", lambda pixels: mx.array([widened(image)] * len(pixels)))

    return give


def run(capsys, *arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr of `mlx-aimv2 classify`."""
    code = main(["classify", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


# --- what comes out


def test_logits_are_those_of_the_pair_and_probabilities_their_softmax(pair, images):
    model, processor = pair
    ids = processor.tokenize([f"a photo of a {label}" for label in LABELS])
    wanted = np.array(model(processor(images), ids).logits_per_image)
    found = zero_shot(model, processor, images, LABELS)
    assert len(found) == 5 and found[0].labels == tuple(LABELS)
    assert np.allclose([prediction.logits for prediction in found], wanted, atol=1e-4)
    exact = np.exp(wanted - wanted.max(axis=1, keepdims=True))
    assert np.allclose([p.probabilities for p in found], exact / exact.sum(axis=1, keepdims=True), atol=1e-5)
    assert [prediction.label for prediction in found] == [LABELS[i] for i in wanted.argmax(axis=1)]


def test_hand_made_cosines_give_hand_made_numbers(pair, by_hand, images):
    by_hand({"a photo of a cat": [0, 5], "a photo of a dog": [2, 0]}, [0.06, 0.08])
    (found,) = zero_shot(*pair, images[0], ["cat", "dog"])
    assert np.allclose(found.logits, [80, 60], atol=1e-3)  # the scale of 115 is held at 100
    assert math.isclose(found.probabilities[1], math.exp(-20) / (1 + math.exp(-20)), rel_tol=1e-4)
    assert (found.label, found.top(1)) == ("cat", [("cat", float(found.probabilities[0]))])


def test_templates_are_averaged_as_unit_vectors_and_the_mean_is_made_one(pair, by_hand, images):
    texts = {"a cat": [30, 0], "two cat": [0, 0.1], "a dog": [0, 0, 9], "two dog": [0, 0, 4]}
    by_hand(texts, [1, 0])
    classifier = ZeroShotClassifier(*pair, ["cat", "dog"], templates=["a {}", "two {}"])
    assert np.allclose(np.array(classifier.text_embeds)[:, :3], [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]])
    (found,) = classifier(images[:1])
    assert np.allclose(found.logits, [100 * 0.5**0.5, 0], atol=1e-3)


def test_the_label_goes_wherever_the_template_has_its_place_and_may_hold_braces(pair, by_hand):
    by_hand({"{} and {}, {0}": [1.0], "dog and dog, {0}": [0, 1.0]}, [1.0])
    classifier = ZeroShotClassifier(*pair, ["{}", "dog"], templates="{} and {}, {0}")
    assert np.array(classifier.text_embeds)[:, :2].tolist() == [[1, 0], [0, 1]]


def test_top_is_sorted_and_cut(pair, images):
    (found,) = zero_shot(*pair, images[:1], LABELS)
    assert found.top(2) == sorted(zip(LABELS, found.probabilities.tolist(), strict=True), key=lambda p: -p[1])[:2]
    assert len(found.top()) == 3


def test_half_precision_keeps_unit_vectors_and_logits_in_float32(folder, images):
    classifier = ZeroShotClassifier(*load(folder, dtype="float16"), LABELS)
    assert classifier.text_embeds.dtype == mx.float32
    assert np.allclose(np.linalg.norm(np.array(classifier.text_embeds), axis=1), 1, atol=1e-6)
    assert classifier(images)[0].logits.dtype == np.float32


# --- what it knows


def test_a_pair_that_knows_three_colours_names_the_colour_of_each_image(capsys, tmp_path):
    folder, dice = write(tmp_path / "lit", model=colour_lit()), np.random.default_rng(2)
    files = []
    for axis, colour in enumerate(COLOURS):
        image = dice.integers(0, 100, (61, 83, 3), np.uint8)
        image[..., axis] += 120
        files.append(tmp_path / f"{colour}.png")
        Image.fromarray(image).save(files[-1])
    labels = ("blue", "red", "green")
    for templates in (["a photo of a {}"], ["a {} cat", "{}!", "the sun, the sea, the moon and one {} bench"]):
        found = zero_shot(*load(folder), files, labels, templates=templates)
        assert [prediction.label for prediction in found] == list(COLOURS)
        assert min(prediction.probabilities.max() for prediction in found) > 0.9
    code, out, _ = run(capsys, *files, "-m", folder, "--labels", ",".join(labels), "-k", 1)
    assert code == 0 and [line.split("  ")[-1] for line in out.splitlines()[1::2]] == list(COLOURS)


# --- once, and in batches


def test_labels_are_read_once_for_any_number_of_images(pair, images, monkeypatch):
    classifier = ZeroShotClassifier(*pair, LABELS)
    monkeypatch.setattr(pair[0], "encode_text", None, raising=False)  # a second reading would fail
    assert [p.label for p in classifier(images)] == [classifier(image)[0].label for image in images]


def test_small_batches_give_what_one_batch_gives(pair, images, monkeypatch):
    model, processor = pair
    labels, templates = [*LABELS, "a very old coffee cup", "moon"], ["a photo of the {} in the sun", "{}"]
    whole = ZeroShotClassifier(*pair, labels, templates=templates)
    wanted = [prediction.logits for prediction in whole(images)]
    tokens, rows = [], []
    encode_text, encode_image = model.encode_text, model.encode_image
    monkeypatch.setattr(model, "encode_text", lambda ids: tokens.append(ids.size) or encode_text(ids), raising=False)
    monkeypatch.setattr(model, "encode_image", lambda p: rows.append(len(p)) or encode_image(p), raising=False)
    monkeypatch.setattr("mlx_aimv2.zero_shot_classifier.TOKENS_AT_ONCE", 25)
    parts = ZeroShotClassifier(*pair, labels, templates=templates)
    assert np.allclose(np.array(parts.text_embeds), np.array(whole.text_embeds), atol=1e-6)
    assert np.allclose([prediction.logits for prediction in parts(images)], wanted, atol=1e-3)
    lengths = [processor.tokenize(t.replace("{}", label)).size for label in labels for t in templates]
    assert len(tokens) > 3 and max(tokens) <= 25  # several calls, none too large,
    assert sum(tokens) <= 1.2 * sum(lengths)  # and texts of like length together
    assert rows == [2, 2, 1]  # images of 9 tokens


def test_one_image_an_array_of_images_and_no_image(pair, images):
    classifier = ZeroShotClassifier(*pair, LABELS)
    arrays = np.stack([np.asarray(Image.open(image)) for image in images])
    wanted = [prediction.logits for prediction in classifier(images)]
    assert np.allclose([prediction.logits for prediction in classifier(arrays)], wanted, atol=1e-4)
    image = Image.open(images[1])
    assert np.allclose([prediction.logits for prediction in classifier([image, image])], wanted[1], atol=1e-4)
    assert np.allclose(classifier(arrays[2])[0].logits, wanted[2], atol=1e-4)
    assert classifier([]) == []


def test_open_images_are_decoded_by_one_thread_and_files_by_several(pair, images, monkeypatch):
    model, processor = pair
    threads, pixels = set(), processor.pixels

    def slowly(image: object, **keywords: object) -> np.ndarray:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return pixels(image, **keywords)

    monkeypatch.setattr(processor, "pixels", slowly)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    classifier = ZeroShotClassifier(model, processor, LABELS)
    image = Image.open(images[0])
    assert len(classifier([image, image, image])) == 3 and len(threads) == 1
    threads.clear()  # the system gives an ended thread's number to a new one
    assert len(classifier(images)) == 5 and len(threads) == 3


def test_pixels_from_the_processor_serve_too(pair, images):
    classifier = ZeroShotClassifier(*pair, LABELS)
    for ready, read in zip(classifier.predict(pair[1](images)), classifier(images), strict=True):
        assert np.allclose(ready.logits, read.logits, atol=1e-4)


def test_an_image_that_cannot_be_read_gives_its_error_in_its_place(pair, images, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.zero_shot_classifier.TOKENS_AT_ONCE", 18)
    classifier = ZeroShotClassifier(*pair, LABELS)
    results = list(classifier.each([images[0], "nowhere.png", "gone.png", *images[1:]]))
    assert [isinstance(result, FileNotFoundError) for result in results] == [False, True, True, *[False] * 4]
    assert "nowhere.png" in str(results[1])
    wanted = [prediction.logits for prediction in classifier(images)]
    assert np.allclose([results[i].logits for i in (0, 3, 4, 5, 6)], wanted, atol=1e-3)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        classifier([images[0], "nowhere.png"])


# --- what cannot be


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no labels: give at least two"),
        (["cat"], r"one label alone \(cat\) fits every image with probability 1: give at least two"),
        (["cat", "dog", "cat"], "labels given more than once: cat"),
        (["cat", 3], "label 1 is not a string but int: 3"),
        (["cat", None], "label 1 is not a string but NoneType: None"),
        (["cat", " "], "label 1 is empty"),
        ("cat,dog", "labels must be a list of strings, got one string: 'cat,dog'"),
        (["red fox", "Red  FOX"], "'red fox' and 'Red  FOX' are the same text .* capitals do not count"),
    ],
)
def test_labels_that_make_no_classes_are_refused(pair, labels, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(*pair, labels)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (["a {}", "a photo"], r"template 'a photo' has no \{\} where the label goes"),
        ("", r"template '' has no \{\}"),
        ([7], r"template 7 has no \{\}"),
        ([], "no templates"),
        ("dog " * 40 + "{}", "same text to the model .* beyond the context"),
        ("a photo <|endoftext|> of a {}", "same text to the model"),
    ],
)
def test_templates_that_hold_no_label_are_refused(pair, templates, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(*pair, LABELS, templates=templates)


def test_numbers_beyond_half_precision_are_told_and_not_ranked(folder, images):
    model, processor = load(folder, dtype="float16")
    classifier = ZeroShotClassifier(model, processor, LABELS)
    for encoder in (model.vision_model, model.text_model):
        encoder.norm.weight = encoder.norm.weight * 60000
    with pytest.raises(ValueError, match=r"not finite in float16: load it with dtype float32"):
        classifier(images)
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


def test_without_tokenizer_files_a_pair_loads_and_text_names_the_missing_file(tmp_path):
    model, processor = load(write(tmp_path, files=()))
    assert model.encode_image(mx.zeros((1, 42, 42, 3))).shape == (1, 29)
    for ask in (lambda: zero_shot(model, processor, "nowhere.png", LABELS), lambda: processor.tokenize("cat")):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
            ask()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load(tmp_path)[1].tokenize("cat")


def test_a_vocabulary_larger_than_the_embedding_is_refused_with_both_sizes(tmp_path):
    text = Aimv2TextConfig(700, 36, 53, 2, 3, max_position_embeddings=23, eos_token_id=699)
    write(tmp_path, model=small_lit(Aimv2Config(CONFIG.vision_config, text, 29)))
    with pytest.raises(ValueError, match=r"778 tokens.*700 rows"):
        load(tmp_path)[1].tokenize("cat")


@pytest.mark.parametrize("text", [3, None, b"cat", ["cat", 3]])
def test_text_that_is_not_a_string_is_refused(pair, text):
    with pytest.raises(ValueError, match="is not a string"):
        pair[1].tokenize(text)


# --- the command line


def test_the_command_prints_the_best_labels_of_each_image(capsys, folder, images):
    code, out, err = run(capsys, *images, "-m", folder, "--labels", "cat, dog,red fox,", "-k", 2)
    found = zero_shot(*load(folder), images, LABELS)
    lines = [
        line
        for image, prediction in zip(images, found, strict=True)
        for line in [image, *(f"{100 * p:7.2f} %  {label}" for label, p in prediction.top(2))]
    ]
    assert (code, out.splitlines(), err) == (0, lines, [])


def test_json_is_one_object_a_line_with_every_label(capsys, folder, images):
    templates = ("--template", "a drawing of a {}", "--template", "a {} at the sea")
    code, out, _ = run(capsys, *images, "-m", folder, "--labels", "cat,dog,red fox", *templates, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    found = zero_shot(*load(folder), images, LABELS, templates=templates[1::2])
    assert code == 0 and [row["path"] for row in rows] == images
    for row, prediction in zip(rows, found, strict=True):
        assert [(entry["label"], entry["probability"]) for entry in row["labels"]] == prediction.top()
        logits = {entry["label"]: entry["logit"] for entry in row["labels"]}
        assert [logits[label] for label in LABELS] == prediction.logits.tolist()


def test_a_file_of_labels_may_hold_commas_any_script_blank_lines_and_spaces(capsys, folder, images, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufefffox, red\r\n\r\n  猫  \n\nнаш пёс 🐶\u2028x\n\n".encode())
    code, out, _ = run(capsys, images[0], "-m", folder, "--labels-file", file, "--labels", "cat", "--json")
    found = {entry["label"] for entry in json.loads(out)["labels"]}
    assert code == 0 and found == {"cat", "fox, red", "猫", "наш пёс 🐶\u2028x"}


def test_images_that_cannot_be_read_are_named_and_the_rest_is_done(capsys, folder, images, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    bad = [tmp_path / "text.jpg", tmp_path / "nowhere.png", tmp_path]
    code, out, err = run(capsys, images[0], *bad, images[1], "-m", folder, "--labels", "cat,dog", "--json")
    assert code == 1
    assert [json.loads(line)["path"] for line in out.splitlines()] == images[:2]
    assert len(err) == 3
    for line, name in zip(err, bad, strict=True):
        assert line.startswith("mlx-aimv2: ") and str(name) in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no labels: give --labels cat,dog or --labels-file FILE"),
        (["--labels", ", ,"], "no labels"),
        (["--labels", "cat"], "one label alone"),
        (["--labels", "cat,dog,cat"], "more than once: cat"),
        (["--labels", "cat,dog", "--template", "a photo"], "template 'a photo' has no {}"),
        (["--labels-file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--labels", "cat,dog", "-k", "0"], "--top must be at least 1, got 0"),
    ],
)
def test_wrong_use_is_one_line_before_the_model_is_loaded(capsys, flags, message):
    code, out, err = run(capsys, "x.png", "-m", "owner/no-such-model", *flags)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("mlx-aimv2: ") and message in err[0]


def test_labels_that_are_not_text_are_refused(capsys, tmp_path):
    (tmp_path / "labels.txt").write_bytes(b"cat\nd\xffg\n")
    code, _, err = run(capsys, "x.png", "--labels-file", tmp_path / "labels.txt")
    assert code == 2 and len(err) == 1 and "labels.txt is not UTF-8 text" in err[0]


def test_a_vision_only_checkpoint_on_the_command_line(capsys):
    code, _, err = run(capsys, "nowhere.png", "-m", VISION_ONLY, "--labels", "cat,dog")
    assert (code, len(err)) == (2, 1)
    assert "apple/aimv2-large-patch14-224-lit" in err[0] and "nowhere.png" not in err[0]


def test_a_folder_without_tokenizer_on_the_command_line(capsys, tmp_path):
    write(tmp_path, files=())
    code, _, err = run(capsys, "nowhere.png", "-m", tmp_path, "--labels", "cat,dog")
    assert (code, len(err)) == (2, 1) and "tokenizer.json" in err[0]


def test_vocab_and_merges_serve_as_well_as_tokenizer_json(folder, images, tmp_path):
    shutil.copytree(folder, tmp_path / "split", ignore=shutil.ignore_patterns(*TOKENIZER_FILES))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "tokenizer" / name, tmp_path / "split" / name)
    wanted = zero_shot(*load(folder), images[0], LABELS)[0].logits
    assert np.array_equal(zero_shot(*load(tmp_path / "split"), images[0], LABELS)[0].logits, wanted)


# --- after conversion

WIDE = Aimv2Config(
    replace(CONFIG.vision_config, hidden_size=64, intermediate_size=96, num_attention_heads=2),
    replace(CONFIG.text_config, hidden_size=32, intermediate_size=64, num_attention_heads=2),
    projection_dim=96,
)
EIGHT_BITS = {"quantize": True, "q_bits": 8, "q_group_size": 32}


@pytest.mark.parametrize(
    ("how", "loading", "allowed"),
    [
        ({"dtype": "float16"}, {}, 0.3),
        (EIGHT_BITS, {}, 1.5),
        (EIGHT_BITS, {"keep_quantized": True}, 1.5),
        ({"export_layout": "apple"}, {}, 0),
        ({"export_layout": "transformers"}, {}, 0),
    ],
    ids=["float16", "8 bits", "8 bits kept", "to Apple's layout", "to transformers' layout"],
)
def test_a_converted_pair_classifies_as_its_source_does(images, tmp_path, how, loading, allowed):
    source = write(tmp_path / "source", model=small_lit(WIDE))
    converted = convert(source, tmp_path / "converted", verify=False, **how)
    wanted = [prediction.logits for prediction in zero_shot(*load(source), images, LABELS)]
    found = [prediction.logits for prediction in zero_shot(*load(converted, **loading), images, LABELS)]
    assert np.ptp(wanted) > 5 and np.abs(np.subtract(found, wanted)).max() <= allowed


# --- the examples


@pytest.mark.parametrize(("example", "flags"), [("zero_shot", []), ("search_by_text", ["a cup of coffee"])])
def test_the_examples_run_on_the_bundled_photographs(capsys, folder, example, flags):
    importlib.import_module(f"examples.{example}").main([*flags, "--model", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    shown = {photograph.name for photograph in bundled.photographs() if str(photograph) in "".join(lines)}
    assert shown == {"astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg"}
    assert len(lines) == 4
