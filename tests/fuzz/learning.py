"""The learning half's untrusted files: head folders, states, labels and boxes in each format, masks, shards, captions.

Kinds as in `kinds.py`. Each is opened by the door that a user takes, and then used: what is read must also be whole.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import broken_bytes, broken_tensors, broken_text

Call = Callable[[], object]

HEADS = {
    "linear": ("classify", {}),
    "attentive": ("classify", {"iters": 2}),
    "knn": ("classify", {}),
    "lora": ("classify", {"iters": 2}),
    "dora": ("classify", {"iters": 2}),
    "full": ("classify", {"iters": 2}),
    "segment": ("segment", {"iters": 2}),
    "detect": ("detect", {"iters": 2}),
}
"""Heads that are made, by fine-tune type where it is not the task's default."""

SIDE = 31
"""Pixels of a side of the images that labels are for."""

XML_BOMB = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {two} "{f"&{one};" * 10}">' for one, two in zip("abcdefghi", "bcdefghij", strict=True))
    + "]><annotation><filename>&j;</filename></annotation>"
)
"""Ten thousand million characters (billion laughs)."""

XML_FILE = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    "<annotation><filename>&a;</filename></annotation>"
)

DEEP = ("[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "[[],[[]," * 9000)
"""JSON that goes deeper than a reader may follow."""

HOSTILE = (
    *DEEP,
    "1" * 400,
    "1" * 5000,
    "-1e999",
    "1e-999",
    "NaN",
    '"' + "x" * 100_000 + '"',
    '"\\ud800"',
    '"\\u0000"',
    '"\\u2028"',
    '"a/../../../../../../../etc/passwd"',
    '"' + "n" * 300 + '.png"',
    '"/dev/zero"',
    '"."',
)
"""JSON values that a file may hold and a reader must survive."""


def make_whole(folder: Path) -> None:
    """A small encoder with a head of each type, a state that a stopped run left, and data in each format."""
    from mlx_aimv2.learn import fit
    from tests import small_training as small

    work = small.Workshop(folder)
    for name, (task, settings) in HEADS.items():
        kind = name if name not in ("segment", "detect") else None
        fit(
            work.data[task], work.encoder, folder / "heads" / name,
            task=task, fine_tune_type=kind, cache=folder / "cache", **settings,
        )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        fit(
            work.data["classify"], work.encoder, folder / "state" / "head",
            task="classify", fine_tune_type="attentive", cache=folder / "cache", iters=4, steps_per_eval=1,
            on_progress=small.stopping_at(2),
        )  # fmt: skip
    small.write_captions(folder / "captions", captions=2)
    for number in range(4):
        _image(number).save(folder / f"{number}.png")


def heads(rng: random.Random, whole: Path, place: Path) -> Call:
    """A head folder one of whose files is broken: predicts, and becomes a checkpoint where it changed the encoder."""
    learned = whole / "learning"
    name = rng.choice(list(HEADS))
    folder = place / "head"
    shutil.copytree(learned / "heads" / name, folder, copy_function=os.link)
    names = [file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".sha256")]
    file = folder / rng.choice(sorted(names))
    data = file.read_bytes()
    file.unlink()
    if file.suffix == ".safetensors":
        file.write_bytes(broken_tensors(data, rng))
    elif file.suffix == ".json":
        file.write_bytes(_broken_json_file(json.loads(data), rng))
    else:
        file.write_bytes(broken_bytes(data, rng))
    encoder = rng.choice((None, None, str(learned / "encoder")))
    if rng.random() < 0.2:
        return _as_written(lambda: _fused(folder, place / "fused", encoder))
    if rng.random() < 0.1:
        return _as_written(lambda: _evaluated(folder, learned / HEADS[name][0], encoder))
    return _as_written(lambda: _predicted(folder, learned / "1.png", encoder))


def states(rng: random.Random, whole: Path, place: Path) -> Call:
    """A run that is resumed from a broken state."""
    from mlx_aimv2.learn import fit

    learned = whole / "learning"
    folder = place / "head.training"
    shutil.copytree(learned / "state" / "head.training", folder)
    file = folder / "state.safetensors"
    file.write_bytes(broken_tensors(file.read_bytes(), rng))

    def resume() -> None:
        fit(
            learned / "classify", learned / "encoder", place / "head",
            task="classify", fine_tune_type="attentive", cache=learned / "cache", iters=4, steps_per_eval=1,
            resume=True,
        )  # fmt: skip

    return _as_written(resume)


def coco(rng: random.Random, whole: Path, place: Path) -> Call:
    """Boxes in COCO's JSON."""
    return _format(rng, whole, place, "coco")


def labels(rng: random.Random, whole: Path, place: Path) -> Call:
    """A list of labels: metadata.csv or metadata.jsonl."""
    return _format(rng, whole, place, rng.choice(("csv", "jsonl")))


def formats(rng: random.Random, whole: Path, place: Path) -> Call:
    """The other formats of the field: YOLO, VOC's XML, Create ML, Hugging Face's objects."""
    return _format(rng, whole, place, rng.choice(("yolo", "voc", "create_ml", "objects")))


def masks(rng: random.Random, whole: Path, place: Path) -> Call:
    """A broken mask beside its image, or a broken list of classes."""
    from PIL import Image

    _images(place / "images", whole)
    (place / "masks").mkdir()
    for number in range(4):
        mode, suffix = rng.choice(
            (("L", "png"), ("P", "png"), ("1", "bmp"), ("I;16", "png"), ("I", "tif"), ("L", "gif"))
        )
        values = bytes(rng.randrange(3) for _ in range(SIDE * SIDE * {"I;16": 2, "I": 4}.get(mode, 1)))
        mask = Image.frombytes("L" if mode in "1P" else mode, (SIDE, SIDE), values)
        stream = io.BytesIO()
        (mask.convert(mode) if mode in "1P" else mask).save(stream, {"tif": "TIFF"}.get(suffix, suffix.upper()))
        data = stream.getvalue()
        (place / "masks" / f"{number}.{suffix}").write_bytes(broken_bytes(data, rng) if rng.random() < 0.3 else data)
    if rng.random() < 0.2:
        (place / "masks" / "0.png").write_bytes(bomb(rng))
    if rng.random() < 0.3:
        (place / "classes.txt").write_bytes(broken_bytes(b"sky\nroad\ntree\n", rng))
    return _as_written(lambda: _read("segment", place))


def shards(rng: random.Random, whole: Path, place: Path) -> Call:
    """A broken or hostile shard of WebDataset."""
    file = place / "0.tar"
    file.write_bytes(_broken_shard(rng, whole / "learning"))
    return _as_written(lambda: _captions(file))


def captions(rng: random.Random, whole: Path, place: Path) -> Call:
    """A list of images with captions, one of whose lines is broken."""
    folder = whole / "learning" / "captions"
    for file in folder.glob("*.png"):
        os.link(file, place / file.name)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    name, data = _table(rows, rng)
    (place / name).write_bytes(data)
    return _as_written(lambda: _captions(place))


def jpegs(rng: random.Random, whole: Path, place: Path) -> Call:
    """A JPEG of any shape that ends at any per cent, decoded fast for any size."""
    from PIL import Image

    size = [rng.choice((1, 2, 7, 8, 9, 17, 64, 333, 1001)) for _ in range(2)]
    if min(size) > 99:
        size[0] //= 4
    mode = rng.choice(("RGB", "L", "CMYK"))
    pixels = rng.randbytes(size[0] * size[1] * len(mode if mode != "L" else "L")) if mode != "L" else None
    image = Image.frombytes(mode, tuple(size), pixels) if pixels else Image.new("L", tuple(size), 99)
    stream = io.BytesIO()
    more = rng.choice(({}, {"progressive": True}, {"restart_marker_blocks": 1}, {"subsampling": 2}, {"quality": 5}))
    exif = Image.Exif()
    exif[0x0112] = rng.randint(1, 8)
    image.save(stream, "JPEG", exif=exif, **more)
    data = stream.getvalue()
    data = data[: len(data) * rng.randint(1, 100) // 100]
    if rng.random() < 0.2:
        data = broken_bytes(data, rng)
    file = place / "x.jpg"
    file.write_bytes(data)
    wanted = (rng.choice((1, 2, 15, 42)), rng.choice((1, 3, 14, 42)))
    return lambda: _decoded(file, wanted, whole / rng.choice(("fixed", "native")))


def arguments(rng: random.Random, whole: Path, place: Path) -> Call:
    """A verb with a name that no file system, no terminal or no reader likes."""
    from tests.fuzz.verbs import hostile_command

    return hostile_command(rng, whole, place)


# How files are broken


def _broken_json_file(value: Any, rng: random.Random) -> bytes:
    """A JSON document broken as `broken_text` does it, or with hostile JSON in place of a value or of all."""
    what = rng.random()
    if what < 0.6:
        return broken_text(value, rng)
    if what < 0.65:
        return rng.choice(HOSTILE).encode()
    mark = "\u2603"
    marked = json.dumps(_with(value, mark, rng)).encode()
    return marked.replace(json.dumps(mark).encode(), rng.choice(HOSTILE).encode())


def _with(value: Any, new: Any, rng: random.Random) -> Any:
    """The document with `new` in place of one of its values."""
    from tests.fuzz.mutate import places

    value = json.loads(json.dumps(value))
    found = list(places(value))
    if not found:
        return new
    holder, key = rng.choice(found)
    holder[key] = new
    return value


def _table(rows: list[dict[str, Any]], rng: random.Random) -> tuple[str, bytes]:
    """Rows as metadata.jsonl or metadata.csv, broken: `-> name, content`."""
    if rng.random() < 0.6:
        lines = [json.dumps(row).encode() for row in rows]
        for _ in range(rng.randint(1, 2)):
            number = rng.randrange(len(lines))
            lines[number] = _broken_json_file(rows[number], rng)
        end = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n"))
        return "metadata.jsonl", end.join(lines) + end
    names = list(rows[0])
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    odd = ("", '"', '"' * 7, "x" * 200_000, "n" * 300 + ".png", "\u2028", "=1+1", "a\nb", "\0", "../../etc/passwd", "~")
    for _ in range(rng.randint(0, 3)):
        row = rng.choice(cells)
        row[rng.randrange(len(row))] = rng.choice(odd)
    delimiter = rng.choice((",", ",", ";", "\t"))
    text = "\n".join(delimiter.join(row) for row in cells).encode("utf-8", "surrogatepass")
    return "metadata.csv", broken_bytes(text, rng) if rng.random() < 0.6 else text


def bomb(rng: random.Random) -> bytes:
    """A PNG that says it is much larger than its bytes."""
    import struct
    import zlib

    width, height = rng.choice(((30_000, 30_000), (2**31 - 1, 1), (13_000, 13_000), (65_535, 2)))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, rng.choice((1, 8, 16)), 0, 0, 0, 0)
    data = zlib.compress(bytes(rng.choice((10, 100_000, 1 << 22))), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _broken_shard(rng: random.Random, learned: Path) -> bytes:
    stream = io.BytesIO()
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for number in range(4):
            pixels = (learned / f"{number}.png").read_bytes()
            about = _broken_json_file({"text": "a cat", "n": 3}, rng) if rng.random() < 0.4 else b'{"caption": "a cat"}'
            text = ("txt", b"a dog") if rng.random() < 0.3 else ("json", about)
            for ending, content in (("png", pixels), text):
                member = tarfile.TarInfo(
                    rng.choice((f"{number:04}", f"./{number:04}", f"{'d' * 120}/{number}")) + f".{ending}"
                )
                if rng.random() < 0.05:
                    member.type = rng.choice(
                        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"K")
                    )
                    member.linkname = rng.choice(("/etc/passwd", "../../x", "0001.png"))
                if form == tarfile.PAX_FORMAT and rng.random() < 0.1:
                    member.pax_headers = {rng.choice(("size", "mtime", "path", "GNU.sparse.map", "x")): rng.choice(
                        ("-1", "9" * 400, "nan", "\ud7ff" * 3000, "1,2,3", "0,1")
                    )}  # fmt: skip
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            if rng.random() < 0.03:
                large = tarfile.TarInfo(f"{number:04}.{rng.choice(('json', 'txt', 'bin', 'png'))}")
                large.size = rng.choice((1 << 20, 1 << 25))
                archive.addfile(large, io.BytesIO(bytes(large.size) if rng.random() < 0.5 else b"[" * large.size))
    data = bytearray(stream.getvalue())
    if rng.random() < 0.4:
        heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
        at = rng.choice(heads)
        field = rng.choice(((124, 12), (124, 12), (124, 12), (0, 100), (100, 8), (136, 12), (156, 1), (345, 155)))
        odd = (b"\x80" + (1 << 87).to_bytes(11, "big"), b"\xff" * 12, b"-7", b"77777777777", b"\0" * 12, b"9x", b"\x80")
        value = rng.choice(odd)[: field[1]]
        data[at + field[0] : at + field[0] + len(value)] = value
        data[at + 148 : at + 156] = b" " * 8
        total = sum(data[at : at + 512])
        data[at + 148 : at + 156] = f"{total:06o}\0 ".encode()
    content = bytes(data)
    if rng.random() < 0.4 and len(content) < 1 << 22:
        content = broken_bytes(content, rng)
    if rng.random() < 0.3:
        content = gzip.compress(content, 9)
        return broken_bytes(content, rng) if rng.random() < 0.3 else content
    return content


# Formats of labels


def _image(number: int) -> Any:
    from PIL import Image

    return Image.frombytes("RGB", (SIDE, SIDE), random.Random(number).randbytes(SIDE * SIDE * 3))


def _images(folder: Path, whole: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        os.link(whole / "learning" / f"{number}.png", folder / f"{number}.png")


def _format(rng: random.Random, whole: Path, place: Path, name: str) -> Call:
    """A data set in a format, with one of the files that label it broken."""
    task, write = FORMATS[name]
    write(rng, whole, place)
    return _as_written(lambda: _read(task, place))


def _write_coco(rng: random.Random, whole: Path, place: Path) -> None:
    _images(place, whole)
    images = [{"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(4)]
    boxes = [
        {"id": n, "image_id": n // 2, "category_id": 1 + n % 2, "bbox": [1, 2, 10.5, 9], "area": 94.5, "iscrowd": 0}
        for n in range(8)
    ]
    boxes[0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    categories = [{"id": 1, "name": "one", "supercategory": "x"}, {"id": 2, "name": "two"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (place / "_annotations.coco.json").write_bytes(_broken_json_file(content, rng))


def _write_table(rng: random.Random, whole: Path, place: Path) -> None:
    _images(place, whole)
    name, data = _table([{"file_name": f"{n}.png", "label": "ab"[n % 2]} for n in range(4)], rng)
    (place / name).write_bytes(data)


def _write_objects(rng: random.Random, whole: Path, place: Path) -> None:
    _images(place, whole)
    objects = {"bbox": [[1, 2, 10, 9], [3, 3, 5, 5]], "categories": [0, 1]}
    if rng.random() < 0.3:
        objects["category"] = objects.pop("categories")
    name, data = _table([{"file_name": f"{n}.png", "objects": objects} for n in range(4)], rng)
    (place / name).write_bytes(data)


def _write_yolo(rng: random.Random, whole: Path, place: Path) -> None:
    for part in ("train", "val"):
        _images(place / "images" / part, whole)
        (place / "labels" / part).mkdir(parents=True)
        for n in range(4):
            lines = b"0 0.5 0.5 0.3 0.2\n1 0.4 0.4 0.1 0.1\n"
            odd = (
                b"0 nan 0.5 inf 0.2\n",
                b"9" * 500 + b" 0 0 0 0\n",
                b"-1 .5 .5 .5 .5\n",
                b"\xff\xfe",
                b"0 1e999 0 0 0\n",
            )
            if rng.random() < 0.2:
                lines = rng.choice((broken_bytes(lines, rng), rng.choice(odd)))
            (place / "labels" / part / f"{n}.txt").write_bytes(lines)
    good = b"path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [one, two]\n"
    odd_yaml = (
        b"names: {0: one, 1: two}\ntrain: images/train\nval: images/val\n",
        b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nnames: [*c,*c,*c]\n",
        b"names: !!python/object/apply:os.system [echo]\n",
        b"train: ../../../../etc\nval: /\nnames: [a]\n",
        b"names: " + b"[" * 5000,
        b"names: {" + b"9" * 5000 + b": one}\n",
        b"train: [images/train, images/val]\nval: null\nnames: one\n",
    )  # fmt: skip
    text = rng.choice((good, broken_bytes(good, rng), rng.choice(odd_yaml)))
    (place / "data.yaml").write_bytes(text)


def _write_voc(rng: random.Random, whole: Path, place: Path) -> None:
    _images(place / "JPEGImages", whole)
    (place / "Annotations").mkdir()
    for n in range(4):
        text = (
            f"<annotation><folder>x</folder><filename>{n}.png</filename><size><width>{SIDE}</width>"
            f"<height>{SIDE}</height><depth>3</depth></size><object><name>one</name><difficult>0</difficult><bndbox>"
            "<xmin>1</xmin><ymin>2</ymin><xmax>10.5</xmax><ymax>9</ymax></bndbox></object></annotation>"
        ).encode()
        if rng.random() < 0.4:
            odd = (
                XML_BOMB.encode(),
                XML_FILE.encode(),
                b"<a>" * 100_000,
                text.replace(b">1<", b">" + rng.choice((b"nan", b"1e999", b"9" * 400, b"", b"x", b"-1")) + b"<"),
                text.decode().encode("utf-16"),
                b'<?xml version="1.0" encoding="' + rng.choice((b"rot13", b"utf-7", b"x", b"latin1")) + b'"?>' + text,
            )
            text = rng.choice((broken_bytes(text, rng), rng.choice(odd)))
        (place / "Annotations" / f"{n}.xml").write_bytes(text)
    if rng.random() < 0.5:
        (place / "ImageSets" / "Main").mkdir(parents=True)
        for part, numbers in (("train", "0\n1\n"), ("val", "2\n3\n")):
            data = broken_bytes(numbers.encode(), rng) if rng.random() < 0.3 else numbers.encode()
            (place / "ImageSets" / "Main" / f"{part}.txt").write_bytes(data)


def _write_create_ml(rng: random.Random, whole: Path, place: Path) -> None:
    _images(place, whole)
    box = {"x": 10, "y": 12.5, "width": 8, "height": 6}
    rows = [{"image": f"{n}.png", "annotations": [{"label": "ab"[n % 2], "coordinates": box}]} for n in range(4)]
    data = _broken_json_file(rows, rng) if rng.random() < 0.9 else json.dumps(rows).encode()
    (place / rng.choice(("annotations.json", "_annotations.createml.json"))).write_bytes(data)


FORMATS: dict[str, tuple[str, Callable[[random.Random, Path, Path], None]]] = {
    "coco": ("detect", _write_coco),
    "csv": ("classify", _write_table),
    "jsonl": ("classify", _write_table),
    "objects": ("detect", _write_objects),
    "yolo": ("detect", _write_yolo),
    "voc": ("detect", _write_voc),
    "create_ml": ("detect", _write_create_ml),
}
"""Format -> the task that it is for, and what writes it, broken."""


# What is done with them


def _read(task: str, data: Path) -> None:
    """DATA as `fit` reads it: guessed, read for training and with given classes, and laid out for the encoder."""
    import numpy as np

    from mlx_aimv2.learn.task_options import find_task, guess_task

    found = find_task(task)
    refusals: list[ValueError | OSError] = []

    def guessed() -> Any:
        task, recognised = guess_task(data)
        return task.data.read(data, recognised=recognised)

    for read in (
        guessed,
        lambda: found.data.read(data),
        lambda: found.data.read(data, classes=("one", "two") if task == "detect" else ("a", "b")),
    ):
        try:
            dataset = read()
        except (ValueError, OSError) as error:
            refusals.append(error)
            continue
        lines = [*dataset.classes, *dataset.notes]
        json.dumps(lines).encode()
        for sample in [sample for samples in dataset.splits.values() for sample in samples][:3]:
            if dataset.classes and isinstance(sample.target, (int, np.integer)):
                assert 0 <= sample.target < len(dataset.classes)
                continue
            for array in _targets(sample).values():
                assert np.isfinite(array).all(), "a target that is not finite"
    if len(refusals) == 3:
        raise refusals[1]


def _as_written(call: Callable[[], object]) -> Call:
    """The call with its errors as a command writes them: escaped and shortened, for they quote names and values."""
    from mlx_aimv2.cli.output import as_line

    def judged() -> None:
        try:
            call()
        except (UnicodeError, json.JSONDecodeError):
            raise
        except (ValueError, OSError) as error:
            raise ValueError(as_line(str(error))) from error

    return judged


def _targets(sample: Any) -> dict[str, Any]:
    from mlx_aimv2.images.preprocessing import published
    from mlx_aimv2.images.processor import Aimv2Processor
    from mlx_aimv2.learn.task_options import find_task

    processor = Aimv2Processor(published(42), patch_size=14)
    task = "segment" if isinstance(sample.target, (str, tuple)) and not hasattr(sample.target, "boxes") else "detect"
    return dict(find_task(task).data.targets(sample, processor))


def _captions(path: Path) -> None:
    """Captions as `pretrain` reads them: an epoch in order, one shuffled, and a batch."""
    import numpy as np

    from mlx_aimv2 import Aimv2VisionConfig
    from mlx_aimv2.pretrain.data import Preparation, first_examples, open_data

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        data = open_data(path)
        examples = list(data.epoch(None))
        list(data.epoch(np.random.default_rng(1)))
        first_examples(data, Preparation(Aimv2VisionConfig(22, 13, 1, 2, image_size=42), 1), (3, 3), 4)
    for note in notes:
        one_line(str(note.message))
    assert all(example.texts and all(example.texts) for example in examples)


def one_line(text: str) -> None:
    """A note must not be longer than a screen: what it quotes is shortened where it is written."""
    assert text.strip(), "an empty note"


def _predicted(folder: Path, image: Path, encoder: str | None) -> None:
    from mlx_aimv2.learn import predict
    from mlx_aimv2.learn.head_folder import load_head

    head = load_head(folder, model=encoder)
    for _, found in predict(head, [image]):
        json.dumps(head.task.results.as_json(found, head.classes), allow_nan=False)


def _evaluated(folder: Path, data: Path, encoder: str | None) -> None:
    from mlx_aimv2.learn import evaluate

    evaluate(folder, data, model=encoder)


def _fused(folder: Path, target: Path, encoder: str | None) -> None:
    import mlx.core as mx

    from mlx_aimv2 import load
    from mlx_aimv2.learn.head_folder import fuse

    model, _ = load(fuse(folder, target, model=encoder))
    for array in (model.vision.patch_embed.proj.weight, model.vision.blocks[-1].mlp.down.weight):
        assert mx.isfinite(array).all().item(), "a checkpoint that is not finite"


def _decoded(file: Path, wanted: tuple[int, int], model: Path) -> None:
    from mlx_aimv2.images.open import FAST, open_image
    from tests.fuzz.kinds import processor_of

    opened = open_image(file, policy=FAST)
    image, _ = opened.rgb(wanted)
    assert image.mode == "RGB"
    processor_of(model)(str(file), max_patches=64, decode="fast")
