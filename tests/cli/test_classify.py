"""`mlx-aimv2 classify` prints the best labels of each image, and wrong use is one line."""

import json

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import load, zero_shot
from mlx_aimv2.bundled import photographs
from mlx_aimv2.cli import main
from tests.small_lit import COLOURS, GOLDEN, colour_lit, write

LABELS = ["cat", "dog", "red fox"]
VISION_ONLY = GOLDEN / "reference" / "fixed"


def run(capsys, *arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr of `mlx-aimv2 classify`."""
    code = main(["classify", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def test_a_pair_that_knows_three_colours_names_the_colour_of_each_image(capsys, tmp_path):
    lit_folder, dice = write(tmp_path / "lit", model=colour_lit()), np.random.default_rng(2)
    files = []
    for axis, colour in enumerate(COLOURS):
        image = dice.integers(0, 100, (61, 83, 3), np.uint8)
        image[..., axis] += 120
        files.append(tmp_path / f"{colour}.png")
        Image.fromarray(image).save(files[-1])
    labels = ("blue", "red", "green")
    for templates in (["a photo of a {}"], ["a {} cat", "{}!", "the sun, the sea, the moon and one {} bench"]):
        found = zero_shot(*load(lit_folder), files, labels, templates=templates)
        assert [prediction.label for prediction in found] == list(COLOURS)
        assert min(prediction.probabilities.max() for prediction in found) > 0.9
    code, out, _ = run(capsys, *files, "-m", lit_folder, "--labels", ",".join(labels), "-k", 1)
    assert code == 0 and [line.split("  ")[-1] for line in out.splitlines()[1::2]] == list(COLOURS)


# --- once, and in batches


def test_the_command_prints_the_best_labels_of_each_image(capsys, lit_folder, noise_images):
    code, out, err = run(capsys, *noise_images, "-m", lit_folder, "--labels", "cat, dog,red fox,", "-k", 2)
    found = zero_shot(*load(lit_folder), noise_images, LABELS)
    lines = [
        line
        for image, prediction in zip(noise_images, found, strict=True)
        for line in [image, *(f"{100 * p:7.2f} %  {label}" for label, p in prediction.top(2))]
    ]
    assert (code, out.splitlines(), err) == (0, lines, [])


def test_json_is_one_object_a_line_with_every_label(capsys, lit_folder, noise_images):
    templates = ("--template", "a drawing of a {}", "--template", "a {} at the sea")
    code, out, _ = run(capsys, *noise_images, "-m", lit_folder, "--labels", "cat,dog,red fox", *templates, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    found = zero_shot(*load(lit_folder), noise_images, LABELS, templates=templates[1::2])
    assert code == 0 and [row["path"] for row in rows] == noise_images
    for row, prediction in zip(rows, found, strict=True):
        assert [(entry["label"], entry["probability"]) for entry in row["labels"]] == prediction.top()
        logits = {entry["label"]: entry["logit"] for entry in row["labels"]}
        assert [logits[label] for label in LABELS] == prediction.logits.tolist()


def test_a_file_of_labels_may_hold_commas_any_script_blank_lines_and_spaces(capsys, lit_folder, noise_images, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufefffox, red\r\n\r\n  猫  \n\nнаш пёс 🐶\u2028x\n\n".encode())
    code, out, _ = run(capsys, noise_images[0], "-m", lit_folder, "--labels-file", file, "--labels", "cat", "--json")
    found = {entry["label"] for entry in json.loads(out)["labels"]}
    assert code == 0 and found == {"cat", "fox, red", "猫", "наш пёс 🐶\u2028x"}


def test_images_that_cannot_be_read_are_named_and_the_rest_is_done(capsys, lit_folder, noise_images, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    bad = [tmp_path / "nowhere.png", tmp_path / "text.jpg"]
    code, out, err = run(
        capsys, noise_images[0], *bad, noise_images[1], "-m", lit_folder, "--labels", "cat,dog", "--json"
    )
    assert code == 1
    assert [json.loads(line)["path"] for line in out.splitlines()] == noise_images[:2]
    assert len(err) == 2
    for line, name in zip(err, bad, strict=True):
        assert line.startswith("mlx-aimv2: ") and str(name) in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no labels: give --labels cat,dog or --labels-file FILE"),
        (["--labels", ", ,"], "give at least two labels, got 0"),
        (["--labels", "cat"], "one alone fits every image"),
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


def test_a_folder_without_tokenizer_on_the_command_line(capsys, tmp_path):
    write(tmp_path, files=())
    code, _, err = run(capsys, photographs()[0], "-m", tmp_path, "--labels", "cat,dog")
    assert (code, len(err)) == (2, 1) and "tokenizer.json" in err[0]
