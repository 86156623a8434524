"""Tables of labels as people have them: what means one thing is read and named, what does not is refused."""

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import bundled
from mlx_aimv2.cli import main
from mlx_aimv2.learn import classify, evaluate, fit
from mlx_aimv2.learn.samples import DataError
from mlx_aimv2.learn.task_options import guess_task
from tests.labelled import CHECKPOINT

ROWS = [(f"img/{label}{number}.png", label) for label in ("disc", "square") for number in range(4)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def data(tmp_path):
    """A folder with the images of `ROWS`, 11 x 17."""
    for seed, (name, _) in enumerate(ROWS):
        save(tmp_path / "d" / name, seed)
    return tmp_path / "d"


def save(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (11, 17, 3), np.uint8)).save(file)


def table(separator=",", header="file_name,label", end="\n", rows=ROWS):
    lines = [header, *(separator.join(map(str, row)) for row in rows)]
    return "".join(f"{line}{end}" for line in lines)


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(folder, **settings):
    return classify.data.read(folder, **settings)


def refused(folder, **settings):
    with pytest.raises(DataError) as error:
        read(folder, **settings)
    return error.value.lines


def count(dataset):
    return sum(map(len, dataset.splits.values()))


QUOTED = [(f'"{name}"', f'"a ""{label}"", x\ny"') for name, label in ROWS]
NUMBERS = [(name, float(label == "disc")) for name, label in ROWS]
IN_FORMS = [(name, "café" if label == "disc" else label) for name, label in ROWS]

READ = {
    "semicolons": ("metadata.csv", table(";", "file_name;label"), ""),
    "tabs": ("metadata.csv", table("\t", "file_name\tlabel"), ""),
    "blanks": ("metadata.csv", table(", ", " file_name , label "), ""),
    "capitals": ("metadata.csv", table(header="File_Name,LABEL"), ""),
    "filename": ("metadata.csv", table(header="filename,label"), "has the column filename as its file_name"),
    "other names": ("metadata.csv", table(header="image,Category"), "has the column category as its label"),
    "byte order mark": ("metadata.csv", "\ufeff" + table(), ""),
    "utf-16": ("metadata.csv", table().encode("utf-16"), ""),
    "windows": ("metadata.csv", table(end="\r\n"), ""),
    "old mac": ("metadata.csv", table(end="\r"), ""),
    "empty last rows": ("metadata.csv", table() + ",\n,\n\n", "line 10, is an empty row: left out (and 1 more)"),
    "blank lines first": ("metadata.csv", "\n\n" + table(), ""),
    "more columns": ("metadata.csv", table(header=",file_name,label,", rows=[(1, *row, "") for row in ROWS]), ""),
    "backslashes": ("metadata.csv", table().replace("img/", "img\\"), ""),
    "row twice": (
        "metadata.csv",
        table(rows=[*ROWS, ROWS[0]]),
        "line 10: img/disc0.png is a repetition, with the same",
    ),
    "no suffix": ("metadata.csv", table(header="id,breed").replace(".png", ""), "has the column id as its file_name"),
    "tsv": ("labels.tsv", table("\t", "path\tclass"), "has the column class as its label"),
    "csv of another name": ("train.csv", table(header="image_id,label"), "has the column image_id as its file_name"),
    "beside the folder": ("labels.csv", table().replace("img/", ""), "labels.csv has its images in img/"),
    "json lines": ("metadata.jsonl", lines({"file_name": name, "label": label} for name, label in ROWS), ""),
    "json capitals": ("data.jsonl", lines({"Image": name, "Label": label} for name, label in ROWS), "column image"),
    "lists of one as JSON": ("metadata.csv", table(rows=[(name, f'"[""{label}""]"') for name, label in ROWS]), ""),
    "lists of one as Python shows them": ("metadata.csv", table(rows=[(n, f"['{label}']") for n, label in ROWS]), ""),
    "Open Images": ("labels.csv", table(header="ImageID,LabelName").replace(".png", ""), "has the column labelname"),
    "list of one": ("metadata.jsonl", lines({"file_name": name, "labels": [label]} for name, label in ROWS), "labels"),
}


@pytest.mark.parametrize("case", READ)
def test_a_table_that_means_one_thing_is_read(data, case):
    file, text, note = READ[case]
    (data / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert guess_task(data)[0].name == "classify"
    found = read(data)
    assert found.classes == ("disc", "square") and count(found) == 8
    assert all(found.classes[one.target] in one.path for part in found.splits.values() for one in part)
    assert note in "\n".join(found.notes)


@pytest.mark.parametrize(
    ("file", "text", "classes"),
    [
        ("metadata.csv", table(rows=NUMBERS), ("0", "1")),
        ("metadata.jsonl", lines({"file_name": name, "label": label} for name, label in NUMBERS), ("0", "1")),
        (
            "metadata.jsonl",
            lines({"file_name": name, "label": bool(label)} for name, label in NUMBERS),
            ("False", "True"),
        ),
        ("metadata.csv", table(rows=QUOTED), ('a "disc", x\ny', 'a "square", x\ny')),
        ("metadata.csv", table(rows=IN_FORMS), ("café", "square")),
        ("metadata.csv", unicodedata.normalize("NFD", table(rows=IN_FORMS)), ("café", "square")),
    ],
)
def test_labels_are_text_or_whole_numbers(data, file, text, classes):
    (data / file).write_text(text, encoding="utf-8", newline="")
    assert read(data).classes == classes


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_met_in_either_unicode_form(data, form):
    """A table from Linux beside images from a Mac, and the other way round."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    for name, _ in ROWS:
        (data / name).rename(data / unicodedata.normalize(form, name.replace("disc", "dïsc")))
    rows = [(unicodedata.normalize(other, name.replace("disc", "dïsc")), label) for name, label in ROWS]
    (data / "metadata.csv").write_text(table(rows=rows), encoding="utf-8")
    assert count(read(data)) == 8


THREE = [(*row, "1") for row in ROWS]

REFUSED = {
    "two columns of one name": (table(header="file_name,label,Label", rows=THREE), "label occurs more than once"),
    "several labels as JSON": (
        table(rows=[(name, '"{""choices"": [""a"", ""b""]}"') for name, _ in ROWS]),
        "img/disc0.png has no single label",
    ),
    "several labels as Python shows them": (
        table(rows=[(name, """"['a', 'b']\"""") for name, _ in ROWS]),
        "img/disc0.png has no single label",
    ),
    "cp1252": (
        table().replace("disc\n", "disqué\n").encode("cp1252"),
        "line 2, is not UTF-8 (cp1252, perhaps: img/disc0.png,disqué)",
    ),
    "utf-16 without its mark": (table().encode("utf-16-le"), "which holds NULs, is no text in UTF-8"),
    "no header": (
        table().partition("\n")[2],
        "metadata.csv has no column file_name and no column label among its columns (img/disc0.png, disc)",
    ),
    "two columns of images": (
        table(header="image,path,label", rows=THREE),
        "has 2 columns that may be file_name (image, path): call one",
    ),
    "two of labels": (
        table(header="file_name,class,category", rows=THREE),
        "has 2 columns that may be label (class, category): call one",
    ),
    "more cells than columns": (table() + "img/disc0.png,disc, small\n", "line 10: 3 cells, but 2 columns: quote"),
    "an unfinished quote": (table() + '"img/disc0.png,disc\n', "unexpected end of data"),
    "two labels": (table(rows=[*ROWS, (ROWS[0][0], "x")]), "line 10: img/disc0.png has another label in another row"),
    "a number that is not whole": (
        table(rows=[(name, 0.5) for name, _ in ROWS]),
        "whole number; --task regression learns numbers",
    ),
    "a missing image": (table() + "img/disc9.png,disc\n", "line 10: img/disc9.png does not exist"),
    "a long name": (table() + f"{'n' * 300}.png,disc\n", "line 10: nnnn"),
    "a list of labels": (
        lines({"file_name": name, "label": [label, "x"]} for name, label in ROWS),
        "has no single label: --task multilabel takes several per image",
    ),
    "no text": (lines({"file_name": name, "label": {"a": 1}} for name, label in ROWS), "has no single label"),
    "deep json": (
        lines({"file_name": name, "label": label} for name, label in ROWS) + "[" * 100_000,
        'line 9: wanted {"file_name": …}, got no JSON object',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_is_unclear_is_refused_with_what_to_change(data, case):
    text, words = REFUSED[case]
    is_json = case in ("a list of labels", "no text", "deep json")
    file = data / ("metadata.jsonl" if is_json else "metadata.csv")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = refused(data)
    assert words in "\n".join(found) and max(map(len, found)) < 400


def test_a_row_without_a_label_is_left_out_as_an_image_that_is_not_listed_is(data):
    (data / "metadata.csv").write_text(table().replace(",disc\n", ", \n", 1))
    found = read(data)
    assert count(found) == 7 and "line 2: img/disc0.png has no label: left out" in found.notes[-1]
    assert found.left_out == (f"{data / 'metadata.csv'}, line 2: img/disc0.png has no label: left out",)


def test_a_column_says_the_part_of_an_image(data):
    rows = [(*row, ("train", "train", "validation", "test")[number % 4]) for number, row in enumerate(ROWS)]
    (data / "metadata.csv").write_text(table(header="file_name,label,Split", rows=rows))
    parts = read(data).splits
    assert {part: len(found) for part, found in parts.items()} == {"train": 4, "val": 2, "test": 2}
    assert all(one.path.endswith("3.png") for one in parts["test"])


@pytest.mark.parametrize("place", ["{part}.csv", "{part}/metadata.csv", "{part}/labels.csv"])
def test_tables_of_parts_are_told_apart_by_their_names(tmp_path, place):
    for number, part in enumerate(("train", "test")):
        rows = [(f"{part}/{name}", label) for name, label in ROWS]
        for seed, (name, _) in enumerate(rows):
            save(tmp_path / name, 20 * number + seed)
        if "/" in place:
            rows = ROWS
        (tmp_path / place.format(part=part)).write_text(table(rows=rows))
    found = read(tmp_path)
    assert len(found.splits["test"]) == 8 and all("/test/" in one.path for one in found.splits["test"])


def test_two_tables_that_list_images_are_refused(data):
    for name in ("labels.csv", "sample_submission.csv"):
        (data / name).write_text(table())
    assert "both list images: keep one, or call it metadata.csv" in refused(data)[0]


def test_folders_with_a_table_each_are_no_labels(tmp_path):
    for batch in ("one", "two"):
        for seed, (name, _) in enumerate(ROWS):
            save(tmp_path / batch / name, seed + 20 * (batch == "two"))
        (tmp_path / batch / "metadata.csv").write_text(table())
    assert guess_task(tmp_path)[1].reason == "labels in metadata.csv"
    found = read(tmp_path)
    assert found.classes == ("disc", "square") and count(found) == 16


def test_folders_name_the_labels_where_a_table_agrees_or_has_none(tmp_path):
    rows = [(name.replace("img/", f"{label}/"), label) for name, label in ROWS]
    for seed, (name, _) in enumerate(rows):
        save(tmp_path / name, seed)
    (tmp_path / "metadata.csv").write_text(table(header="file_name,text", rows=rows))
    assert read(tmp_path).classes == ("disc", "square")
    (tmp_path / "birds.csv").write_text(table(header="filepaths,labels", rows=rows))
    assert "birds.csv is not read, because folders name the labels" in "\n".join(read(tmp_path).notes)
    (tmp_path / "birds.csv").write_text(table(header="filepaths,labels", rows=[(name, "x") for name, _ in rows]))
    assert "birds.csv has other labels: name it metadata.csv if they are right" in refused(tmp_path)[0]


@pytest.mark.parametrize(
    ("name", "header"), [("sample_submission.csv", "file,species"), ("HAM10000_metadata.csv", "image_id,dx")]
)
def test_a_table_of_something_else_beside_folders_is_named(tmp_path, name, header):
    for seed, (file, label) in enumerate(ROWS):
        save(tmp_path / "train" / label / file, seed)
    save(tmp_path / "test" / "0.png", 99)
    (tmp_path / name).write_text(table(header=header, rows=[("0.png", "disc")]))
    found = read(tmp_path)
    assert found.classes == ("disc", "square") and count(found) == 8
    assert f"{name} is not read, because folders name the labels" in "\n".join(found.notes)


def test_a_table_of_no_part_beside_one_of_a_part_is_not_scored(tmp_path):
    """Kaggle's sample_submission.csv has labels, which say nothing."""
    for seed, (name, _) in enumerate([*ROWS, ("x.png", "")]):
        save(tmp_path / ("test_images" if name == "x.png" else "train_images") / name, seed)
    (tmp_path / "train.csv").write_text(table(header="image_id,label"))
    (tmp_path / "sample_submission.csv").write_text("image_id,label\nx.png,disc\n")
    found = read(tmp_path)
    assert count(found) == 8 and all("train_images" in one.path for part in found.splits.values() for one in part)
    assert "sample_submission.csv belongs to no part, unlike others: not read" in "\n".join(found.notes)


def test_a_column_for_each_label_is_several_labels_an_image(tmp_path):
    """As Roboflow exports a classification with several labels."""
    for seed, part in enumerate(("train", "valid")):
        save(tmp_path / part / "0.png", seed)
        (tmp_path / part / "_classes.csv").write_text("filename, cat, dog\n0.png, 1, 1\n")
    words = "train/_classes.csv has no column label among its columns (filename, cat, dog); several labels per image, a"
    assert words in "\n".join(refused(tmp_path))


NOT_READ = {
    "metadata.parquet": "is a table with images in it, which is not read",
    "data/train-00000-of-00001.parquet": "is a table with images in it",
    "train.tfrecord-00000-of-00002": "contains records, which are not read",
    "photos.zip": "is an archive: unpack it",
    "0.tar": "is an archive, whose images only pretrain and lit can read",
    "labels.xlsx": "is a spreadsheet",
    "x.npz": "has arrays",
    "data.yaml": "has an unsupported format",
    "annotations.json": "has an unsupported format",
    "metadata.csv": "has no column label among its columns (file_name, text)",
    "list.csv": "has no column file_name and no column label among its columns (a, b)",
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_lies_there_is_named_and_never_denied(data, name):
    file = data / name
    file.parent.mkdir(exist_ok=True)
    file.write_text({"metadata.csv": table(header="file_name,text"), "list.csv": "a,b\n1,2\n"}.get(name, "{}"))
    assert any(f"{file} {NOT_READ[name]}" in line for line in refused(data)), "beside a folder that is no label"
    for image in sorted(data.rglob("*.png")):
        image.unlink()
    with pytest.raises(DataError, match="has no labelled images in a form that fit reads: ") as error:
        guess_task(data)
    assert f"{file} {NOT_READ[name]}" in str(error.value)


def test_long_labels_are_shortened_where_they_are_shown(data, capsys):
    (data / "metadata.csv").write_text(table(rows=[(name, label * 20_000) for name, label in ROWS]))
    assert max(map(len, refused(data, classes=["cat"]))) < 1000
    assert main(["fit", str(data), "-m", str(CHECKPOINT), "-o", str(data.parent / "head"), "--labels", "a,b"]) == 2
    assert len(capsys.readouterr().err) < 2000


def digits_as(folder, place, *, per_class=8, start=0):
    """Scans of 0 and 1, a file each at `place(label, number)` below the folder; rows of name and label."""
    scans, rows = bundled.digits(), []
    for label in (0, 1):
        for number, image in enumerate(scans.train_images[scans.train_labels == label][start : start + per_class]):
            file = folder / place.format(label=("nought", "one")[label], number=number)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
            rows.append((file.relative_to(folder).as_posix(), ("nought", "one")[label]))
    return rows


def kaggle(folder):
    digits_as(folder, "Training/{label}/{number}.png", per_class=12)
    digits_as(folder, "Testing/{label}/{number}.png", start=20)
    (folder / "Testing" / "Thumbs.db").touch()


def intel(folder):
    digits_as(folder, "seg_train/seg_train/{label}/{number}.png", per_class=12)
    digits_as(folder, "seg_test/seg_test/{label}/{number}.png", start=20)
    Image.new("RGB", (5, 5)).save(folder / "seg_test" / "seg_test" / "loose.png")


def hugging_face(folder):
    for part, start in (("train", 0), ("test", 20)):
        rows = digits_as(folder / part, "{label}-{number}.png", per_class=12, start=start)
        (folder / part / "metadata.csv").write_text(table(rows=[*rows, ("", "")]))


def dog_breeds(folder):
    rows = digits_as(folder, "train/{label}{number}.png", per_class=20)
    (folder / "labels.csv").write_text(table(header="id,breed", rows=[(name[6:-4], label) for name, label in rows]))
    digits_as(folder, "test/held-{label}{number}.png", per_class=2, start=40)


@pytest.mark.parametrize("layout", [kaggle, intel, hugging_face, dog_breeds])
def test_data_as_downloaded_is_learned_better_than_guessed(tmp_path, layout):
    layout(tmp_path / "d")
    fitted = fit(tmp_path / "d", CHECKPOINT, tmp_path / "head")
    assert fitted.scores["test"]["top1"] > 0.7 and fitted.images["test"] >= 6
    assert evaluate(tmp_path / "head", tmp_path / "d").scores["top1"] > 0.7


@pytest.mark.parametrize(
    "header",
    ["filename,width,height,class,xmin,ymin,xmax,ymax", "image_id,bbox,label", "filename,tag,Region_Shape_Attributes"],
)
def test_a_table_of_boxes_is_not_taken_for_labels(data, header):
    rows = [(name, *[label] * header.count(",")) for name, label in ROWS]
    (data / "_annotations.csv").write_text(table(header=header, rows=rows))
    assert "_annotations.csv has boxes (" in "".join(refused(data))


def test_images_that_rows_name_by_another_way_are_not_told_as_left_out(data):
    (data / "img" / "metadata.csv").write_text(table().replace("img/", "../img/"))
    found = read(data)
    assert count(found) == 8 and not any("is not listed" in note for note in found.notes)
