"""Labels, masks and boxes are read by the same rules: parts, copies, classes, what is left out and what is refused."""

import json
import os
import shutil
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.cli import main
from mlx_aimv2.embed.cache import Known, KnownFiles
from mlx_aimv2.files import read_image_file
from mlx_aimv2.images import OpenImage
from mlx_aimv2.learn import check_images, classify, detect, evaluate, fit, head_folder, samples, segment
from mlx_aimv2.learn.classify import data as label_files
from mlx_aimv2.learn.samples import DataError, Sample
from mlx_aimv2.learn.task_options import find_task, guess_task
from tests.image_files import noise
from tests.labelled import CHECKPOINT, write_digits


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def digits(tmp_path):
    return write_digits(tmp_path / "digits")


def lines_of(folder: Path, **settings) -> tuple[str, ...]:
    with pytest.raises(DataError) as error:
        classify.data.read(folder, **settings)
    return error.value.lines


def test_a_folder_per_label_is_split_into_three_parts_of_every_class(digits):
    found = classify.data.read(digits)
    assert found.classes == ("digit 0", "digit 1", "digit 2")
    assert {part: len(samples) for part, samples in found.splits.items()} == {"train": 24, "val": 6, "test": 6}
    for part in found.splits.values():
        assert {sample.target for sample in part} == {0, 1, 2}
        assert all(found.classes[sample.target] == Path(sample.path).parent.name for sample in part)


def test_the_split_follows_content_not_names(digits, tmp_path):
    before = {s.sha256: part for part, samples in classify.data.read(digits).splits.items() for s in samples}
    for number, file in enumerate(sorted(digits.rglob("*.png"))):
        file.rename(file.with_name(f"renamed-{(7 * number) % 36}.png"))
    after = {s.sha256: part for part, samples in classify.data.read(digits).splits.items() for s in samples}
    assert after == before


@pytest.mark.parametrize("seed", range(5))
def test_equal_content_never_lies_in_two_parts(seed):
    chance = np.random.default_rng(seed)
    contents = [bytes([int(c)]) * 32 for c in chance.integers(0, 13, 97)]
    images = [Sample(f"{i}.png", content, (1, 2), None) for i, content in enumerate(contents)]
    parts = samples.split(images, chance.integers(0, 3, 97).tolist())
    assert sum(map(len, parts.values())) == 97
    held = [{sample.sha256 for sample in part} for part in parts.values()]
    assert sum(map(len, held)) == len(set.union(*held))


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (20, (14, 3, 3))])
def test_a_class_is_shared_between_the_parts_by_its_size(count, sizes):
    parts = samples.split([Sample(f"{i}", bytes([i]) * 32, (1, 2), 0) for i in range(count)], [0] * count)
    assert tuple(map(len, parts.values())) == sizes


@pytest.mark.parametrize("name", ["valid", "validation", "val", "Val"])
def test_parts_that_are_there_are_used(digits, tmp_path, name):
    for part in ("train", name, "test"):
        shutil.copytree(digits, tmp_path / "parts" / part)
    found = classify.data.read(tmp_path / "parts")
    assert {part: len(samples) for part, samples in found.splits.items()} == {"train": 36, "val": 36, "test": 36}
    assert any("72 images in two parts" in note for note in found.notes)


def test_without_val_a_part_of_train_becomes_val(digits, tmp_path):
    write_digits(tmp_path / "parts" / "train", per_class=10)
    write_digits(tmp_path / "parts" / "test", per_class=2)
    found = classify.data.read(tmp_path / "parts")
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
    assert label_files.recognise(digits).reason == f"labels in metadata.{kind}"
    found = classify.data.read(digits)
    assert found.classes == ("8", "9", "10")
    assert sum(map(len, found.splits.values())) == 36


def test_everything_wrong_is_listed_at_once(digits):
    (digits / "digit 0" / "000.png").write_bytes(b"no image")
    (digits / "digit 1" / "001.png").write_bytes(b"")
    (digits / "empty").mkdir()
    os.mkfifo(digits / "digit 1" / "pipe.png")
    lines = lines_of(digits)
    assert len(lines) == 4
    for words in (
        "empty is a label without images",
        "000.png is not an image",
        "001.png is empty",
        "pipe.png is a named pipe, not an image",
    ):
        assert any(words in line for line in lines), words


def test_copies_of_one_image_are_one_image(digits):
    files = sorted((digits / "digit 2").iterdir())
    for file in files[1:]:
        shutil.copy(files[0], file)
    splits = classify.data.read(digits, holdout=0.25).splits
    assert [Path(one.path).parent.name for one in splits["train"]].count("digit 2") == 12
    held_out = {one.path for _, held in samples.folds(splits["train"]) for one in held}
    assert held_out == {one.path for one in splits["train"] if "digit 2" not in one.path}


def test_one_label_is_too_few(tmp_path):
    assert lines_of(write_digits(tmp_path / "d", classes=1)) == (
        f"{tmp_path / 'd'} has only one label, digit 0: training needs at least 2 labels",
    )


def test_a_label_outside_the_list_is_wrong_in_any_part(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "parts" / "train")
    write_digits(tmp_path / "parts" / "test", classes=4, per_class=2)
    assert lines_of(tmp_path / "parts") == (
        "the label digit 3 (2 images) is not in the list digit 0, digit 1, digit 2",
    )
    assert "the label digit 2 (12 images) is not in the list" in lines_of(digits, classes=["digit 0", "digit 1"])[0]


def test_with_given_classes_nothing_is_split(digits):
    found = classify.data.read(digits, classes=["digit 0", "digit 1", "digit 2", "digit 9"])
    assert [len(found.splits[part]) for part in ("train", "val", "test")] == [0, 0, 36]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,label\nmissing.png,a\n", "line 2: missing.png does not exist"),
        ("file_name,label\n", "has no rows"),
        ("name,label\ndigit 0/000.png,a\n", "has no column file_name (name, label): call one of them file_name"),
        (
            "file_name,label\ndigit 0/000.png,a\ndigit 0/000.png,b\n",
            "line 3: digit 0/000.png has another label in another row",
        ),
    ],
)
def test_wrong_metadata_is_named_with_its_line(digits, text, words):
    (digits / "metadata.csv").write_text(text)
    assert any(words in line for line in lines_of(digits))


def test_an_image_with_two_labels_is_a_note(digits):
    shutil.copy(digits / "digit 0" / "000.png", digits / "digit 1" / "copy.png")
    assert any("are the same image, called digit 0 and digit 1" in note for note in classify.data.read(digits).notes)


def test_what_is_no_task_is_said(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="has no labelled images: make a folder for each label"):
        guess_task(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"--task must be .*classify"):
        find_task("translate")


def test_a_known_file_is_not_read_again_until_it_changes(digits, monkeypatch):
    paths = sorted(map(str, digits.rglob("*.png")))
    for path in paths:
        os.utime(path, (1e9, 1e9))
    first, _ = samples.check_images(paths)
    assert first[paths[0]].size == (8, 8)
    read = []
    monkeypatch.setattr(check_images, "read_image_file", lambda path: read.append(path) or read_image_file(path))
    assert samples.check_images(paths) == (first, []) and not read
    os.utime(paths[3], (1e9, 1e9 + 1))
    assert samples.check_images(paths) == (first, []) and read == [paths[3]]
    one, other = Path(paths[0]), Path(paths[5])
    for path in (one, other):
        path.write_bytes(path.read_bytes().ljust(1000, b"\0"))
        os.utime(path, (1e9, 1e9))
    before, _ = samples.check_images(paths)
    one.rename("aside")
    other.rename(one)
    Path("aside").rename(other)
    after, _ = samples.check_images(paths)
    assert (after[paths[0]], after[paths[5]]) == (before[paths[5]], before[paths[0]])


def test_a_header_that_was_read_does_not_count_as_a_decoded_image(digits):
    path = sorted(map(str, digits.rglob("*.png")))[0]
    Path(path).write_bytes(Path(path).read_bytes()[:-30])
    os.utime(path, (1e9, 1e9))
    found, faults = samples.check_images([path], decode=False)
    assert found[path].size == (8, 8) and not faults
    assert samples.check_images([path])[1]


def test_a_cache_that_cannot_be_read_is_no_cache(digits, tmp_path):
    (tmp_path / "cache").mkdir()
    KnownFiles().path.write_bytes(b"garbage" * 100)
    assert sum(map(len, classify.data.read(digits).splits.values())) == 36


TASKS = {"classify": classify, "segment": segment, "detect": detect}


def write(task: str, folder: Path, seeds, names=("cat", "dog")) -> Path:
    """One part's images, a different one for each seed, labelled `names[seed % 2]`; images are 11 x 17."""
    entries = []
    for seed in seeds:
        place = {"classify": folder / names[seed % 2], "segment": folder / "images", "detect": folder}[task]
        place.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(seed).integers(0, 255, (11, 17, 3), np.uint8)
        Image.fromarray(levels).save(place / f"{seed}.png")
        if task == "segment":
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(np.full((11, 17), seed % 2, np.uint8)).save(folder / "masks" / f"{seed}.png")
            (folder.parent / "classes.txt").write_text("\n".join(names))
            (folder / "classes.txt").write_text("\n".join(names))
        entries.append({"id": seed, "image_id": seed, "category_id": 3 + seed % 2, "bbox": [2, 3, 5, 7]})
    if task == "detect":
        images = [{"id": seed, "file_name": f"{seed}.png", "height": 11, "width": 17} for seed in seeds]
        categories = [{"id": 3 + n, "name": name} for n, name in enumerate(names)]
        content = {"images": images, "annotations": entries, "categories": categories}
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def counts(dataset) -> tuple[int, ...]:
    return tuple(len(dataset.splits[part]) for part in ("train", "val", "test"))


def said(dataset) -> str:
    return "\n".join(dataset.notes)


every_task = pytest.mark.parametrize("task", TASKS)


@every_task
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "validation", "Testing"),
        ("seg_train", "seg_dev", "seg_test"),
        ("train-2017", "valid", "eval"),
        ("my.training", "VALID", "evaluation"),
    ],
)
def test_parts_are_known_by_hugging_faces_names(task, tmp_path, train, val, test):
    for number, part in enumerate((train, val, test)):
        write(task, tmp_path / part, range(20 * number, 20 * number + 5 + number))
    assert counts(TASKS[task].data.read(tmp_path)) == (5, 6, 7)


@every_task
@pytest.mark.parametrize("name", ["trains", "contest", "train_test", "device"])
def test_a_word_that_only_holds_a_parts_name_is_no_part(task, tmp_path, name):
    assert samples.part_of(name) is None
    write(task, tmp_path / "train", range(9))
    write(task, tmp_path / "val", range(20, 25))
    write(task, tmp_path / name, range(40, 43))
    found = TASKS[task].data.read(tmp_path)
    assert counts(found) == (9, 5, 0)
    assert f"{tmp_path / name}, with " in said(found) and "is not a labelled part of" in said(found)


@every_task
def test_a_folder_within_a_folder_of_the_same_part_is_that_part(task, tmp_path):
    write(task, tmp_path / "seg_train" / "seg_train", range(9))
    write(task, tmp_path / "seg_test" / "seg_test", range(20, 25))
    assert counts(TASKS[task].data.read(tmp_path))[2] == 5


@every_task
def test_two_folders_of_one_part_are_refused(task, tmp_path):
    for number, part in enumerate(("train", "val", "dev")):
        write(task, tmp_path / part, range(20 * number, 20 * number + 5))
    with pytest.raises(DataError, match="both mean val: keep one of them"):
        TASKS[task].data.read(tmp_path)


@every_task
@pytest.mark.parametrize(
    ("parts", "part", "count", "note"),
    [
        ({"": 9}, "test", 9, ""),
        ({"train": 9, "val": 4, "test": 5}, "test", 5, ""),
        ({"train": 9, "dev": 4}, "val", 4, ""),
        ({"testing": 5}, "test", 5, ""),
        ({"train": 9}, "train", 9, "has only the part train"),
    ],
)
def test_what_a_head_is_scored_on(task, tmp_path, parts, part, count, note):
    for number, (name, images) in enumerate(parts.items()):
        write(task, tmp_path / "d" / name, range(20 * number, 20 * number + images))
    found = TASKS[task].data.read(tmp_path / "d", classes=("cat", "dog"))
    name, chosen = found.to_score()
    assert (name, len(chosen)) == (part, count)
    assert note in said(found) and (note or not found.notes)


@every_task
def test_a_train_part_alone_is_split_as_a_folder_without_parts_is(task, tmp_path):
    write(task, tmp_path / "one" / "train", range(20))
    write(task, tmp_path / "two", range(20))
    one, two = (TASKS[task].data.read(tmp_path / name) for name in ("one", "two"))
    assert counts(one) == counts(two) and sum(counts(one)) == 20 and min(counts(one)) >= 3


@every_task
def test_val_without_train_is_refused_for_training(task, tmp_path):
    write(task, tmp_path / "val", range(9))
    with pytest.raises(DataError, match="has val but no train folder"):
        TASKS[task].data.read(tmp_path)


@every_task
def test_a_copy_in_two_parts_is_a_note(task, tmp_path):
    write(task, tmp_path / "train", range(9))
    write(task, tmp_path / "val", range(8, 13))
    found = TASKS[task].data.read(tmp_path)
    assert counts(found) == (9, 5, 0)
    assert "1 image in two parts, so the result is too optimistic: " in said(found)


@every_task
def test_one_image_with_two_labels_is_a_note(task, tmp_path):
    write(task, tmp_path / "train", range(9))
    write(task, tmp_path / "val", [8], names=("dog", "cat"))
    (tmp_path / "classes.txt").unlink(missing_ok=True)
    words = "called 0 and" if task == "segment" else "called cat and dog"
    if task == "segment":
        Image.fromarray(np.full((11, 17), 1, np.uint8)).save(tmp_path / "val" / "masks" / "8.png")
    assert words in said(TASKS[task].data.read(tmp_path))


@every_task
def test_a_label_in_two_unicode_forms_is_one(task, tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\xe9") for form in ("NFC", "NFD"))
    write(task, tmp_path / "train", range(9), names=(composed, "dog"))
    write(task, tmp_path / "val", range(20, 25), names=(apart, "dog"))
    found = TASKS[task].data.read(tmp_path)
    assert found.classes == (composed, "dog")
    write(task, tmp_path / "new", range(9), names=(composed, "dog"))
    again = TASKS[task].data.read(tmp_path / "new", classes=(apart, "dog"))
    assert counts(again) == (0, 0, 9)


@every_task
def test_classes_of_a_head_are_met_by_name(task, tmp_path):
    write(task, tmp_path, range(4), names=("dog", "cat"))  # even seeds are dogs now
    _, chosen = TASKS[task].data.read(tmp_path, classes=("ape", "cat", "dog")).to_score()
    for sample in chosen:
        seed = int(Path(sample.path).stem)
        wanted = 1 + (seed + 1) % 2
        target = sample.target
        if task == "segment":
            target = int(np.unique(segment.data.read_mask(target))[0])
        elif task == "detect":
            target = int(target.labels[0])
        assert target == wanted
    with pytest.raises(DataError, match=r"the label dog .* is not in the list ape, cat"):
        TASKS[task].data.read(tmp_path, classes=("ape", "cat"))


@every_task
def test_a_label_that_training_does_not_know_is_refused(task, tmp_path):
    write(task, tmp_path / "train", range(9))
    write(task, tmp_path / "val", range(20, 25), names=("cow", "dog"))
    if task == "segment":
        (tmp_path / "classes.txt").unlink()
        Image.fromarray(np.full((11, 17), 2, np.uint8)).save(tmp_path / "val" / "masks" / "21.png")
    with pytest.raises(DataError, match=r"the label (cow|2) \(\d \w+\) is not in the list"):
        TASKS[task].data.read(tmp_path)


@every_task
def test_a_sample_knows_its_images_size_upright(task, tmp_path):
    write(task, tmp_path, range(20))
    turned = Image.fromarray(np.zeros((17, 11, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    (next(tmp_path.rglob("0.png"))).unlink()
    place = {"classify": tmp_path / "cat", "segment": tmp_path / "images", "detect": tmp_path}[task]
    turned.save(place / "0.png", exif=exif)
    sizes = {sample.size for part in TASKS[task].data.read(tmp_path, decode=False).splits.values() for sample in part}
    assert sizes == {(11, 17)}


@every_task
def test_training_images_that_are_scored_are_told(task, tmp_path):
    write(task, tmp_path / "d", range(20))
    found = TASKS[task].data.read(tmp_path / "d")
    again = TASKS[task].data.read(tmp_path / "d", classes=found.classes)
    known = head_folder.digests(found.splits["train"])
    (line,) = head_folder.seen(again.splits["test"], known)
    count = len(found.splits["train"])
    assert line.startswith(f"{count} of the 20 images scored are images that the head was trained on")
    assert not head_folder.seen(found.splits["test"], known)


@every_task
def test_junk_of_other_programs_is_neither_an_image_nor_a_label(task, tmp_path):
    write(task, tmp_path / "d", range(9))
    for image in sorted((tmp_path / "d").rglob("*.png")):
        if "masks" not in image.parts:
            for junk in (f"@eaDir/{image.name}/THUMB.png", f"__MACOSX/._{image.name}", f".hidden-{image.name}"):
                (image.parent / junk).parent.mkdir(parents=True, exist_ok=True)
                (image.parent / junk).write_bytes(image.read_bytes())
    own = tmp_path / "d" / ("images/old" if task == "segment" else "old")
    own.mkdir()
    (own / "head.json").write_text("{}")
    Image.new("RGB", (5, 5)).save(own / "confusion.png")
    found = TASKS[task].data.read(tmp_path / "d")
    assert sum(counts(found)) == 9
    assert "@eaDir" in said(found) and "1 of mlx-aimv2's own folders" in said(found)


def test_other_files_links_and_loose_images_are_counted(digits, tmp_path):
    (digits / "digit 0" / "film.mov").touch()
    (digits / "digit 1" / "link.png").symlink_to(digits / "digit 0" / "000.png")
    Image.new("RGB", (5, 5)).save(digits / "loose.png")
    found = classify.data.read(digits)
    assert sum(counts(found)) == 37
    assert "loose.png is not in a label's folder" in said(found) and "skipped: 1 .mov" in said(found)


def test_a_class_may_be_called_like_a_part(digits):
    (digits / "digit 0").rename(digits / "train")
    (digits / "digit 1").rename(digits / "test")
    assert classify.data.read(digits).classes == ("digit 2", "test", "train")


def test_parts_without_label_folders_are_no_labels(digits):
    shutil.rmtree(digits / "digit 2")
    (digits / "digit 0").rename(digits / "train")
    (digits / "digit 1").rename(digits / "test")
    assert "test is a part of the data without a folder for each label" in lines_of(digits)[0]


def test_rows_of_a_metadata_file_are_parted_by_their_folders(digits):
    rows = []
    for number, file in enumerate(sorted(digits.rglob("*.png"))):
        part = ("seg_train", "seg_train", "seg_test")[number % 3]
        (digits / part).mkdir(exist_ok=True)
        rows.append(f"{part}/{number}.png,{file.parent.name}")
        file.rename(digits / part / f"{number}.png")
    (digits / "metadata.csv").write_text("file_name,label\n" + "\n".join(rows) + "\n")
    Image.new("RGB", (5, 5)).save(digits / "seg_test" / "more.png")
    found = classify.data.read(digits)
    assert counts(found)[2] == 12 and sum(counts(found)) == 36
    assert "more.png is not listed in metadata.csv: skipped" in said(found)


def test_a_line_of_json_ends_at_a_newline_alone(digits):
    rows = [
        {"file_name": f"{file.parent.name}/{file.name}", "label": file.parent.name, "note": "a\u2028b\x85c"}
        for file in sorted(digits.rglob("*.png"))
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (digits / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert sum(counts(classify.data.read(digits))) == 36


def test_a_label_that_is_no_text_is_told_before_training(digits):
    rows = [
        {
            "file_name": f"{file.parent.name}/{file.name}",
            "label": "caf\udce9" if file.parent.name == "digit 0" else "dog",
        }
        for file in sorted(digits.rglob("*.png"))
    ]
    (digits / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert lines_of(digits) == ("the label 'caf\\udce9' is not UTF-8: rename it",)


def test_evaluate_tells_how_many_images_the_head_was_trained_on(digits, tmp_path, capsys):
    fitted = fit(digits, CHECKPOINT, tmp_path / "head")
    assert main(["evaluate", str(tmp_path / "head"), str(digits)]) == 0
    out, err = capsys.readouterr()
    assert "on 36 images" in out
    assert f"note: {fitted.images['train']} of the 36 images scored are images that the head was trained on" in err
    (tmp_path / "head" / "trained_on.sha256").unlink()  # as in a head of an older version
    assert not evaluate(tmp_path / "head", digits).notes


@every_task
def test_broken_images_are_refused_all_at_once_or_left_out(task, tmp_path):
    write(task, tmp_path / "d", range(60))
    images = sorted(file for file in (tmp_path / "d").rglob("*.png") if "masks" not in file.parts)[::2]
    for image in images:
        image.write_bytes(image.read_bytes()[:-30])
    images[0].write_bytes(b"not even a header")
    with pytest.raises(
        DataError, match="; and 10 more; --json lists everything; --skip-broken leaves out 30 "
    ) as error:
        TASKS[task].data.read(tmp_path / "d", decode=False)
    assert {line.split(".png")[0] for line in error.value.lines} == {str(image)[:-4] for image in images}
    found = TASKS[task].data.read(tmp_path / "d", skip_broken=True)
    assert sum(counts(found)) == 30 and "30 images left out that cannot be read: " in said(found)
    assert [line for line in found.left_out if ".png" in line][:30] == list(error.value.lines)


def test_an_image_whose_mask_is_broken_is_one_that_cannot_be_read(tmp_path):
    write("segment", tmp_path / "d", range(20))
    cut, none, wide = (tmp_path / "d" / "masks" / f"{seed}.png" for seed in range(3))
    cut.write_bytes(cut.read_bytes()[:-30])
    none.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png is a broken .*1\.png is not .*; --skip-broken leaves out 2 images"):
        segment.data.read(tmp_path / "d")
    found = segment.data.read(tmp_path / "d", skip_broken=True)
    assert sum(counts(found)) == 18 and "2 images left out that cannot be read: " in said(found)
    Image.new("RGB", (17, 11)).save(wide)
    with pytest.raises(DataError, match="has the colour mode RGB"):
        segment.data.read(tmp_path / "d", skip_broken=True)


def test_fit_and_evaluate_leave_broken_images_out_where_asked(digits, tmp_path, capsys):
    for file in sorted((digits / "digit 0").iterdir())[:3]:
        file.write_bytes(file.read_bytes()[:-30])  # a good header: the features find it out
    head = tmp_path / "head"
    for command in (["fit", str(digits), "-m", str(CHECKPOINT), "-o", str(head)], ["evaluate", str(head), str(digits)]):
        assert main([*command, "--json"]) == 2
        out, err = capsys.readouterr()
        assert len(json.loads(out)["faults"]) == 3 and "; --skip-broken leaves out 3 images that cannot be read" in err
        assert main([*command, "--json", "--skip-broken"]) == 0
        out, err = capsys.readouterr()
        assert len(json.loads(out)["left_out"]) == 3 and "note: 3 images left out that cannot be read" in err
    assert len((head / "left_out.txt").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_frozen_encoder_decodes_a_training_image_once(tmp_path, monkeypatch):
    write("detect", tmp_path / "d", range(20))
    decoded = Counter()
    decode = OpenImage.rgb

    def counted(image, *wanted):
        decoded[Path(image.name).name] += 1
        return decode(image, *wanted)

    monkeypatch.setattr(OpenImage, "rgb", counted)
    fit(tmp_path / "d", CHECKPOINT, tmp_path / "head", epochs=2)
    monkeypatch.undo()
    assert {decoded[Path(sample.path).name] for sample in detect.data.read(tmp_path / "d").splits["train"]} == {1}


def test_a_file_that_was_changed_a_moment_ago_is_not_remembered(tmp_path):
    """It may change again within the clock's step, and then nothing but its content would tell."""
    known = Known(bytes(32), (50, 60), True)
    for name, age in (("old.png", 60), ("new.png", 0)):
        path = noise(tmp_path / name, 1)
        os.utime(path, (time.time() - age,) * 2)
        KnownFiles().remember([(str(path), known)])
        assert list(KnownFiles().look_up([str(path)])) == [str(path)] * (age > 0)


@every_task
def test_what_belongs_to_an_image_goes_by_each_name_of_its_file(task, tmp_path):
    """As in a cache of the Hub, where files of equal content are links to one."""
    write(task, tmp_path / "d", range(6))
    by_content = {}
    for file in sorted((tmp_path / "d").rglob("*.png")):
        kept = by_content.setdefault(file.read_bytes(), tmp_path / "blobs" / str(len(by_content)))
        kept.parent.mkdir(exist_ok=True)
        file.replace(kept)
        file.symlink_to(kept)
    assert len(by_content) == (8 if task == "segment" else 6)
    found = TASKS[task].data.read(tmp_path / "d")
    assert sum(counts(found)) == 6 and not any("has no" in note for note in found.notes)


@every_task
def test_labels_that_differ_in_letter_case_alone_are_told(task, tmp_path):
    found = TASKS[task].data.read(write(task, tmp_path / "d", range(8), names=("Cat", "cat")))
    assert len(found.classes) == 2 and "labels Cat, cat differ only in letter case" in said(found)


@pytest.mark.parametrize("inner", [("disc", "square"), ("train", "test")])
def test_folders_of_one_name_in_every_label_are_told(inner, tmp_path):
    for seed in range(16):
        write("classify", tmp_path / ("trainset", "testset")[seed // 8], [seed], names=inner)
    found = classify.data.read(tmp_path)
    assert found.classes == ("testset", "trainset")
    assert f"folders that the others have too, {', '.join(sorted(inner))}: its own name is taken" in said(found)


def test_a_label_of_two_lines_can_be_drawn(tmp_path):
    fit(write("classify", tmp_path / "d", range(16), names=("a\nb", "c")), CHECKPOINT, tmp_path / "head")
    assert (tmp_path / "head" / "confusion.png").exists()


def test_images_of_which_none_can_be_held_out_are_refused(tmp_path):
    with pytest.raises(DataError, match="has no label with two images"):
        fit(write("detect", tmp_path / "d", range(2)), CHECKPOINT, tmp_path / "head")


def test_an_image_that_goes_while_data_is_read_is_named(tmp_path):
    gone = str(tmp_path / "gone.png")
    assert samples.check_images([gone]) == ({}, [f"{gone} does not exist"])
