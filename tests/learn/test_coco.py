"""COCO JSON is read in its own and in Roboflow's layout, everything wrong is listed at once, results are written."""

import json

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.learn.detect import data as coco
from mlx_aimv2.learn.detect import results
from mlx_aimv2.learn.detect.boxes_average_precision import Detections
from mlx_aimv2.learn.tables import START


def content(count=5, name="{}.png", first=0, **changes):
    entries = {
        "images": [
            {"id": n, "file_name": name.format(n), "width": 31, "height": 23} for n in range(first, first + count)
        ],
        "annotations": [
            {"id": 70 + n, "image_id": n, "category_id": 3 + n % 2, "bbox": [2, 3, 11, 13], "area": 99, "iscrowd": 0}
            for n in range(first, first + count)
        ],
        "categories": [{"id": 4, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    return {**entries, **changes}


def write(file, data, images=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))
    for entry in data["images"]:
        path = (images or file.parent) / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(entry["id"]).integers(0, 255, (entry["height"], entry["width"], 3), np.uint8)
        Image.fromarray(levels).save(path)


def lines(data, **settings):
    with pytest.raises(ValueError) as caught:
        coco.read(data, **settings)
    return getattr(caught.value, "lines", (str(caught.value),))


def counts(dataset):
    return {part: len(samples) for part, samples in dataset.splits.items()}


def test_roboflows_folders_are_read(tmp_path):
    for first, part in enumerate(("train", "valid", "test")):
        write(tmp_path / part / "_annotations.coco.json", content(3, first=10 * first))
    assert coco.recognise(tmp_path).reason == "boxes as COCO JSON"
    found = coco.read(tmp_path)
    assert counts(found) == {"train": 3, "val": 3, "test": 3}
    assert found.classes == ("cat", "dog")  # in the order of their ids


def test_cocos_own_layout_is_read(tmp_path):
    write(tmp_path / "annotations" / "instances_train2017.json", content(4), tmp_path / "train2017")
    write(tmp_path / "annotations" / "instances_val2017.json", content(2, first=9), tmp_path / "images" / "val2017")
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    assert counts(coco.read(tmp_path)) == {"train": 4, "val": 2, "test": 0}


def test_one_file_is_split_by_content(tmp_path):
    write(tmp_path / "annotations" / "all.json", content(20), tmp_path / "images")
    found = coco.read(tmp_path)
    assert sum(counts(found).values()) == 20
    assert min(counts(found).values()) >= 2
    assert "20 images, split by content" in found.notes[0]


def test_boxes_become_corners_and_crowds_are_kept(tmp_path):
    data = content(1)
    data["annotations"][0] |= {"iscrowd": 1}
    write(tmp_path / "train" / "_annotations.coco.json", data)
    write(tmp_path / "valid" / "_annotations.coco.json", content(1, first=7))
    truth = coco.read(tmp_path).splits["train"][0].target
    assert truth.boxes.tolist() == [[2, 3, 13, 16]]
    assert (truth.labels.tolist(), truth.crowd.tolist(), truth.area.tolist()) == ([0], [True], [99])


def test_an_image_without_objects_stays(tmp_path):
    data = content(3)
    data["annotations"] = data["annotations"][:1]
    write(tmp_path / "train" / "_annotations.coco.json", data)
    write(tmp_path / "valid" / "_annotations.coco.json", content(1, first=7))
    truths = [sample.target for sample in coco.read(tmp_path).splits["train"]]
    assert [truth.boxes.shape for truth in truths] == [(1, 4), (0, 4), (0, 4)]


def test_roboflows_root_category_is_left_out_aloud(tmp_path):
    names = [{"id": 0, "name": "pets", "supercategory": "none"}]
    names += [{"id": n, "name": name, "supercategory": "pets"} for n, name in ((3, "cat"), (4, "dog"))]
    write(tmp_path / "train" / "_annotations.coco.json", content(2, categories=names))
    write(tmp_path / "valid" / "_annotations.coco.json", content(2, first=7, categories=names))
    found = coco.read(tmp_path)
    assert found.classes == ("cat", "dog")
    assert any("category pets is above others and has no objects" in note for note in found.notes)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([26, 3, 11, 13], "goes from 26,3 to 37,16, mostly outside the image of 31x23 (width x height)"),
        ([-8, 3, 11, 13], "mostly outside the image"),
        ([2, 3, 11], "not four numbers"),
        ([2, 3, "x", 5], "not four numbers"),
        ([2, 3, float("nan"), 5], "not four numbers"),
        (None, "not four numbers"),
    ],
)
def test_a_box_that_cannot_be_is_named(tmp_path, box, words):
    data = content(2)
    data["annotations"][1]["bbox"] = box
    write(tmp_path / "train" / "_annotations.coco.json", data)
    (line,) = lines(tmp_path)
    assert "1.png: the box of annotation 71" in line
    assert words in line


def test_a_box_is_cut_where_rounding_makes_it_stick_out(tmp_path):
    data = content(1)
    data["annotations"][0]["bbox"] = [-0.5, 3, 32, 20.5]
    write(tmp_path / "train" / "_annotations.coco.json", data)
    write(tmp_path / "valid" / "_annotations.coco.json", content(1, first=7))
    assert coco.read(tmp_path).splits["train"][0].target.boxes.tolist() == [[0, 3, 31, 23]]


def test_a_box_at_the_edge_is_cut_and_an_empty_one_left_out_aloud(tmp_path):
    data = content(3)
    for entry, box in zip(data["annotations"], ([25, 3, 11, 13], [2, 3, 0, 13], [2, 3, 7, 0]), strict=True):
        entry["bbox"] = box
    write(tmp_path / "train" / "_annotations.coco.json", data)
    write(tmp_path / "valid" / "_annotations.coco.json", content(1, first=7))
    found = coco.read(tmp_path)
    assert [sample.target.boxes.tolist() for sample in found.splits["train"]] == [[[25, 3, 31, 16]], [], []]
    assert "annotation 70 in _annotations.coco.json extends beyond its image: cut at the edge" in "\n".join(found.notes)
    assert "has no width or no height: left out (and 1 more)" in "\n".join(found.notes)


def test_a_box_that_is_there_twice_counts_once(tmp_path):
    data = content(2)
    data["annotations"] += [{**entry, "id": 90} for entry in data["annotations"]]
    data["annotations"] += [{**data["annotations"][0], "category_id": 4}]
    write(tmp_path / "train" / "_annotations.coco.json", data)
    write(tmp_path / "valid" / "_annotations.coco.json", content(1, first=7))
    found = coco.read(tmp_path)
    assert [sample.target.labels.tolist() for sample in found.splits["train"]] == [[0, 1], [1]]
    assert "is a repetition, with the same class: left out (and 1 more)" in "\n".join(found.notes)


def test_names_and_ids_may_be_numbers_or_text(tmp_path):
    names = [{"id": 4, "name": 7}, {"id": "3", "name": "cat"}]
    write(tmp_path / "train" / "_annotations.coco.json", content(2, categories=names))
    write(tmp_path / "valid" / "_annotations.coco.json", content(2, first=7, categories=names))
    found = coco.read(tmp_path)
    assert found.classes == ("cat", "7")
    assert [sample.target.labels.tolist() for sample in found.splits["train"]] == [[0], [1]]


def test_categories_of_one_name_are_one_class_though_the_root_be_called_so(tmp_path):
    names = [{"id": 0, "name": "cat", "supercategory": "none"}]
    names += [{"id": n, "name": name, "supercategory": "cat"} for n, name in ((3, "cat"), (4, "dog"))]
    write(tmp_path / "train" / "_annotations.coco.json", content(2, categories=names))
    write(tmp_path / "valid" / "_annotations.coco.json", content(2, first=7, categories=names))
    assert coco.read(tmp_path).classes == ("cat", "dog")


def test_a_class_above_itself_is_no_root(tmp_path):
    names = [{"id": n, "name": name, "supercategory": name} for n, name in ((3, "cat"), (4, "dog"))]
    write(tmp_path / "train" / "_annotations.coco.json", content(1, categories=names))
    write(tmp_path / "valid" / "_annotations.coco.json", content(1, first=7, categories=names))
    assert coco.read(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (
            (23, 31),
            "turned by its EXIF tag, 31x23 pixels upright (height x width), but _annotations.coco.json has 23x31",
        ),
        ((None, None), "turned by its EXIF tag, and _annotations.coco.json states no size"),
        (("31", 23), None),
        ((31, None), None),
    ],
)
def test_boxes_on_the_stored_pixels_of_a_turned_image_are_refused_with_the_reason(tmp_path, sides, words):
    write(tmp_path / "train" / "_annotations.coco.json", content(2))
    data, exif = content(2, first=7), Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((23, 31, 3), np.uint8)).save(tmp_path / "7.png", exif=exif)
    data["images"][0] |= {"height": sides[0], "width": sides[1]}
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "_annotations.coco.json").write_text(json.dumps(data))
    Image.new("RGB", (31, 23)).save(tmp_path / "valid" / "8.png")
    (tmp_path / "7.png").rename(tmp_path / "valid" / "7.png")
    if words is None:
        assert coco.read(tmp_path).splits["val"][0].size == (31, 23)
    else:
        (line,) = lines(tmp_path)
        assert words in line


def test_an_annotation_with_polygons_alone_has_their_box(tmp_path):
    data = content(1)
    data["annotations"][0] |= {"bbox": None, "segmentation": [[2, 3, 9, 3, 9, 16], [11, 5, 13, 7, 12, 9]]}
    write(tmp_path / "train" / "_annotations.coco.json", data)
    write(tmp_path / "valid" / "_annotations.coco.json", content(1, first=7))
    assert coco.read(tmp_path).splits["train"][0].target.boxes.tolist() == [[2, 3, 13, 16]]


def test_an_image_that_stands_twice_keeps_all_its_objects(tmp_path):
    data = content(2)
    data["images"].append({**data["images"][0], "id": 9})
    data["annotations"].append({"id": 5, "image_id": 9, "category_id": 4, "bbox": [1, 1, 5, 5]})
    write(tmp_path / "train" / "_annotations.coco.json", data)
    write(tmp_path / "valid" / "_annotations.coco.json", content(1, first=7))
    found = coco.read(tmp_path)
    assert [len(sample.target.boxes) for sample in found.splits["train"]] == [2, 1]
    assert "0.png occurs more than once in _annotations.coco.json" in "\n".join(found.notes)


def test_everything_wrong_is_listed_at_once(tmp_path):
    data = content(7)
    data["annotations"][2]["image_id"] = 99
    data["annotations"][3]["category_id"] = 98
    data["annotations"][4]["bbox"] = [0, 0, 100, 5]
    data["annotations"].append({"id": 5})
    write(tmp_path / "train" / "_annotations.coco.json", data)
    (tmp_path / "train" / "0.png").unlink()
    (tmp_path / "train" / "1.png").write_bytes(b"no image")
    Image.new("RGB", (23, 31), (3, 5, 7)).save(tmp_path / "train" / "5.png")
    found = "\n".join(lines(tmp_path))
    for part in (
        "names 0.png, but ",
        "1.png is not an image",
        "annotation 72 has the image_id 99, which is not among its images and",
        "annotation 73 has the category_id 98, which is not among its",
        "4.png: the box of annotation 74",
        "5.png has 31x23 pixels upright (height x width), but _annotations.coco.json has 23x31",
        "an entry of annotations has no usable image_id",
    ):
        assert part in found
    assert len(lines(tmp_path)) == 7


def test_a_class_outside_the_list_is_wrong(tmp_path):
    write(tmp_path / "train" / "_annotations.coco.json", content(2))
    assert "the label dog (1 image) is not in the list cat, cow" in lines(tmp_path, classes=("cat", "cow"))[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("[]", "is no COCO JSON"), ('{"images": []}', "list of annotations")],
)
def test_a_file_that_is_no_coco_json_is_named(tmp_path, text, words):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "_annotations.coco.json").write_text(text)
    assert words in lines(tmp_path)[0]


def test_no_object_at_all_is_wrong(tmp_path):
    write(tmp_path / "train" / "_annotations.coco.json", content(2, annotations=[]))
    assert "has no labelled images" in lines(tmp_path)[0]


def test_two_files_for_one_part_are_refused(tmp_path):
    for name in ("instances_train.json", "instances_train2017.json"):
        write(tmp_path / "annotations" / name, content(2), tmp_path / "images")
    assert "both mean train" in lines(tmp_path)[0]


def test_results_are_a_coco_file_with_scores(tmp_path):
    found = Detections(np.array([[2.0, 3, 13, 16.125]]), np.array([1]), np.array([0.75]), (23, 31))
    results.save_all([("a.png", found)], ("cat", "dog"), tmp_path)
    got = json.loads((tmp_path / "predictions.coco.json").read_text())
    assert got["images"] == [{"id": 1, "file_name": "a.png", "width": 31, "height": 23}]
    assert got["categories"][1] == {"id": 2, "name": "dog"}
    (entry,) = got["annotations"]
    assert (entry["bbox"], entry["category_id"], entry["score"]) == ([2.0, 3.0, 11.0, 13.12], 2, 0.75)


def test_a_file_is_known_by_its_start_though_images_alone_fill_it(tmp_path):
    data = content(6)
    for entry in data["images"]:
        entry["coco_url"] = "http://" + "x" * START
    write(tmp_path / "result.json", data)
    assert counts(coco.read(tmp_path)) and coco.recognise(tmp_path) is not None


def test_one_id_for_two_categories_is_refused(tmp_path):
    data = content(6, categories=[{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 4, "name": "dog"}])
    write(tmp_path / "_annotations.coco.json", data)
    assert "gives one id, 3, to cat and dog" in lines(tmp_path)[0]


@pytest.mark.parametrize(
    ("box", "words"), [([0.1, 0.2, 0.3, 0.4], "is within one pixel"), (None, "is missing, not four numbers")]
)
def test_a_box_in_shares_and_one_that_is_missing_are_refused(tmp_path, box, words):
    data = content(6)
    data["annotations"][0]["bbox"] = box
    write(tmp_path / "_annotations.coco.json", data)
    assert words in lines(tmp_path)[0]
