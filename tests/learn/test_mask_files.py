"""Images with masks are found in every usual layout, and everything wrong with them is listed at once."""

import zlib

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.learn.samples import DataError
from mlx_aimv2.learn.segment import data as mask_files


def image(path, size=(11, 7), seed=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)) + sum(map(ord, str(path))) if seed is None else seed)
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(path)


def mask(path, values=(0, 1, 2), size=(11, 7), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.resize(np.array(values, np.uint8), size)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([n for v in range(256) for n in (v, 255 - v, 7)])
    image.save(path)


def folder(root, count=7, layout="{part}/images/{name}", masks="{part}/masks/{name}", parts=("",), **settings):
    for part in parts:
        for number in range(count):
            seed = zlib.crc32(f"{part}{number}".encode())  # hash() would give others in each process
            image(root / layout.format(part=part, name=f"{part}{number}.jpg").lstrip("/"), seed=seed)
            mask(root / masks.format(part=part, name=f"{part}{number}.png").lstrip("/"), **settings)
    return root


def lines(data, **settings):
    with pytest.raises(DataError) as caught:
        mask_files.read(data, **settings)
    return caught.value.lines


@pytest.mark.parametrize(
    ("layout", "masks"),
    [
        ("{part}/images/{name}", "{part}/masks/{name}"),
        ("images/{part}/{name}", "annotations/{part}/{name}"),
        ("img_dir/{part}/{name}", "ann_dir/{part}/{name}"),
        ("{part}/JPEGImages/{name}", "{part}/SegmentationClass/{name}"),
    ],
)
def test_every_usual_layout_is_read(tmp_path, layout, masks):
    data = folder(tmp_path, 3, layout, masks, parts=("train", "val"))
    assert mask_files.recognise(data)
    found = mask_files.read(data)
    assert {part: len(samples) for part, samples in found.splits.items()} == {"train": 3, "val": 3, "test": 0}
    assert found.classes == ("0", "1", "2")


def test_without_parts_the_images_are_split(tmp_path):
    found = mask_files.read(folder(tmp_path, 20))
    assert [len(found.splits[part]) for part in ("train", "val", "test")] == [14, 3, 3]
    assert all(sample.target.replace("masks", "images")[:-4] == sample.path[:-4] for sample in found.splits["train"])


def test_a_palette_mask_holds_its_indices_and_not_its_colours(tmp_path):
    mask(tmp_path / "m.png", (0, 3, 255), mode="P")
    assert np.unique(mask_files.read_mask(str(tmp_path / "m.png"))).tolist() == [0, 3, 255]


def test_what_nobody_labelled_stays_so_where_a_head_numbers_the_classes_otherwise(tmp_path):
    (folder(tmp_path, values=(0, 1, 2, 255)) / "classes.txt").write_text("sky\nsea\nland\n")
    found = mask_files.read(tmp_path, classes=("land", "sky", "sea"))
    values = mask_files.read_mask(found.splits["test"][0].target)
    assert values.ravel()[:4].tolist() == [1, 2, 0, 255]


def test_classes_are_the_lines_of_the_file(tmp_path):
    (folder(tmp_path) / "classes.txt").write_text("sky\nsea\nland\n")
    assert mask_files.read(tmp_path).classes == ("sky", "sea", "land")


def test_two_classes_of_one_name_are_refused(tmp_path):
    (folder(tmp_path) / "classes.txt").write_text("sky\nsea\n sky\n")
    assert lines(tmp_path) == (f"{tmp_path / 'classes.txt'} names sky twice",)


def test_a_value_beyond_the_classes_is_named(tmp_path):
    (folder(tmp_path, 2, values=(0, 1, 7, 255)) / "classes.txt").write_text("sky\nsea\n")
    assert [line.split(" has the value ")[1] for line in lines(tmp_path)] == [
        "7, but only 0, 1 have names (255 is ignored)"
    ] * 2


def test_everything_wrong_is_listed_at_once(tmp_path):
    data = folder(tmp_path, 9)
    mask(data / "masks" / "3.png", size=(7, 11))
    (data / "images" / "4.jpg").write_bytes(b"no image")
    (data / "masks" / "5.png").write_bytes(b"no mask")
    Image.new("RGB", (7, 11)).save(data / "masks" / "6.png")
    Image.fromarray(np.full((11, 7), 300, np.uint16)).save(data / "masks" / "7.png")
    found = "\n".join(lines(data))
    for part in (
        "3.jpg has 11x7 pixels upright (height x width), but its mask ",
        "4.jpg is not an image",
        "5.png is not an image",
        "6.png has the colour mode RGB; a mask holds one class number per pixel",
        "7.png has the value 300: classes go from 0 to 254",
    ):
        assert part in found
    assert len(lines(data)) == 5


def test_an_image_without_mask_and_a_mask_without_image_are_left_out_aloud(tmp_path):
    data = folder(tmp_path, 9)
    (data / "masks" / "1.png").unlink()
    (data / "images" / "2.jpg").unlink()
    found = mask_files.read(data)
    assert sum(map(len, found.splits.values())) == 7
    said = "\n".join(found.notes)
    assert "1.jpg has no mask of its name in " in said and "2.png has no image of its name in " in said
    for file in (data / "masks").iterdir():
        file.rename(file.with_name(f"of-{file.stem}.png"))
    assert "no image in" in lines(data)[0] and "has a mask of its name in" in lines(data)[0]


def test_one_value_is_no_segmentation(tmp_path):
    assert "has only one label, 3: training needs at least 2" in lines(folder(tmp_path, values=(3, 255)))[0]
    folder(tmp_path / "other", values=(255,))
    assert "has no labelled images" in lines(tmp_path / "other")[0]


def test_values_without_names_are_the_numbers_of_the_classes(tmp_path):
    found = mask_files.read(folder(tmp_path, 9, values=(0, 3, 255)))
    assert found.classes == ("0", "1", "2", "3")
    assert np.unique(mask_files.read_mask(found.splits["train"][0].target)).tolist() == [0, 3, 255]


def test_a_folder_without_masks_is_not_for_segmentation(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    assert mask_files.recognise(tmp_path) is None
    assert "has no masks" in lines(tmp_path)[0]
