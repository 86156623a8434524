"""Which images with captions are found, and what happens to those that cannot be used."""

import io
import json
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import bundled
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.pretrain import data as data_module
from mlx_aimv2.pretrain.data import Example, Preparation, Shards, Stream, open_data, shuffled
from mlx_aimv2.pretrain.objective import grid_of, images_of
from mlx_aimv2.tokenizer import Tokenizer, train_tokenizer
from mlx_aimv2.train.augment import Augmentation, random_crop
from mlx_aimv2.train.batches import Batches


def png(level):
    stream = io.BytesIO()
    Image.new("RGB", (17, 13), (level, 40, 90)).save(stream, format="PNG")
    return stream.getvalue()


def image_folder(folder, rows, images=None):
    folder.mkdir()
    for number, name in enumerate(images if images is not None else [row["file_name"] for row in rows]):
        (folder / name).write_bytes(png(number))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shard(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return file


def members(first, count):
    return [
        (f"{number:03d}.{ending}", content)
        for number in range(first, first + count)
        for ending, content in (("png", png(number)), ("txt", b"caption %d" % number))
    ]


def names(data):
    return [example.name for example in data.epoch(None)]


def test_an_image_folder_has_one_caption_or_several(tmp_path):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": ["two", " ", "three"]}]
    found = list(open_data(image_folder(tmp_path / "in", rows)).epoch(None))
    assert [example.texts for example in found] == [("one",), ("two", "three")]


@pytest.mark.parametrize("text", [None, "", "  ", [], 3])
def test_a_missing_or_empty_caption_is_skipped_by_name(tmp_path, text):
    rows = [{"file_name": "good.png", "text": "good"}, {"file_name": "bad.png", "text": text}, {"file_name": "no.png"}]
    with pytest.warns(UserWarning, match=r"bad\.png has no caption: skipped \(and 1 more\)"):
        data = open_data(image_folder(tmp_path / "in", rows))
    assert names(data) == ["good.png"]


def test_an_image_that_is_not_listed_is_named(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": "a.png", "text": "a"}], images=["a.png", "b.png"])
    with pytest.warns(UserWarning, match=r"b\.png is not listed in metadata\.jsonl"):
        assert names(open_data(folder)) == ["a.png"]


def test_a_listed_image_that_is_not_there_is_named(tmp_path):
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"}]
    folder = image_folder(tmp_path / "in", rows, images=["a.png"])
    with pytest.warns(UserWarning, match=r"b\.png is listed but not there"):
        assert names(open_data(folder)) == ["a.png"]


def test_a_folder_without_any_caption_is_an_error(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": "a.png", "text": ""}])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no image with a caption"):
        open_data(folder)


def test_a_line_that_is_not_json_is_named_with_its_number(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": "a.png", "text": "a"}])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n{oops\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 3: wanted"):
        open_data(folder)


def test_what_holds_no_data_is_said(tmp_path):
    with pytest.raises(ValueError, match="found neither"):
        open_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_data(tmp_path / "gone")


def test_shards_are_read_in_order_with_either_kind_of_caption(tmp_path):
    shard(tmp_path / "0.tar", members(0, 2))
    shard(
        tmp_path / "1.tar",
        [("x/7.png", png(7)), ("x/7.json", b'{"caption": "seven"}'), ("8.json", b'{"text": "eight"}'), ("8.png", b"")],
    )
    found = list(open_data(tmp_path).epoch(None))
    assert [example.texts[0] for example in found] == ["caption 0", "caption 1", "seven", "eight"]
    assert [example.name for example in found] == ["0.tar:000", "0.tar:001", "1.tar:x/7", "1.tar:8"]


def test_a_macs_own_entries_in_a_shard_are_skipped(tmp_path):
    entries = [entry for name, data in members(0, 3) for entry in ((f"./._{name}", b"\0\5\x16\7"), (f"./{name}", data))]
    shard(tmp_path / "0.tar", [("__MACOSX/000.png", b"x"), *entries])
    shard(tmp_path / "._0.tar", [])
    assert names(open_data(tmp_path)) == ["0.tar:000", "0.tar:001", "0.tar:002"]


def test_the_image_of_a_key_is_the_one_that_is_called_like_it(tmp_path):
    shard(tmp_path / "0.tar", [("0.depth.png", b"depth"), ("0.jpg", b"image"), ("0.txt", b"text")])
    assert [example.image for example in open_data(tmp_path).epoch(None)] == [b"image"]


def test_endings_in_a_shard_may_be_capitals(tmp_path):
    shard(tmp_path / "0.tar", [("0.PNG", b"image"), ("0.TXT", b"text")])
    assert [(one.image, one.texts) for one in open_data(tmp_path).epoch(None)] == [(b"image", ("text",))]


def test_what_was_said_of_shards_is_not_said_again_each_epoch(tmp_path):
    shard(tmp_path / "0.tar", [("1.png", png(1)), *members(3, 1)])
    data = open_data(tmp_path)
    with pytest.warns(UserWarning, match=r"0\.tar:1 has no caption"):
        names(data)
    assert names(data) == ["0.tar:003"]  # a warning would be an error


def test_captions_lie_in_csv_too_and_a_line_ends_at_a_newline_alone(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": "a.png", "caption": "one\u2028two"}, {"file_name": "b.png"}])
    text = json.dumps({"file_name": "a.png", "caption": "one\u2028two"}, ensure_ascii=False)
    (folder / "b.png").unlink()
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    assert [example.texts for example in open_data(folder).epoch(None)] == [("one\u2028two",)]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\na.png,three\n")
    assert [example.texts for example in open_data(folder).epoch(None)] == [("three",)]


@pytest.mark.parametrize("file", ["captions.csv", "train/metadata.csv", "a/metadata.csv", "train/b/metadata.csv"])
def test_captions_lie_in_tables_of_other_names_and_folders(tmp_path, file):
    place = (tmp_path / file).parent
    place.mkdir(parents=True, exist_ok=True)
    (place / "0.png").write_bytes(png(0))
    (tmp_path / file).write_text("Image;Caption\n0.png;one\n0.png;two\n;\n")
    with pytest.warns(UserWarning) as found:
        assert [one.texts for one in open_data(tmp_path).epoch(None)] == [("one", "two")]
    notes = " ".join(str(one.message) for one in found)
    assert "has the column image as its file_name" in notes and "line 4, is an empty row: left out" in notes


@pytest.mark.parametrize("kind", ["tables", "shards", "folders of shards"])
def test_of_parts_train_is_trained_on_and_the_others_are_named(tmp_path, kind):
    for number, part in enumerate(("train", "val")):
        (tmp_path / part).mkdir()
        if kind == "tables":
            (tmp_path / part / f"{number}.png").write_bytes(png(number))
            (tmp_path / part / "metadata.jsonl").write_text(f'{{"file_name": "{number}.png", "text": "{part}"}}\n')
        else:
            members = [("0.png", png(0)), ("0.txt", part.encode())]
            shard(tmp_path / (f"{part}/0.tar" if kind == "folders of shards" else f"{part}-0.tar"), members)
    with pytest.warns(UserWarning, match="belongs to another part: left out"):
        assert [one.texts for one in open_data(tmp_path).epoch(None)] == [("train",)]


@pytest.mark.parametrize(("image", "text"), [("jpeg", "txt"), ("webp", "caption"), ("png", "json")])
def test_members_of_a_shard_may_have_the_fields_endings(tmp_path, image, text):
    caption = b'{"caption": "one"}' if text == "json" else b"one"
    shard(tmp_path / "0.tar", [(f"0.{image}", b"image"), (f"0.seg.{image}", b"x"), (f"0.{text}", caption)])
    assert [(one.image, one.texts) for one in open_data(tmp_path).epoch(None)] == [(b"image", ("one",))]


def test_a_broken_image_in_a_shard_is_named_once_or_refused(tmp_path):
    shard(tmp_path / "0.tar", [*members(0, 3), ("9.png", b"broken"), ("9.txt", b"nine")])
    with pytest.warns(UserWarning) as found:
        assert {one.caption for one in taken(tmp_path, 12)} == {"caption 0", "caption 1", "caption 2"}
    assert ["0.tar:9 is not an image" in str(one.message) for one in found] == [True]
    with pytest.raises(ValueError, match=r"0\.tar:9 is not an image .*; --skip-broken leaves such images out"):
        taken(tmp_path, 12, data=open_data(tmp_path, skip_broken=False))


def test_what_lies_there_instead_of_captions_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,b\n")
    with pytest.raises(ValueError, match=r"metadata\.csv has no column text among its columns \(file_name, label\)"):
        open_data(tmp_path)


@pytest.mark.parametrize(("file", "text"), [("0.txt", "a cat"), ("captions.txt", "image,caption\n0.png,a cat\n")])
def test_texts_that_are_in_no_table_are_named(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{file} is not a table or shard: name a table \.csv, and pack "):
        open_data(tmp_path)


@pytest.mark.parametrize(
    "texts", [[("0.txt", "é".encode("utf-16"))], [("0.txt", b" \n"), ("0.json", '{"caption": "é"}'.encode())]]
)
def test_a_caption_in_utf_16_or_beside_an_empty_text_is_taken(tmp_path, texts):
    shard(tmp_path / "0.TAR", [("0.png", png(0)), *texts])
    assert [one.texts for one in open_data(tmp_path).epoch(None)] == [("é",)]


def test_files_of_one_name_in_a_shard_are_told(tmp_path):
    shard(tmp_path / "0.tar", [("0.png", png(0)), ("0.txt", b"one"), ("0.png", png(1)), ("0.txt", b"two")])
    with pytest.warns(UserWarning, match=r"0\.tar:0 has several files with the same ending: the last is used"):
        assert [one.texts for one in open_data(tmp_path).epoch(None)] == [("two",)]


def test_a_caption_that_is_not_utf_8_is_told(tmp_path):
    shard(tmp_path / "0.tar", [*members(0, 1), ("9.png", png(0)), ("9.txt", "café".encode("cp1252"))])
    with pytest.warns(UserWarning, match=r"0\.tar:9 has no caption in UTF-8: skipped"):
        assert names(open_data(tmp_path)) == ["0.tar:000"]


@pytest.mark.parametrize("text", ['["a cat", "one"]', "['a cat', 'one']"])
def test_a_list_of_captions_in_a_cell_is_a_list(tmp_path, text):
    cell = text.replace('"', '""')
    (tmp_path / "metadata.csv").write_text(f'file_name,text\n0.png,"{cell}"\n')
    (tmp_path / "0.png").write_bytes(png(0))
    assert [one.texts for one in open_data(tmp_path).epoch(None)] == [("a cat", "one")]


def test_a_broken_shard_is_named_and_the_others_are_used(tmp_path):
    shard(tmp_path / "0.tar", members(0, 3))
    whole = shard(tmp_path / "1.tar", members(3, 3)).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:3000])
    (tmp_path / "2.tar").write_bytes(b"this is no tar file")
    with pytest.warns(UserWarning) as found:
        assert names(open_data(tmp_path))[:4] == ["0.tar:000", "0.tar:001", "0.tar:002", "1.tar:003"]
    said = " ".join(str(one.message) for one in found)
    assert "1.tar (unexpected end of data) is a broken shard" in said and "(and 1 more)" in said


def test_the_example_at_which_a_shard_breaks_is_left_out(tmp_path):
    """Though its image and a caption are there: whether they are all of it, nobody knows."""
    last = [("9.png", png(9)), ("9.txt", b"nine"), ("9.json", b" " * 20_000)]
    file = shard(tmp_path / "0.tar", [*members(0, 2), *last])
    file.write_bytes(file.read_bytes()[:-20_000])
    with pytest.warns(UserWarning, match="is a broken shard"):
        assert names(open_data(tmp_path)) == ["0.tar:000", "0.tar:001"]


def sized(file, size, *, kind=tarfile.REGTYPE, name="big.png"):
    """Writes a shard of four examples amid which a header says that so many bytes follow."""
    about = tarfile.TarInfo(name)
    about.size, about.type = size, kind
    start, end = (shard(file, members(first, 2)).read_bytes()[:4096] for first in (0, 2))
    file.write_bytes(start + about.tobuf(tarfile.GNU_FORMAT) + end)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [1 << 31, 1 << 87, -1])
def test_a_size_that_no_shard_has_ends_it(tmp_path, kind, size):
    sized(tmp_path / "0.tar", size, kind=kind)
    with pytest.warns(UserWarning, match=r"0\.tar .* is a broken shard: used up to the damage"):
        assert names(open_data(tmp_path)) == ["0.tar:000"]


@pytest.mark.parametrize("name", ["0.json", "0.png", "0.bin", "x" * 120 + ".png"])
def test_a_shard_that_unpacks_to_much_more_than_itself_is_bounded(tmp_path, monkeypatch, name):
    """3 MB of gzip hold 3 GB of zeros; here some kilobytes stand for them."""
    monkeypatch.setattr(data_module, "MAX_EXPANSION", 10)
    with tarfile.open(tmp_path / "0.tar", "w:gz") as archive:
        for file, content in [*members(1, 2), (name, bytes(1 << 24)), *members(3, 1)]:
            about = tarfile.TarInfo(file)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    assert (tmp_path / "0.tar").stat().st_size < 50_000
    with pytest.warns(UserWarning, match="broken shard"):
        assert names(open_data(tmp_path)) == ["0.tar:001"]


def test_the_files_of_an_example_are_bounded_together_and_others_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_KEY_BYTES", 3000)
    many = [(f"7.{number}.png", bytes(1000)) for number in range(9)]
    shard(tmp_path / "0.tar", [("7.mp4", bytes(100_000)), ("7.txt", b"a cat"), *many, *members(8, 1)])
    with pytest.warns(UserWarning, match=r"7\.2\.png is too large: skipped \(and 6 more\)"):
        assert "0.tar:008" in names(open_data(tmp_path))


def test_a_caption_with_half_a_character_is_none(tmp_path):
    shard(tmp_path / "0.tar", [("0.png", png(1)), ("0.json", b'{"text": "a \\ud83d"}'), *members(1, 1)])
    with pytest.warns(UserWarning) as told:
        assert names(open_data(tmp_path)) == ["0.tar:001"]
    lines = [str(one.message) for one in told]
    assert any("0.tar:0 has a caption with half a character" in line and "left out" in line for line in lines)
    assert any("0.tar:0 has no caption" in line for line in lines)


def test_of_several_captions_the_one_with_half_a_character_is_named_and_left_out(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": "0.png", "text": ["a cat", "a \ud83d"]}])
    with pytest.warns(UserWarning, match=r"line 1: 0\.png has a caption with half a character"):
        (example,) = open_data(folder).epoch(None)
    assert example.texts == ("a cat",)


def test_a_name_that_is_too_long_for_a_file_is_one_that_is_not_there(tmp_path):
    rows = [
        {"file_name": f"{'n' * 300}.png", "text": "a"},
        {"file_name": "a\0.png", "text": "b"},
        {"file_name": "b.png", "text": "c"},
    ]
    folder = image_folder(tmp_path / "in", rows, images=["b.png"])
    with pytest.warns(UserWarning, match=r"is listed but not there: skipped \(and 1 more\)"):
        assert names(open_data(folder)) == ["b.png"]


def test_in_a_shard_an_image_without_caption_and_a_caption_without_image_are_named(tmp_path):
    shard(tmp_path / "0.tar", [("1.png", png(1)), ("2.txt", b"two"), *members(3, 1)])
    with pytest.warns(UserWarning) as found:
        assert names(open_data(tmp_path)) == ["0.tar:003"]
    said = " ".join(str(one.message) for one in found)
    assert "0.tar:1 has no caption" in said and "0.tar:2 has no image" in said


def test_a_shuffled_epoch_holds_each_example_once_in_another_order(tmp_path):
    for number in range(3):
        shard(tmp_path / f"{number}.tar", members(7 * number, 7))
    data = Shards(sorted(tmp_path.glob("*.tar")), buffer=5)
    orders = [[one.name for one in data.epoch(np.random.default_rng(seed))] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == names(data) != orders[0]


def test_the_buffer_bounds_what_is_held():
    taken = []
    source = (taken.append(number) or number for number in range(100))
    stream = shuffled(source, np.random.default_rng(0), 11)
    next(stream)
    assert len(taken) == 12


GRID = (2, 2)


def taken(folder, size, *, data=None, **options):
    """The first examples of a stream."""
    vision = Aimv2VisionConfig(22, 13, 2, 2, image_size=10, patch_size=5)
    prepare = Preparation(vision, seed=3, augmentation=Augmentation())
    order = Stream(data or open_data(folder), lambda number: GRID, size=lambda grid: size, seed=3, **options)
    batches = Batches(order, lambda item: prepare(*item), collate=list)
    try:
        return batches(0)[0]
    finally:
        batches.close()


def test_a_stream_that_starts_later_gives_what_the_whole_one_gives(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": f"{i}.png", "text": [f"{i}", "x"]} for i in range(5)])
    whole, later = taken(folder, 13), taken(folder, 7, start=6)
    for one, other in zip(whole[6:], later, strict=True):
        assert (one.caption, one.length) == (other.caption, other.length)
        assert (one.pixels == other.pixels).all()


def test_ranks_share_the_stream(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": f"{i}.png", "text": f"{i}"} for i in range(5)])
    whole = [(one.caption, one.length) for one in taken(folder, 12)]
    for rank in range(3):
        assert [(one.caption, one.length) for one in taken(folder, 4, rank=rank, ranks=3)] == whole[rank::3]


def test_an_image_that_cannot_be_read_is_skipped(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": f"{i}.png", "text": f"{i}"} for i in range(3)])
    (folder / "1.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"1\.png.*skipped"):
        assert {one.caption for one in taken(folder, 6)} == {"0", "2"}


def test_unreadable_images_are_no_error_while_others_lie_between_them(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": f"{i}.png", "text": f"{i}"} for i in range(13)])
    for number in range(1, 13):
        (folder / f"{number}.png").write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {one.caption for one in taken(folder, 60)} == {"0"}


def test_each_example_is_changed_in_a_way_of_its_own(tmp_path):
    found = taken(image_folder(tmp_path / "in", [{"file_name": "0.png", "text": ["a", "b"]}]), 13)
    assert len({one.length for one in found}) > 1 and {one.caption for one in found} == {"a", "b"}


def test_shards_come_in_another_order_each_epoch(tmp_path):
    files = [shard(tmp_path / f"{number}.tar", members(10 * number, 2)) for number in range(5)]
    data = Shards(files, buffer=1)
    firsts = {next(data.epoch(np.random.default_rng(seed))).name for seed in range(20)}
    assert len(firsts) > 2


def test_a_native_encoders_crops_have_the_shape_of_their_grid(tmp_path):
    vision, seen = Aimv2VisionConfig(28, 13, 2, 7, patch_size=5, is_native=True), []

    def augmentation(image, size, rng, *, aspects):
        seen.append((size, aspects))
        return image.resize((size[1], size[0]))

    Image.new("RGB", (17, 13)).save(tmp_path / "0.png")
    prepare = Preparation(vision, seed=3, augmentation=augmentation)
    prepare(0, Example("0.png", tmp_path / "0.png", ("a",)), (2, 5))
    assert seen == [((10, 25), (2.5, 2.5))]


def test_a_held_out_image_of_a_native_encoder_is_cropped_in_its_middle_and_not_squeezed(tmp_path):
    image = Image.new("RGB", (60, 20), (255, 255, 255))
    image.paste((0, 0, 0), (15, 0, 45, 20))
    image.save(tmp_path / "0.png")
    prepare = Preparation(Aimv2VisionConfig(28, 13, 2, 7, patch_size=5, is_native=True), seed=3)
    pixels = prepare(0, Example("0.png", tmp_path / "0.png", ("a",)), (2, 2)).pixels
    assert pixels.shape == (10, 10, 3) and pixels.max() < 0


def test_only_unreadable_images_are_an_error(tmp_path):
    folder = image_folder(tmp_path / "in", [{"file_name": "0.png", "text": "0"}])
    (folder / "0.png").write_bytes(b"broken")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="in a row cannot be read"):
        warnings.simplefilter("ignore")
        taken(folder, 1)


def test_crops_have_the_area_and_lie_inside():
    rng = np.random.default_rng(6)
    areas = []
    for _ in range(300):
        left, top, right, bottom = random_crop(30, 20, 0.4, rng)
        assert 0 <= left < right <= 30 and 0 <= top < bottom <= 20
        areas.append((right - left) * (bottom - top) / 600)
    assert min(areas) > 0.399 and max(areas) <= 1 and np.std(areas) > 0.1


@pytest.mark.parametrize(("name", "value"), [("min_area", 0.0), ("jitter", 1.5), ("grey", -0.1)])
def test_an_augmentation_out_of_range_is_an_error(name, value):
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        Augmentation(**{name: value})


def test_a_trained_tokenizer_is_read_by_the_package_and_knows_its_words(tmp_path):
    texts = ["red heart", "red square", "heart with arrow", "red heart"]
    trained = train_tokenizer(texts, vocab_size=700, context=9)
    trained.save_to(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    again.context = 9
    ids = again(["red heart", "Red  HEART", "zebra 4 €"])
    assert (ids == trained(["red heart", "Red  HEART", "zebra 4 €"])).all()
    assert (ids[0] == ids[1]).all() and (ids[0] != again.eos).sum() == 3  # BOS and two words
    assert len(set(ids[2].tolist())) > 6


def test_a_vocabulary_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match="at least 514"):
        train_tokenizer(["a"], vocab_size=500)


def test_the_emoji_that_ship_are_an_image_folder_with_captions():
    data = open_data(bundled.ASSETS / "noto")
    files = bundled.emoji_images()
    assert len(files) == len(set(files.values())) == len(list(data.epoch(None))) == 300
    for example in data.epoch(None):
        assert example.texts == (files[example.image],)
        with Image.open(example.image) as image:
            assert image.size == (84, 84) and image.mode == "RGB"


def test_a_native_grid_is_drawn_between_the_fewest_and_the_most_patches():
    native = Aimv2VisionConfig(24, 13, 2, 2, is_native=True, patch_size=5)
    rng = np.random.default_rng(3)
    grids = [grid_of(native, rng, patches=(16, 300)) for _ in range(400)]
    counts = np.array([rows * columns for rows, columns in grids])
    assert counts.min() >= 13 and counts.max() <= 300 and 50 < np.median(counts) < 90
    assert 0.5 < min(columns / rows for rows, columns in grids) < 0.9
    narrow = [grid_of(native, rng, patches=(16, 18)) for _ in range(50)]
    assert max(rows * columns for rows, columns in narrow) <= 18
    fixed = Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5)
    assert grid_of(fixed, rng) == grid_of(fixed, None) == (3, 3)
    assert grid_of(native, None, patches=(16, 256)) == (8, 8)


def test_patches_are_as_many_as_the_paper_draws_and_a_batch_has_as_many_of_them_whatever_the_size():
    """A normal distribution cut to one deviation and stretched from 7 to 12: 2.5 times 0.5396 wide."""
    native = Aimv2VisionConfig(24, 13, 2, 2, is_native=True, patch_size=5)
    rng = np.random.default_rng(3)
    grids = [grid_of(native, rng) for _ in range(20_000)]
    n = np.log2([rows * columns for rows, columns in grids])
    assert n.std() == pytest.approx(1.35, abs=0.02)
    assert (n <= 8).mean() == pytest.approx(0.169, abs=0.01)
    of_batch = [rows * columns * images_of(native, (rows, columns), 64) for rows, columns in grids]
    middle = 64 * 2**9.5
    assert max(of_batch) < 1.05 * middle and min(of_batch) > 0.95 * middle


def test_a_crop_can_keep_the_shape():
    rng = np.random.default_rng(3)
    for _ in range(50):
        left, top, right, bottom = random_crop(31, 17, 0.9, rng, aspects=(0.5, 0.5))
        assert (right - left) / (bottom - top) == pytest.approx(0.5)
        assert left >= 0 and right <= 31 and top >= 0 and bottom <= 17
