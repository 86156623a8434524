"""The same boxes in each format that is read are the same ground truth, with the same odd rows left out aloud."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.learn import fit
from mlx_aimv2.learn.detect import data as boxes
from mlx_aimv2.learn.task_options import guess_task
from tests.labelled import CHECKPOINT, whole_reads

HEIGHT, WIDTH = 23, 31
NAMES = ("cat", "dog")

ROWS = {
    "two": [("cat", 2, 3, 11, 13), ("dog", 5, 7, 8, 9)],
    "none": [],
    "empty": [("dog", 4, 4, 5, 6), ("cat", 9, 9, 0, 7)],
    "out": [("cat", 20, 12, 14, 5)],
    "twice": [("dog", 1, 2, 7, 5), ("dog", 1, 2, 7, 5)],
}
"""Boxes of each image, left, top, width, height: what each format is given."""

WANTED = {
    "two": [("cat", 2, 3, 13, 16), ("dog", 5, 7, 13, 16)],
    "none": [],
    "empty": [("dog", 4, 4, 9, 10)],
    "out": [("cat", 20, 12, 31, 17)],
    "twice": [("dog", 1, 2, 8, 7)],
}
"""The corners that all of them are to give."""


def image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(levels).save(path)


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def coco(rows, prefix="", **extra):
    names = list(rows)
    return {
        "info": {},
        "images": [
            {"id": n, "file_name": f"{prefix}{name}.png", "width": WIDTH, "height": str(HEIGHT)}
            for n, name in enumerate(names)
        ],
        "categories": [{"id": 4, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 9, "image_id": n, "category_id": 3 + NAMES.index(own), "bbox": box}
            for n, name in enumerate(names)
            for own, *box in rows[name]
        ],
        **extra,
    }


def yolo(row):
    name, left, top, width, height = row
    shares = (left + width / 2) / WIDTH, (top + height / 2) / HEIGHT, width / WIDTH, height / HEIGHT
    return f"{NAMES.index(name)} {' '.join(map(repr, shares))}\n"


def polygon(row):
    name, left, top, width, height = row
    points = [left, top, left + width, top, left + width, top + height, left, top + height]
    shares = (value / (HEIGHT if axis % 2 else WIDTH) for axis, value in enumerate(points))
    return f"{NAMES.index(name)} {' '.join(map(repr, shares))}\n"


def voc(rows, name):
    objects = "".join(
        f"<object><name>{own}</name><bndbox><xmin>{left + (width > 0)}</xmin><ymin>{top + 1}</ymin>"
        f"<xmax>{left + width}</xmax><ymax>{top + height}</ymax></bndbox></object>"
        for own, left, top, width, height in rows
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"


def create_ml(rows):
    return [
        {
            "image": f"{name}.png",
            "annotations": [
                {"label": own, "coordinates": {"x": x + w / 2, "y": y + h / 2, "width": w, "height": h}}
                for own, x, y, w, h in rows[name]
            ],
        }
        for name in rows
    ]


def objects(rows, prefix="", *, of_lists=True):
    lines = []
    for name in rows:
        found = {"bbox": [list(row[1:]) for row in rows[name]], "categories": [row[0] for row in rows[name]]}
        if not of_lists:
            found = [{"bbox": list(row[1:]), "category": row[0]} for row in rows[name]]
        lines.append(json.dumps({"file_name": f"{prefix}{name}.png", "objects": found}) + "\n")
    return "".join(lines)


TWO_PARTS = {"train": ("two", "none", "empty"), "val": ("out", "twice")}


def by_part(write):
    """A writer of DATA that calls `write(root, part, rows)` for each part."""

    @functools.wraps(write)
    def whole(root):
        for part, names in TWO_PARTS.items():
            place = write(root, part, {name: ROWS[name] for name in names})
            for name in names:
                image(root / place.format(part=part, name=name), list(ROWS).index(name))

    return whole


@by_part
def coco_2017(root, part, rows):
    put(root / "annotations" / f"instances_{part}2017.json", coco(rows))
    return f"{part}2017/{{name}}.png"


@by_part
def roboflow(root, part, rows):
    put(root / part / "_annotations.coco.json", coco(rows))
    return "{part}/{name}.png"


@by_part
def label_studio(root, part, rows):
    put(root / part / "result.json", coco(rows, "images\\3\\"))
    return "{part}/images/{name}.png"


def cvat(root):
    put(root / "annotations" / "instances_default.json", coco(ROWS))
    for number, name in enumerate(ROWS):
        image(root / "images" / "default" / f"{name}.png", number)


def label_studio_prefix(root):
    put(root / "result.json", coco(ROWS, "/data/upload/1/"))
    for number, name in enumerate(ROWS):
        image(root / "images" / f"{name}.png", number)


def polygons(root):
    content = coco(ROWS)
    for entry in content["annotations"]:
        x, y, w, h = entry.pop("bbox")
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h], [x, y, x, y + h]]
    put(root / "_annotations.coco.json", content)
    for number, name in enumerate(ROWS):
        image(root / f"{name}.png", number)


@by_part
def yolo_images_labels(root, part, rows):
    put(
        root / "data.yaml",
        "path: ../elsewhere\ntrain: images/train\nval: images/val\ntest:\nnames:\n  0: cat\n  1: dog\n",
    )
    for name in rows:
        put(root / "labels" / part / f"{name}.txt", "".join(map(yolo, rows[name])))
    return "images/{part}/{name}.png"


@by_part
def yolo_roboflow(root, part, rows):
    put(
        root / "data.yaml",
        "train: ../train/images\nval: ../val/images\ntest: ../test/images\nnc: 2\nnames: ['cat', 'dog']\n",
    )
    for name in rows:
        put(root / part / "labels" / f"{name}.txt", "".join(map(polygon, rows[name])))
    return "{part}/images/{name}.png"


def yolo_label_studio(root):
    put(root / "classes.txt", "cat\ndog\n")
    for number, name in enumerate(ROWS):
        put(root / "labels" / f"{name}.txt", "".join(map(yolo, ROWS[name])))
        image(root / "images" / f"{name}.png", number)


@by_part
def yolo_darknet(root, part, rows):
    put(root / part / "_darknet.labels", "cat\ndog\n")
    put(root / part / "README.roboflow.txt", "pets\n")
    for name in rows:
        put(root / part / f"{name}.txt", "".join(map(yolo, rows[name])))
    return "{part}/{name}.png"


@by_part
def yolo_cvat(root, part, rows):
    put(root / "obj.names", "cat\ndog\n")
    for name in rows:
        put(root / f"obj_{part}_data" / f"{name}.txt", "".join(map(yolo, rows[name])))
    return "obj_{part}_data/{name}.png"


@by_part
def voc_2012(root, part, rows):
    put(root / "ImageSets" / "Main" / f"{part}.txt", "".join(f"{name}\n" for name in rows))
    put(root / "ImageSets" / "Main" / "zebra_train.txt", "two  1\nempty -1\n")
    put(root / "ImageSets" / "Main" / "trainval.txt", "".join(f"{name}\n" for name in ROWS))
    for name in rows:
        put(root / "Annotations" / f"{name}.xml", voc(rows[name], name))
    return "JPEGImages/{name}.png"


@by_part
def voc_beside(root, part, rows):
    for name in rows:
        put(root / part / f"{name}.xml", voc(rows[name], name))
    return "{part}/{name}.png"


def voc_kaggle(root):
    for number, name in enumerate(ROWS):
        put(root / "annotations" / f"{name}.xml", voc(ROWS[name], name))
        image(root / "images" / f"{name}.png", number)


def voc_in_images(root):
    for number, name in enumerate(ROWS):
        put(root / "images" / f"{name}.xml", voc(ROWS[name], name))
        image(root / "images" / f"{name}.png", number)


@by_part
def create_ml_roboflow(root, part, rows):
    put(root / part / "_annotations.createml.json", create_ml(rows))
    return "{part}/{name}.png"


def create_ml_flat(root):
    put(root / "annotations.json", create_ml(ROWS))
    for number, name in enumerate(ROWS):
        image(root / f"{name}.png", number)


@by_part
def hugging_face(root, part, rows):
    put(root / part / "metadata.jsonl", objects(rows))
    return "{part}/{name}.png"


def hugging_face_paths(root):
    text = "".join(
        objects({name: ROWS[name] for name in names}, f"{part}/", of_lists=part == "val")
        for part, names in TWO_PARTS.items()
    )
    put(root / "metadata.jsonl", text)
    for part, names in TWO_PARTS.items():
        for number, name in enumerate(names):
            image(root / part / f"{name}.png", number + 5 * (part == "val"))


EXPECTED = ("split by content", "taken for an image without objects", "the part test, does not exist")
"""What only some formats say, and rightly."""

WITH_PARTS = (
    *(coco_2017, roboflow, label_studio, yolo_images_labels, yolo_roboflow, yolo_darknet, yolo_cvat),
    *(voc_2012, voc_beside, create_ml_roboflow, hugging_face, hugging_face_paths),
)
WITHOUT = (cvat, label_studio_prefix, polygons, yolo_label_studio, voc_kaggle, voc_in_images, create_ml_flat)

every_format = pytest.mark.parametrize("write", [*WITH_PARTS, *WITHOUT], ids=lambda write: write.__name__)


def truths(found):
    """Corners by the name of the image, of all parts."""
    return {
        Path(sample.path).stem: [
            (found.classes[label], *np.round(box, 9).tolist())
            for label, box in zip(sample.target.labels, sample.target.boxes, strict=True)
        ]
        for part in found.splits.values()
        for sample in part
    }


def lines(data, **settings):
    with pytest.raises(ValueError) as caught:
        boxes.read(data, **settings)
    return getattr(caught.value, "lines", (str(caught.value),))


@every_format
def test_the_same_boxes_are_the_same_ground_truth_in_every_format(write, tmp_path):
    write(tmp_path)
    task, recognised = guess_task(tmp_path)
    assert task.name == "detect" and recognised.reason.startswith("boxes as ")
    found = boxes.read(tmp_path)
    assert found.classes == NAMES
    assert truths(found) == WANTED
    odd = [note for note in found.notes if not any(words in note for words in EXPECTED)]
    assert [note.count(".png") for note in odd] == [1, 1, 1], odd
    for words, name in (("no width or no height", "empty"), ("is a repetition", "twice"), ("extends beyond", "out")):
        assert any(words in note and f"{name}.png" in note and " more)" not in note for note in odd)
    if write in WITH_PARTS:
        assert [len(found.splits[part]) for part in ("train", "val", "test")] == [3, 2, 0]


@every_format
def test_fit_reads_each_file_that_describes_the_data_once(write, tmp_path, monkeypatch):
    write(tmp_path / "d")
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    counted = whole_reads(tmp_path / "d", tmp_path / "head", monkeypatch)
    assert counted and {file for file, count in counted.items() if count > 1} == set()


@every_format
def test_classes_of_a_head_are_met_by_name_in_every_format(write, tmp_path):
    write(tmp_path)
    found = boxes.read(tmp_path, classes=("ape", "dog", "cat"))
    assert found.classes == ("ape", "dog", "cat")
    own = truths(found)
    assert own == {name: WANTED[name] for name in own} and own
    assert any("the label cat" in line for line in lines(tmp_path, classes=("dog", "ape")))


def test_absolute_paths_are_met_in_a_folder_that_is_named_from_here(tmp_path, monkeypatch):
    coco_2017(tmp_path / "pets")
    for part, names in TWO_PARTS.items():
        rows = {name: ROWS[name] for name in names}
        content = coco(rows, f"{tmp_path}/pets/{part}2017/")
        put(tmp_path / "pets" / "annotations" / f"instances_{part}2017.json", content)
    monkeypatch.chdir(tmp_path)
    found = boxes.read(Path("pets"))
    assert truths(found) == WANTED
    assert "is not listed" not in "\n".join(found.notes)


def put_voc(root, **parts):
    """A VOC file for each image whose boxes are given as XML."""
    for number, (name, objects) in enumerate(parts.items()):
        image(root / "JPEGImages" / f"{name}.png", number)
        put(root / "Annotations" / f"{name}.xml", f"<annotation>{objects}</annotation>")


def test_difficult_objects_of_voc_are_neither_trained_on_nor_scored(tmp_path):
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>13</xmax><ymax>16</ymax></bndbox>"
    hard = f"<object><name>cat</name><difficult>1</difficult>{box}</object>"
    put_voc(tmp_path, a=hard, b=f"<object><name>cat</name><difficult>0</difficult>{box}</object>")
    _, found = boxes.read(tmp_path, classes=("cat",)).to_score()
    assert [sample.target.crowd.tolist() for sample in found] == [[True], [False]]
    assert [sample.target.boxes.tolist() for sample in found] == [[[2, 3, 13, 16]]] * 2
    assert any(
        "is difficult or a crowd: neither trained on nor scored" in note
        for note in boxes.read(tmp_path, classes=("cat",)).notes
    )


def test_a_part_that_voc_lists_without_files_is_told(tmp_path):
    voc_2012(tmp_path)
    put(tmp_path / "ImageSets" / "Main" / "test.txt", "000001\n000002\n")
    image(tmp_path / "JPEGImages" / "000001.png", 7)
    found = boxes.read(tmp_path)
    assert [len(found.splits[part]) for part in ("train", "val", "test")] == [3, 2, 0]
    notes = "\n".join(found.notes)
    assert "000001.png has no XML file of its name" in notes
    assert "test.txt has no image or nothing that belongs to it: left out (and 1 more)" in notes


def test_numbers_without_names_are_the_names_of_yolos_classes(tmp_path):
    yolo_label_studio(tmp_path)
    (tmp_path / "classes.txt").unlink()
    assert boxes.read(tmp_path).classes == ("0", "1")


def test_keypoints_behind_a_box_of_yolo_are_no_polygon(tmp_path):
    yolo_images_labels(tmp_path)
    for file in (tmp_path / "labels").rglob("*.txt"):
        file.write_text("".join(f"{line} .1 .2 .3 .4\n" for line in file.read_text().splitlines()))
    settings = tmp_path / "data.yaml"
    settings.write_text(settings.read_text() + "kpt_shape: [2, 2]\n")
    assert truths(boxes.read(tmp_path)) == WANTED


def test_names_of_yolo_stay_the_text_that_they_are(tmp_path):
    yolo_images_labels(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [no, 01]\n")
    assert boxes.read(tmp_path).classes == ("no", "01")


def test_a_class_of_yolo_without_name_shifts_no_other(tmp_path):
    yolo_images_labels(tmp_path)
    for file in (tmp_path / "labels").rglob("*.txt"):
        file.write_text(file.read_text().replace("1 0.", "2 0."))
    put(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [cat, '', dog]\n")
    assert truths(boxes.read(tmp_path)) == WANTED


def test_two_formats_in_one_folder_are_told(tmp_path):
    voc_kaggle(tmp_path)
    put(tmp_path / "labels" / "two.txt", yolo(ROWS["two"][0]))
    found = boxes.read(tmp_path)
    assert truths(found) == WANTED
    assert any("also has boxes as YOLO's text" in note for note in found.notes)


def entry(annotation):
    return json.dumps([{"image": "out.png", "annotations": [annotation]}])


def test_what_is_wrong_in_another_format_does_not_matter(tmp_path):
    coco_2017(tmp_path)
    put(tmp_path / "coco.yaml", "train: gone\nval: gone\nnames: [cat]\n")
    assert truths(boxes.read(tmp_path)) == WANTED


WRONG = {
    "a class beyond the names": (yolo_images_labels, "labels/val/out.txt", "2 .5 .5 .1 .1", "there is no class 2"),
    "a class by name": (yolo_images_labels, "labels/val/out.txt", "dog .5 .5 .1 .1", "there is no class dog"),
    "a box and its score": (yolo_images_labels, "labels/val/out.txt", "1 .5 .5 .1 .1 .9", "not four numbers"),
    "a box in pixels": (yolo_images_labels, "labels/val/out.txt", "1 10 10 5 5", "mostly outside the image"),
    "a text for a number": (yolo_images_labels, "labels/val/out.txt", "1 .5 nan .1 .1", "not four numbers"),
    "a number beyond all": (
        *(yolo_images_labels, "labels/val/out.txt"),
        *("1 1e308 .5 .1 .1", "mostly outside the image"),
    ),
    "no YAML": (yolo_images_labels, "data.yaml", "names: [a\ntrain: x", "data.yaml cannot be read as YAML"),
    "a folder that is gone": (
        yolo_images_labels,
        "data.yaml",
        "train: gone\nnames: [a]",
        "gone, which is not a folder of images",
    ),
    "a list of images": (yolo_images_labels, "data.yaml", "train: a.txt\nnames: [a]", "a.txt, which is not a folder"),
    "no XML": (voc_2012, "Annotations/out.xml", "<annotation><object>", "out.xml cannot be read as XML"),
    "entities": (voc_2012, "Annotations/out.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "defines entities"),
    "an object without box": (
        voc_2012,
        "Annotations/out.xml",
        "<annotation><object><name>a</name></object></annotation>",
        "not four numbers",
    ),
    "an object without name": (
        voc_2012,
        "Annotations/out.xml",
        "<annotation><object/></annotation>",
        "object 1 in out.xml has no name of its class",
    ),
    "another size": (voc_2012, "Annotations/out.xml", voc([], "out").replace("23", "24"), "out.xml has 24x31"),
    "no JSON": (create_ml_flat, "annotations.json", '[{"label": 1, "coordinates":', "not JSON"),
    "no image": (
        create_ml_flat,
        "annotations.json",
        '[{"annotations": [{"label": "a", "coordinates": {}}]}]',
        "has no image",
    ),
    "no number": (
        create_ml_flat,
        "annotations.json",
        entry({"label": "a", "coordinates": {"x": 1}}),
        "not four numbers",
    ),
    "no label": (
        create_ml_flat,
        "annotations.json",
        entry({"label": None, "coordinates": 3}),
        "has no name of its class",
    ),
    "unequal lists": (
        hugging_face,
        "val/metadata.jsonl",
        '{"file_name": "out.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": []}}',
        "has no name of its class",
    ),
    "no objects": (
        hugging_face,
        "train/metadata.jsonl",
        objects({"two": ROWS["two"]}) + '{"file_name": "none.png"}',
        "has no image or no list of its objects",
    ),
    "a file that is gone": (
        hugging_face,
        "val/metadata.jsonl",
        '{"file_name": "no.png", "objects": []}',
        "names no.png, but ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_file_is_named(case, tmp_path):
    write, file, text, words = WRONG[case]
    write(tmp_path)
    put(tmp_path / file, text)
    assert any(words in line for line in lines(tmp_path)), lines(tmp_path)


@pytest.mark.parametrize(
    ("write", "file"),
    [(yolo_darknet, "train/_darknet.labels"), (yolo_cvat, "obj.names"), (voc_2012, "ImageSets/Main/val.txt")],
)
def test_a_list_that_is_not_utf_8_is_told_with_what_else_is_wrong(write, file, tmp_path):
    write(tmp_path)
    assert (tmp_path / file).is_file()
    (tmp_path / file).write_bytes("café\nthé\n".encode("latin-1"))
    broken = next(tmp_path.glob("**/two.png"))
    broken.write_bytes(b"no image")
    told = "\n".join(lines(tmp_path))
    assert f"{Path(file).name} is not UTF-8 text" in told and f"{broken} is not an image" in told


def test_without_any_boxes_the_formats_are_named(tmp_path):
    image(tmp_path / "a.png", 1)
    assert "has no boxes in a format that is read: COCO JSON (annotations/*.json" in lines(tmp_path)[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_a_head_trained_on_boxes_of_another_program_beats_guessing(form, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    for part, seeds in (("train", range(12)), ("val", range(50, 56))):
        for seed in seeds:
            rng, kind = np.random.default_rng(seed), seed % 2
            x, y, side = *rng.integers(3, 30, 2), int(rng.integers(18, 27))
            levels = rng.integers(170, 256, (60, 60, 3))
            rows, columns = np.mgrid[:60, :60]
            disc = (columns - x - side / 2) ** 2 + (rows - y - side / 2) ** 2 < (side / 2) ** 2
            square = (abs(columns - x - side / 2) < side / 2) & (abs(rows - y - side / 2) < side / 2)
            levels[(disc, square)[kind]] = rng.integers(0, 90, 3)
            path = tmp_path / "d" / part / f"{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels.astype(np.uint8)).save(path)
            name = ("disc", "square")[kind]
            if form == "yolo":
                shares = (x + side / 2) / 60, (y + side / 2) / 60, side / 60, side / 60
                put(path.with_suffix(".txt"), f"{kind} {' '.join(map(str, shares))}\n")
            else:
                ends = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + side, y + side), strict=True)
                corners = "".join(f"<{end}>{value}</{end}>" for end, value in ends)
                put(
                    path.with_suffix(".xml"),
                    f"<annotation><object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>",
                )
    trained, untrained = (
        fit(tmp_path / "d", CHECKPOINT, tmp_path / name, **steps).scores["val"]["ap50"]
        for name, steps in (("trained", {"epochs": 30}), ("untrained", {"iters": 1}))
    )
    assert trained > 0.3 > 3 * untrained


def test_texts_of_yolo_are_met_in_either_unicode_form_and_letter_case(tmp_path):
    yolo_images_labels(tmp_path)
    for place, name in (("images", "ü{}"), ("labels", "u\u0308{}")):
        for file in [*(tmp_path / place).rglob("*.*")]:
            file.rename(
                file.with_name(name.format(file.stem) + (file.suffix.upper() if place == "labels" else file.suffix))
            )
    assert {name.lstrip("ü"): found for name, found in truths(boxes.read(tmp_path)).items()} == WANTED


def test_a_text_of_yolo_without_an_image_is_told(tmp_path):
    yolo_images_labels(tmp_path)
    put(tmp_path / "labels" / "train" / "alone.txt", "0 .5 .5 .1 .1\n")
    assert any("alone.txt has no image of its name" in note for note in boxes.read(tmp_path).notes)
