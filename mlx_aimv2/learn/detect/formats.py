"""Boxes in the field's other formats: YOLO's text, PASCAL VOC's XML, Create ML's JSON, Hugging Face's `objects`.

DATA -> `find_…`: what is there, by part -> `read_…`: into a Reading, each image with its rows as they are stated

A format decides where its files lie and what their fields mean, nothing else: what is cut, left out or refused is
decided in `data.py`, for COCO JSON too.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml

from mlx_aimv2.files import read_start, read_text
from mlx_aimv2.images.find import Scan
from mlx_aimv2.learn import dense, samples
from mlx_aimv2.learn.metadata import columns_of, image_of, metadata_file, metadata_rows
from mlx_aimv2.learn.samples import DataError, part_of, same_form
from mlx_aimv2.untrusted_json import parse

YOLO_ROW = re.compile(rb"\s*\d+(\.0*)?([ \t]+-?[\d.]+(e-?\d+)?){4,}\s*(\n|$)")
"""How a text file starts that holds boxes or polygons, not a caption."""

NAMES_FILES = ("classes.txt", "obj.names", "_darknet.labels")
"""The names of YOLO's classes, one a line, where no YAML file has them."""

XML_FOLDERS = ("Annotations", "annotations", "xmls", "labels")

CATEGORIES = ("categories", "category", "category_id", "labels", "label", "classes", "class")
"""What data sets on Hugging Face call the classes of an image's boxes."""

CREATE_ML = (("image", "imagefilename"), ("annotations", "annotation"))
"""Names of Create ML's two fields of an image, and those that older programs write."""

MAX_BYTES = 1 << 22
"""Of a file about one image, or of settings: parsing YAML takes some 10 s for each megabyte."""

START_BYTES = 1 << 16
"""Of a file, by which its format is recognised."""


class Row(NamedTuple):
    """One object as its file states it: where, the name of its class, four numbers, crowd or not, and its own area."""

    where: str
    name: str
    box: Any
    crowd: bool = False
    area: Any = None


@dataclass
class Objects:
    """What is said of one image: in which file, its (height, width) as stated, and the rows.

    `stated` is None in formats without a place for it, whose boxes are of the upright image.
    """

    file: Path
    stated: tuple[Any, Any] | None = None
    rows: list[Row] = field(default_factory=list)


@dataclass
class Reading:
    """What was read of DATA: by part, the objects of each image by its path, those without any included.

    `classes` are the names in their order, where a file lists them, and `above` those that others name as above
    themselves; a line of `faults` refuses DATA.
    """

    data: Path
    scan: Scan
    parts: dict[str, dict[str, Objects]] = field(default_factory=lambda: defaultdict(dict))
    classes: dict[str, None] = field(default_factory=dict)
    above: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def number(value: Any) -> float:
    """A number, also one written as text; NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def around(points: Sequence[Any]) -> list[float]:
    """Left, top, width, height around the points of polygons, `[x, y, x, y, …]`."""
    corners = np.array([number(value) for value in points]).reshape(-1, 2)
    return [*corners.min(axis=0).tolist(), *np.ptp(corners, axis=0).tolist()]


def read_json(file: Path, faults: list[str]) -> Any:
    """What a JSON file holds; None and a line of `faults` for one that cannot be read."""
    try:
        return parse(read_text(file, max_bytes=samples.MAX_BYTES), file)
    except (OSError, ValueError) as error:
        faults.append(str(error))
        return None


def json_files(folder: Path, opening: str, words: Iterable[str]) -> list[Path]:
    """The JSON files right in a folder that begin as a format does and soon have its words."""
    found = []
    for file in sorted(folder.glob("*.json")):
        if file.is_file() and not file.name.startswith("."):
            start = read_start(file, max_bytes=START_BYTES).decode(errors="ignore").lstrip("\ufeff \r\n\t")
            if start.startswith(opening) and all(f'"{word}"' in start for word in words):
                found.append(file)
    return found


def find_image(name: str, folders: Sequence[Path]) -> str | None:
    """The image that a file means: by its name as it stands, or by the last part of one from another machine."""
    names = dict.fromkeys([name, PurePosixPath(name.replace("\\", "/")).name])
    paths = (image_of(folder, own) for own, folder in product(names, folders))
    return next((str(path) for path in paths if path is not None), None)


# YOLO


def find_yolo(data: Path, scan: Scan) -> dict[str, list[str]]:
    """The images of each part: as a YAML file names them, or in `images` beside `labels`, or beside their text."""

    def holds(folder: Path, beside: bool) -> bool:
        texts = (text for text in sorted(folder.glob("*.txt" if beside else "**/*.txt")) if text.is_file())
        return any(not beside or YOLO_ROW.match(read_start(text, max_bytes=START_BYTES)) for text in texts)

    file, settings = _settings(data)
    named = [(key, name) for key in ("train", "val", "valid", "test") for name in _texts(settings.get(key))]
    if file is None or not named:
        pairs = dense.folders_beside(data, scan, ("labels",), holds)
        return {part: scan.images(images) for part, (images, _) in pairs.items()}
    found: dict[str, list[str]] = defaultdict(list)
    faults: list[str] = []
    for key, name in named:
        if (place := _place(file.parent, _texts(settings.get("path")), name)) is not None:
            found[part_of(key) or ""] += _images_in(place, file.parent, scan)
        elif key == "test":  # Roboflow names one where it wrote none
            scan.note(f"{file}: {name}, the part test,", "does not exist: left out")
        else:
            faults.append(f"{file} says {key}: {name}, which does not exist")
    if faults:
        raise DataError(faults)
    return found


def read_yolo(images: Mapping[str, list[str]], reading: Reading) -> None:
    """The text file of an image lies beside it or in `labels`; without one it has no objects, as YOLO has it."""
    file, settings = _settings(reading.data)
    names = settings.get("names")
    if not names:
        folders = [reading.data, *sorted({Path(path).parent for paths in images.values() for path in paths})]
        file = next((own for folder in folders for name in NAMES_FILES if (own := folder / name).is_file()), None)
        names = read_text(file).split("\n") if file else []
    pairs = names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else [])
    numbered = {str(key): same_form(name) for key, name in pairs if isinstance(name, str) and name.strip()}
    reading.classes |= dict.fromkeys(numbered[key] for key in samples.in_order(numbered))
    texts: set[Path] = set()
    for part, path in ((part, path) for part, paths in images.items() for path in paths):
        if not os.path.isfile(path):  # noqa: PTH113 - a name that cannot be is no file
            reading.faults.append(f"{path} is in the list of {part or 'all images'}, but does not exist")
            continue
        *before, last = re.split(r"(?<=[/\\])images(?=[/\\])", path)
        text = Path("images".join(before) + "labels" + last if before else path).with_suffix(".txt")
        text = text if text.is_file() else Path(path).with_suffix(".txt")
        objects = reading.parts[part][path] = Objects(text)
        if text.is_file():
            texts.add(text)
            objects.rows += _yolo_rows(text, numbered, file, "kpt_shape" in settings, reading.faults)
        else:
            reading.scan.note(path, "has no text file of its name: taken for an image without objects")
    for folder in sorted({text.parent for text in texts}):
        for suffix in (".txt", file.suffix if file else ".txt"):
            reading.scan.was_read(folder, suffix)
        for other in sorted(set(folder.glob("*.txt")) - texts):
            if YOLO_ROW.match(read_start(other, max_bytes=START_BYTES)):
                reading.scan.note(str(other), "has no image of its name: left out")


def _yolo_rows(
    text: Path, names: Mapping[str, str], source: Path | None, keypoints: bool, faults: list[str]
) -> list[Row]:
    """Lines of a class number and a box, the points of a polygon, or a box and keypoints."""
    rows = []
    try:
        lines = read_text(text, max_bytes=MAX_BYTES).splitlines()
    except (OSError, ValueError) as error:
        faults.append(str(error))
        return []
    for count, line in enumerate(lines, 1):
        key, *values = line.split() or [""]
        key = re.sub(r"\.0*$", "", key)
        if key and not (key in names if names else key.isascii() and key.isdigit()):
            known = f"{source} has {len(names)} names" if names else "a class is a whole number"
            faults.append(f"{text}, line {count}: there is no class {key:.40}: {known}")
        elif key:
            if len(values) >= 6 and len(values) % 2 == 0 and not keypoints:
                left, top, width, height = around(values)
                box: Sequence[Any] = [left + width / 2, top + height / 2, width, height]
            else:
                box = values[:4] if keypoints else values
            rows.append(Row(f"line {count}", names.get(key, key), box))
    return rows


def _settings(data: Path) -> tuple[Path | None, dict[str, Any]]:
    """The YAML file right in DATA that names classes, and what it says, every value as text; or nothing."""
    for file in sorted(data.glob("*.y*ml")):
        try:
            text = read_text(file, max_bytes=MAX_BYTES)
            # Numbers, dates and words such as `no` stay the text that they are; no object of Python is made.
            content = yaml.load(text, yaml.BaseLoader) if re.search(r"^\W?names", text, re.MULTILINE) else None
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError([f"{file} cannot be read as YAML: {' '.join(str(error).split())}"]) from None
        if isinstance(content, dict) and "names" in content:
            return file, content
    return None, {}


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]


def _place(folder: Path, roots: Sequence[str], name: str) -> Path | None:
    """Where a path leads from one of the roots, or from the folder itself, as Roboflow's `../train/images` does."""
    bases = [*(folder / root for root in roots), folder]
    places = (base / own for own in (name, name.removeprefix("../")) for base in bases)
    return next((place for place in places if os.path.exists(place)), None)  # noqa: PTH110 - as above


def _images_in(place: Path, folder: Path, scan: Scan) -> list[str]:
    """The images of a folder, or those that a text file lists: paths below its own folder or that of the settings."""
    if place.is_dir():
        return scan.images(place)
    lines = [line.strip() for line in read_text(place, max_bytes=samples.MAX_BYTES).splitlines() if line.strip()]
    return [str(_place(folder, [str(place.parent)], line) or folder / line) for line in lines]


# PASCAL VOC


def find_voc(data: Path, scan: Scan) -> dict[str, tuple[Path, Path]]:
    """Folders of images and of XML files by part."""

    def holds(folder: Path, beside: bool) -> bool:
        return any(b"<annotation" in read_start(file, max_bytes=START_BYTES) for file in _xml(folder, beside)[:8])

    return dense.folders_beside(data, scan, XML_FOLDERS, holds)


def _xml(folder: Path, beside: bool) -> list[Path]:
    return [file for file in sorted(folder.glob("*.xml" if beside else "**/*.xml")) if file.is_file()]


def read_voc(folders: Mapping[str, tuple[Path, Path]], reading: Reading) -> None:
    """Parts are folders, or the lists in ImageSets/Main. An image's file has its name, whatever it says itself."""
    for part, (images, others) in folders.items():
        files = [str(file) for file in _xml(others, images == others)]
        pairs = dense.by_name((images, others), files, "XML file", reading.scan)
        reading.scan.was_read(images, ".xml")
        lists = reading.data / "ImageSets" / "Main"
        for own, chosen in ({part: pairs} if part else dense.by_lists(lists, pairs, images, reading.scan)).items():
            reading.parts[own] = {image: _voc_objects(Path(file), reading) for image, file in chosen}


def _voc_objects(file: Path, reading: Reading) -> Objects:
    """The objects of an image; difficult ones count like crowds: neither trained on nor scored, as VOC does it."""
    found = Objects(file, (None, None))
    try:
        text = read_text(file, max_bytes=MAX_BYTES)
        if "<!ENTITY" in text:
            raise ValueError("it defines entities, which no such file needs")
        root = ElementTree.fromstring(text)
    except (OSError, ValueError, RecursionError, ElementTree.ParseError) as error:
        reading.faults.append(f"{file} cannot be read as XML: {error}")
        return found
    found.stated = (root.findtext("size/height"), root.findtext("size/width"))
    for count, entry in enumerate(root.iter("object"), 1):
        name, difficult = same_form(entry.findtext("name") or ""), number(entry.findtext("difficult")) > 0
        if difficult:
            reading.scan.note(f"{file}: object {count}", "is difficult: neither trained on nor scored")
        if not name:
            reading.faults.append(f"{file}: object {count} has no name")
        box = [entry.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
        found.rows.append(Row(f"object {count}", name, box, crowd=difficult))
    return found


# Create ML and Hugging Face


def files_by_part(data: Path, scan: Scan, files: Callable[[Path], Sequence[Path]]) -> dict[str, Path]:
    """The one file of each part among those that `files` finds right in a folder."""
    folders = samples.parts_of(data, scan, lambda folder: bool(files(folder)))
    found = {part: own for part, folder in folders.items() if (own := files(folder))}
    if more := [own for own in found.values() if len(own) > 1]:
        raise DataError([f"{more[0][0]} and {more[0][1]} both hold boxes: keep one of them"])
    return {part: own[0] for part, own in found.items()}


find_create_ml = partial(files_by_part, files=lambda folder: json_files(folder, "[", ["coordinates", "label"]))


def _metadata(folder: Path) -> list[Path]:
    file = metadata_file(folder)
    return [file] if file is not None and "objects" in columns_of(file) else []


find_hugging_face = partial(files_by_part, files=_metadata)


def read_create_ml(files: Mapping[str, Path], reading: Reading) -> None:
    """Entries of an image and its annotations, also by the two names of older programs."""
    for part, file in files.items():
        entries = [entry if isinstance(entry, dict) else {} for entry in read_json(file, reading.faults) or []]
        for count, entry in enumerate(entries, 1):
            name, objects = (entry.get(new, entry.get(old)) for new, old in CREATE_ML)
            _read_entry(f"entry {count}", name, objects, file, reading.parts[part], reading.faults)
        reading.scan.unlisted(file.parent, file, reading.parts[part])


def read_hugging_face(files: Mapping[str, Path], reading: Reading) -> None:
    """`objects` is a list of objects or an object of lists; parts are folders, or the folders in the rows' paths."""
    for part, file in files.items():
        rows, faults = metadata_rows(file, reading.scan)
        reading.faults += faults
        within = [next(filter(None, map(part_of, Path(row["file_name"]).parent.parts)), "") for row in rows]
        for row, inner in zip(rows, within, strict=True):
            objects, where = row.get("objects"), f"line {row['']}"
            if isinstance(objects, dict):
                columns = {key: value for key, value in objects.items() if isinstance(value, list)}
                if len({len(column) for column in columns.values()}) > 1:
                    reading.faults.append(f"{file}: the lists of objects in {where} are not equally long")
                objects = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False)]
            found = reading.parts[part or inner if all(within) else part]
            _read_entry(where, row["file_name"], objects, file, found, reading.faults)
        reading.scan.unlisted(file.parent, file, [path for own in reading.parts.values() for path in own])


def _read_entry(where: str, name: Any, objects: Any, file: Path, found: dict[str, Objects], faults: list[str]) -> None:
    """Adds the objects of one image, each of which names its class under one of `CATEGORIES`."""
    if not isinstance(name, str) or not isinstance(objects, list):
        faults.append(f"{file}: {where} has no image or no list of its objects, be it empty: {name!r:.80}")
        return
    if (path := find_image(name, [file.parent, file.parent / "images"])) is None:
        faults.append(f"{file} names {name}, but {file.parent / name} does not exist")
        return
    rows = found.setdefault(path, Objects(file)).rows
    for count, entry in enumerate(objects, 1):
        entry = entry if isinstance(entry, dict) else {}
        label, place = next((entry[key] for key in CATEGORIES if key in entry), None), entry.get("coordinates")
        if not isinstance(label, (str, int)) or not str(label).strip():
            faults.append(f"{file}: object {count} of {where} has no label: {entry!r:.80}")
            continue
        box = (
            [place.get(key) for key in ("x", "y", "width", "height")] if isinstance(place, dict) else entry.get("bbox")
        )
        crowd = number(entry.get("iscrowd")) > 0
        rows.append(Row(f"object {count} of {where}", same_form(str(label)), box, crowd, entry.get("area")))
