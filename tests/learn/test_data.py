"""Labelled images are read from folders and metadata files, everything wrong is listed, and no duplicate straddles."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from labelled import write_digits
from PIL import Image

from mlx_aimv2.embed.cache import KnownFiles
from mlx_aimv2.learn import classify, data, label_files
from mlx_aimv2.learn.data import DataError, Sample
from mlx_aimv2.learn.task import find_task, guess_task


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def digits(tmp_path):
    return write_digits(tmp_path / "digits")


def lines_of(folder: Path, **settings) -> tuple[str, ...]:
    with pytest.raises(DataError) as error:
        classify.read(folder, **settings)
    return error.value.lines


def test_a_folder_per_label_is_split_into_three_parts_of_every_class(digits):
    found = classify.read(digits)
    assert found.classes == ("digit 0", "digit 1", "digit 2")
    assert {part: len(samples) for part, samples in found.splits.items()} == {"train": 24, "val": 6, "test": 6}
    for samples in found.splits.values():
        assert {sample.target for sample in samples} == {0, 1, 2}
        assert all(found.classes[sample.target] == Path(sample.path).parent.name for sample in samples)


def test_the_split_follows_content_not_names(digits, tmp_path):
    before = {s.sha256: part for part, samples in classify.read(digits).splits.items() for s in samples}
    for number, file in enumerate(sorted(digits.rglob("*.png"))):
        file.rename(file.with_name(f"renamed-{(7 * number) % 36}.png"))
    after = {s.sha256: part for part, samples in classify.read(digits).splits.items() for s in samples}
    assert after == before


@pytest.mark.parametrize("seed", range(5))
def test_equal_content_never_lies_in_two_parts(seed):
    chance = np.random.default_rng(seed)
    contents = [bytes([int(c)]) * 32 for c in chance.integers(0, 13, 97)]
    samples = [Sample(f"{i}.png", content, None) for i, content in enumerate(contents)]
    parts = data.split(samples, chance.integers(0, 3, 97).tolist())
    assert sum(map(len, parts.values())) == 97
    assert not data.straddling(parts)


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (20, (14, 3, 3))])
def test_a_class_is_shared_between_the_parts_by_its_size(count, sizes):
    parts = data.split([Sample(f"{i}", bytes([i]) * 32, 0) for i in range(count)], [0] * count)
    assert tuple(map(len, parts.values())) == sizes


@pytest.mark.parametrize("name", ["valid", "validation", "val", "Val"])
def test_parts_that_are_there_are_used(digits, tmp_path, name):
    for part in ("train", name, "test"):
        shutil.copytree(digits, tmp_path / "parts" / part)
    found = classify.read(tmp_path / "parts")
    assert {part: len(samples) for part, samples in found.splits.items()} == {"train": 36, "val": 36, "test": 36}
    assert any("72 images in two parts" in note for note in found.notes)


def test_without_val_a_part_of_train_becomes_val(digits, tmp_path):
    write_digits(tmp_path / "parts" / "train", per_class=10)
    write_digits(tmp_path / "parts" / "test", per_class=2)
    found = classify.read(tmp_path / "parts")
    assert [len(found.splits[part]) for part in ("train", "val", "test")] == [24, 6, 6]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_metadata_file_names_images_and_labels(digits, tmp_path, kind):
    rows = [
        {"file_name": f"{file.parent.name}/{file.name}", "label": int(file.parent.name[-1]) + 8}
        for file in sorted(digits.rglob("*.png"))
    ]
    if kind == "csv":
        text = "\ufefffile_name,label\r\n" + "".join(f"{row['file_name']},{row['label']}\r\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (digits / f"metadata.{kind}").write_text(text, encoding="utf-8", newline="")
    assert label_files.recognise(digits) == f"labels in metadata.{kind}"
    found = classify.read(digits)
    assert found.classes == ("8", "9", "10")
    assert sum(map(len, found.splits.values())) == 36


def test_everything_wrong_is_listed_at_once(digits):
    (digits / "digit 0" / "000.png").write_bytes(b"no image")
    (digits / "digit 1" / "001.png").write_bytes(b"")
    (digits / "empty").mkdir()
    for file in sorted((digits / "digit 2").iterdir())[1:]:
        file.unlink()
    os.mkfifo(digits / "digit 1" / "pipe.png")
    lines = lines_of(digits)
    assert len(lines) == 5
    for words in (
        "empty is a label without images",
        "000.png is not an image",
        "001.png is empty",
        "pipe.png is a named pipe, not an image",
        "the label digit 2 has one image: it needs at least two",
    ):
        assert any(words in line for line in lines), words


def test_copies_of_one_image_are_one_image(digits):
    files = sorted((digits / "digit 2").iterdir())
    for file in files[1:]:
        shutil.copy(files[0], file)
    assert lines_of(digits) == ("the label digit 2 has one image in 12 copies: it needs at least two",)


def test_one_label_is_too_few(tmp_path):
    assert lines_of(write_digits(tmp_path / "d", classes=1)) == (
        f"{tmp_path / 'd'} has only one label, digit 0: a classifier needs at least two labels",
    )


def test_a_label_outside_the_list_is_wrong_in_any_part(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "parts" / "train")
    write_digits(tmp_path / "parts" / "test", classes=4, per_class=2)
    assert lines_of(tmp_path / "parts") == (
        "the label digit 3 (2 images) is not in the list digit 0, digit 1, digit 2",
    )
    assert "the label digit 2 (12 images) is not in the list" in lines_of(digits, classes=["digit 0", "digit 1"])[0]


def test_with_given_classes_nothing_is_split(digits):
    found = classify.read(digits, classes=["digit 0", "digit 1", "digit 2", "digit 9"])
    assert [len(found.splits[part]) for part in ("train", "val", "test")] == [0, 0, 36]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,label\nmissing.png,a\n", "line 2: missing.png does not exist"),
        ("file_name,label\ndigit 0/000.png,\n", "line 2: digit 0/000.png has no label"),
        ("name,label\ndigit 0/000.png,a\n", "line 2: no file_name"),
        ("file_name,label\ndigit 0/000.png,a\ndigit 0/000.png,b\n", "is listed more than once"),
        ("file_name,label\n", "has no rows"),
    ],
)
def test_wrong_metadata_is_named_with_its_line(digits, text, words):
    (digits / "metadata.csv").write_text(text)
    assert any(words in line for line in lines_of(digits))


def test_an_image_with_two_labels_is_a_note(digits):
    shutil.copy(digits / "digit 0" / "000.png", digits / "digit 1" / "copy.png")
    assert any("are the same image, called digit 0 and digit 1" in note for note in classify.read(digits).notes)


def test_what_is_no_task_is_said(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no labelled images: make a folder for each label"):
        guess_task(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"--task must be .*classify"):
        find_task("translate")


def test_known_files_are_not_read_again_until_they_change(digits, monkeypatch):
    paths = sorted(map(str, digits.rglob("*.png")))
    for path in paths:
        os.utime(path, (1e9, 1e9))
    first, _ = data.check_images(paths)
    read = []
    monkeypatch.setattr(data, "_checked", lambda path: read.append(path) or b"new")
    Image.new("RGB", (9, 9)).save(paths[5])
    second, _ = data.check_images(paths)
    assert read == [paths[5]]
    assert second == first | {paths[5]: b"new"}


def test_a_cache_that_cannot_be_read_is_no_cache(digits, tmp_path):
    (tmp_path / "cache").mkdir()
    KnownFiles().path.write_bytes(b"garbage" * 100)
    assert sum(map(len, classify.read(digits).splits.values())) == 36
