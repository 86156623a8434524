"""Images with masks are found in every usual layout, and everything wrong with them is listed at once."""

import zlib

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.learn.samples import DataError
from mlx_aimv2.learn.segment import data as mask_files
from mlx_aimv2.learn.task_options import guess_task
from tests.labelled import whole_reads


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
            stem = f"{part}{number}"
            image(root / layout.format(part=part, stem=stem, name=f"{stem}.jpg").lstrip("/"), seed=seed)
            mask(root / masks.format(part=part, stem=stem, name=f"{stem}.png").lstrip("/"), **settings)
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
        ("leftImg8bit/{part}/ulm/{stem}_leftImg8bit.png", "gtFine/{part}/ulm/{stem}_gtFine_labelIds.png"),
        ("{part}/images/{name}", "{part}/masks/{stem}_mask.png"),
        ("{part}/{name}", "{part}/{stem}_mask.png"),
        ("{part}/{name}", "{part}/masks/{name}"),
        ("JPEGImages/{name}", "SegmentationClass/{name}"),
    ],
)
def test_every_usual_layout_is_read(tmp_path, layout, masks):
    data = folder(tmp_path, 3, layout, masks, parts=("train", "val"))
    if layout.startswith("JPEG"):  # VOC: images without masks, and lists of each part and class
        lists = data / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        for part in ("train", "val"):
            image(data / layout.format(name=f"more-{part}.jpg"))
            (lists / f"{part}.txt").write_text("".join(f"{part}{number}\n" for number in range(3)))
        (lists / "trainval.txt").write_text("train0\nval0\n")
    assert mask_files.recognise(data)
    found = mask_files.read(data)
    assert {part: len(samples) for part, samples in found.splits.items()} == {"train": 3, "val": 3, "test": 0}
    assert found.classes == ("0", "1", "2")
    wanted = ["has no mask of its name"] if layout.startswith("JPEG") else []
    assert [note for note in found.notes if not any(words in note for words in wanted)] == []
    assert guess_task(data)[0].name == "segment"


def test_a_list_of_a_part_that_lacks_an_image_and_an_image_without_list_are_told(tmp_path, monkeypatch):
    data = folder(tmp_path, 9, "JPEGImages/{name}", "SegmentationClass/{name}")
    lists = data / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n3\n4\n77\n")
    (lists / "val.txt").write_text("5\n6\n7\n")
    found = mask_files.read(data)
    assert {part: len(samples) for part, samples in found.splits.items()} == {"train": 5, "val": 3, "test": 0}
    said = "\n".join(found.notes)
    assert "77 in " in said and "8.jpg is in no list of " in said
    assert dict(whole_reads(data, tmp_path / "head", monkeypatch)) == dict.fromkeys(map(str, lists.iterdir()), 1)


@pytest.mark.parametrize("classes", [None, "sky\nsea\n"])
def test_masks_of_0_and_255_alone_are_black_and_white(tmp_path, classes):
    data = folder(tmp_path, 9, values=(0, 255, 255))
    mask(data / "masks" / "3.png", (0,))
    if classes:
        (data / "classes.txt").write_text(classes)
    found = mask_files.read(data)
    names = ("sky", "sea") if classes else ("0", "1")
    assert found.classes == names
    assert f"255 is taken for class {names[1]}" in "\n".join(found.notes)
    values = {np.unique(mask_files.read_mask(sample.target)).tolist()[-1] for sample in found.splits["train"]}
    assert values <= {0, 1} and 1 in values
    (scored,) = [part for part in mask_files.read(data, classes=names[::-1]).splits.values() if part]
    assert sorted(mask_files.read_mask(scored[0].target).ravel()[:3].tolist()) == [0, 0, 1]


def test_255_is_ignored_where_any_mask_has_another_class(tmp_path):
    data = folder(tmp_path, 9, values=(0, 255))
    mask(data / "masks" / "3.png", (0, 1, 255))
    found = mask_files.read(data)
    assert found.classes == ("0", "1") and "taken for" not in "\n".join(found.notes)
    assert {255} <= set(np.unique(mask_files.read_mask(found.splits["train"][0].target)).tolist())


def test_a_few_values_far_apart_are_these_classes_alone(tmp_path):
    assert mask_files.read(folder(tmp_path, 9, values=(0, 128))).classes == ("0", "128")


def test_roboflows_table_names_the_values(tmp_path):
    data = folder(tmp_path, 3, "{part}/{name}", "{part}/{stem}_mask.png", parts=("train", "val"))
    for part in ("train", "val"):
        (data / part / "_classes.csv").write_text("Pixel Value, Class\n0, sky\n1, sea\n2, land, dry\n")
    found = mask_files.read(data)
    assert found.classes == ("sky", "sea", "land, dry")
    (data / "val" / "_classes.csv").write_text("Pixel Value, Class\n0, sea\n1, sky\n2, land\n")
    assert "give different names to the values" in lines(data)[0]


def cvat(root, mode="RGB", count=3):
    """CVAT's "Segmentation mask": colours in SegmentationClass, which labelmap.txt names, and all images in a list."""
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nsea:128,0,0::\nold land:0,128,0:hill,dale:\n"
    )
    (root / "ImageSets" / "Segmentation" / "default.txt").write_text("\n".join(map(str, range(count))))
    levels = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)
    for number in range(count):
        image(root / "JPEGImages" / f"{number}.jpg", seed=number)
        drawn = Image.fromarray(levels[np.resize([2, 0, 1], (11, 7))])
        for folder in ("SegmentationClass", "SegmentationObject"):
            (root / folder).mkdir(exist_ok=True)
            (drawn.quantize(8) if mode == "P" else drawn.convert(mode)).save(root / folder / f"{number}.png")
    return root


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_cvats_colours_are_the_classes_that_its_labelmap_names(tmp_path, mode):
    found = mask_files.read(cvat(tmp_path, mode))
    assert found.classes == ("background", "sea", "old land") and not found.left_out
    target = found.splits["train"][0].target
    np.testing.assert_array_equal(mask_files.read_mask(target), np.resize([2, 0, 1], (11, 7)))


def test_a_colour_without_a_label_and_a_line_that_is_none_are_told(tmp_path):
    data = cvat(tmp_path)
    text = (data / "labelmap.txt").read_text()
    (data / "labelmap.txt").write_text(text.replace("sea:128,0,0::\n", ""))
    assert all("has the colours #800000, which labelmap.txt gives to no label" in line for line in lines(data))
    (data / "labelmap.txt").write_text(f"{text}sky:0,300,0::\nsea:1,1,1::\nair:128,0,0::\nfog\n")
    assert [line.split(": ")[1].split(" is ")[0] for line in lines(data)] == [
        "'sky:0,300,0::'",
        "'sea:1,1,1::'",
        "'air:128,0,0::'",
        "'fog'",
    ]


@pytest.mark.parametrize("name", ["{stem}.jpg", "{stem}_mask.jpg"])
def test_a_jpeg_is_no_mask_and_said_once(tmp_path, name):
    data = folder(tmp_path, 9, masks="masks/" + name)
    (line,) = lines(data)
    assert "and 8 more cannot be a mask: compression changes the numbers of its classes, save it as PNG" in line


def test_two_masks_of_one_image_are_refused(tmp_path):
    data = folder(tmp_path, 3)
    mask(data / "masks" / "1_mask.png")
    assert "has no image of its name" in "\n".join(mask_files.read(data).notes)  # the exact name goes first
    (data / "masks" / "1.png").rename(data / "masks" / "1_labels.png")
    assert "belong to the same image" in lines(data)[0]


def test_a_mask_on_the_stored_pixels_of_a_turned_image_is_refused_with_its_reason(tmp_path):
    data, exif = folder(tmp_path, 9), Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((11, 7, 3), np.uint8)).save(data / "images" / "3.jpg", exif=exif)
    (line,) = lines(data)
    assert "3.jpg is turned by its EXIF tag, 7x11 pixels upright (height x width), but its mask" in line
    assert "remove the tag (exiftool -Orientation= " in line


def test_a_value_below_0_is_named(tmp_path):
    data = folder(tmp_path, 9)
    Image.fromarray(np.full((11, 7), -3, np.int32)).save(data / "masks" / "3.tif")
    (data / "masks" / "3.png").unlink()
    assert "3.tif has the value -3: classes go from 0 to 254" in lines(data)[0]


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
    (data / "classes.txt").write_bytes("a\nb\ncaf\xe9\n".encode("latin-1"))
    found = "\n".join(lines(data))
    for part in (
        "3.jpg has 11x7 pixels upright (height x width), but its mask ",
        "4.jpg is not an image",
        "5.png is not an image",
        "6.png has the colour mode RGB; a mask holds one class number per pixel",
        "7.png has the value 300: classes go from 0 to 254",
        "classes.txt is not UTF-8 text",
    ):
        assert part in found
    assert len(lines(data)) == 6


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
    assert "no mask in" in lines(data)[0] and "has the name of an image in" in lines(data)[0]


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


def test_names_in_two_unicode_forms_are_one(tmp_path):
    folder(tmp_path, layout="images/ü{name}", masks="masks/u\u0308{name}")
    assert sum(map(len, mask_files.read(tmp_path).splits.values())) == 7


def test_where_no_mask_belongs_to_an_image_one_of_each_is_named(tmp_path):
    folder(tmp_path, masks="masks/deep/{name}")
    assert lines(tmp_path)[0].endswith(".png for one, " + str(tmp_path / "images" / "0.jpg"))


@pytest.mark.parametrize(("line", "count"), [("{}", 7), ("{}.jpg", 7), ("{} 1", 0)])
def test_lists_may_have_the_suffix_of_images_and_are_refused_where_they_name_none(tmp_path, line, count):
    folder(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(line.format(number) for number in range(5)))
    (lists / "val.txt").write_text("\n".join(line.format(number) for number in range(5, 7)))
    if count:
        assert [len(part) for part in mask_files.read(tmp_path).splits.values()] == [5, 2, 0]
    else:
        assert lines(tmp_path) == (f"no list of {lists} names an image as it is called, such as 0",)


def test_a_mask_with_smoothed_edges_is_refused(tmp_path):
    folder(tmp_path, values=range(0, 256, 5))
    assert "0.png has 52 values from 0 to 255, as smoothed edges do: draw it" in lines(tmp_path)[0]
    (tmp_path / "classes.txt").write_text("".join(f"class {value}\n" for value in range(255)))
    assert len(mask_files.read(tmp_path).classes) == 255
