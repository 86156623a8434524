"""The formats of boxes: COCO JSON, YOLO's text, PASCAL VOC's XML, Create ML's JSON, Hugging Face's `objects`.

DATA -> `find_…`: what is there, by part -> `read_…`: into a Reading, each image with its rows as they are stated

A format decides where its files lie and what their fields mean, nothing else: what is cut, left out or refused is
decided in `data.py`, for all of them.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias
from xml.etree import ElementTree

import numpy as np
import yaml

from mlx_aimv2.files import read_start, read_text
from mlx_aimv2.images.find import Scan
from mlx_aimv2.learn import dense, samples
from mlx_aimv2.learn.samples import DataError, part_of, same_form
from mlx_aimv2.learn.tables import START, columns_of, image_of, metadata_file, metadata_rows
from mlx_aimv2.untrusted_json import parse

COCO = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}
"""The lists of a COCO file, and those fields of their entries that must be there, as text or numbers."""

COCO_START = re.compile(  # of many images the list alone fills the start of a file
    rb'\A(\xef\xbb\xbf)?\s*\{((?=.*"images")(?=.*"annotations")|.*"images"\s*:\s*\[\s*\{[^{}]*"file_name")', re.DOTALL
)
CREATE_ML_START = re.compile(rb'\A(\xef\xbb\xbf)?\s*\[(?=.*"coordinates")(?=.*"label")', re.DOTALL)
VOC_START = re.compile(rb"<annotation\b")
YOLO_START = re.compile(rb"\A\s*\S+([ \t]+-?[\d.]+(e-?\d+)?){4,}\s*(\n|$)")
"""What the start of a file has in each format; that of YOLO's text is no caption."""

XML_FOLDERS = ("Annotations", "annotations", "xmls", "labels")

NAMES_FILES = ("classes.txt", "obj.names", "_darknet.labels")
"""The names of YOLO's classes, one a line, where no YAML file has them."""

NO_OBJECTS = "taken for an image without objects"
NO_LABELS = ("classes.txt", "README.roboflow.txt", "README.dataset.txt")
"""What an image without a text of YOLO is, and the texts that belong to no image."""

CATEGORIES = ("categories", "category", "category_id", "labels", "label", "classes", "class")
"""What data sets on Hugging Face call the classes of an image's boxes."""

MAX_BYTES = 1 << 22
"""Of a file about one image."""

SETTINGS_BYTES, MAX_BRACKETS = 1 << 17, 500
"""Of YAML: a megabyte takes some 10 s, brackets within others much longer; a thousand names of classes have 30 kB."""

Source: TypeAlias = "tuple[Path, list[Path]]"
"""The file that lists the images of a part, and the folders in which these may lie."""


class Row(NamedTuple):
    """One object as its file states it: where, the name of its class, four numbers, crowd or not, and its own area."""

    where: str
    name: str
    box: Any
    crowd: Any = None
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
    themselves; `listed` are folders with the file that lists their images.
    """

    data: Path
    scan: Scan
    parts: dict[str, dict[str, Objects]] = field(default_factory=lambda: defaultdict(dict))
    classes: dict[str, None] = field(default_factory=dict)
    above: set[str] = field(default_factory=set)
    listed: dict[Path, Path] = field(default_factory=dict)

    def image(self, part: str, name: str, source: Source, stated: tuple[Any, Any] | None = None) -> Objects:
        """The objects of an image that a file names, to be filled, be it found or not.

        It has the name as it stands in one of the folders, or the last part of one from another machine.
        """
        file, folders = source
        names = dict.fromkeys([name.lstrip("/"), PurePosixPath(name.replace("\\", "/")).name, name])
        for own, folder in product(names, folders):
            if (path := image_of(folder, own)) is not None:
                self.listed.setdefault(folder, file)
                if str(path) in self.parts[part]:
                    self.scan.note(str(path), f"occurs more than once in {file.name}: its objects are merged")
                return self.parts[part].setdefault(str(path), Objects(file, stated))
        self.scan.faults.append(f"{file} names {name}, but {folders[0] / name} does not exist")
        return Objects(file)


def number(value: Any) -> float:
    """A number, also one written as text; NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _around(polygons: Any) -> list[float]:
    """Left, top, width, height around polygons, each `[x, y, x, y, …]`; nothing where there is none."""
    lists = [polygon for polygon in polygons if isinstance(polygon, list)] if isinstance(polygons, list) else []
    points = [(number(x), number(y)) for own in lists for x, y in zip(own[::2], own[1::2], strict=False)]
    return [*np.min(points, axis=0).tolist(), *np.ptp(points, axis=0).tolist()] if points else []


# Files that list images: COCO, Create ML, Hugging Face


def _sources(data: Path, scan: Scan, files: Callable[[Path], Sequence[Path]]) -> dict[str, Source]:
    """Those of the `files` right in the folders of parts; of one folder, the part is in their names."""
    found: dict[str, Source] = {}
    for around, folder in samples.parts_of(data, scan, lambda folder: bool(files(folder))).items():
        for file in files(folder):
            part = around or part_of(file.stem) or ""
            if part in found:
                raise DataError([f"{found[part][0]} and {file} both mean {part or 'all images'}: keep one"])
            word = next((word for word in re.split(r"[^A-Za-z0-9]+", file.stem) if part_of(word)), part)
            names = dict.fromkeys([""] if around else [word, part, "", "default"])  # the last is CVAT's
            found[part] = (file, [place / name for name in names for place in (folder, folder / "images")])
    if "" in found and len(found) > 1:
        raise DataError([f"{found[''][0]} names no part (train, val, test), but other files do: rename it"])
    return found


def _files(folder: Path, suffix: str, beside: bool) -> list[Path]:
    """The files of a suffix right in a folder, or also below it, but for hidden ones."""
    files = sorted(folder.glob("[!.]*" if beside else "**/[!.]*"))
    return [file for file in files if file.suffix.lower() == f".{suffix}" and file.is_file()]


def _like(files: Iterable[Path], start: re.Pattern[bytes]) -> Iterator[Path]:
    """The files that begin as a format does."""
    return (file for file in files if start.search(read_start(file, max_bytes=START)))


def _coco_files(folder: Path) -> list[Path]:
    """The COCO files of a folder: Roboflow's, those in `annotations`, or others right in it that are like one."""
    if (file := folder / "_annotations.coco.json").is_file():
        return [file]
    files = _files(folder / "annotations", "json", beside=True)
    files = [file for file in files if file.stem.startswith("instances")] or files
    return files or [*_like(_files(folder, "json", beside=True), COCO_START)]


def _create_ml_files(folder: Path) -> list[Path]:
    return [*_like(_files(folder, "json", beside=True), CREATE_ML_START)]


def _objects_files(folder: Path) -> list[Path]:
    file = metadata_file(folder)
    return [file] if file is not None and "objects" in columns_of(file) else []


find_coco = partial(_sources, files=_coco_files)
find_create_ml = partial(_sources, files=_create_ml_files)
find_objects = partial(_sources, files=_objects_files)


def read_coco(sources: Mapping[str, Source], reading: Reading) -> None:
    """Classes are the categories of training in the order of their ids."""
    for part, source in sources.items():
        file, faults = source[0], reading.scan.faults
        content = parse(read_text(file, max_bytes=samples.MAX_BYTES), file)
        entries, annotations, categories = (_coco_entries(content, section, file, faults) for section in COCO)
        pairs = [(str(entry["id"]), same_form(str(entry["name"]))) for entry in categories]
        names = dict(pairs)
        faults += [
            f"{file} gives one id, {key}, to {name} and {names[key]}" for key, name in pairs if names[key] != name
        ]
        if part in ("train", ""):
            reading.classes |= dict.fromkeys(names[key] for key in samples.in_order(names))
        reading.above |= {same_form(str(entry.get("supercategory", ""))) for entry in categories}
        images: dict[str, Objects] = {}
        for entry in entries:
            if (key := str(entry["id"])) in images:
                faults.append(f"{file} has more than one image with the id {key}")
            stated = (entry.get("height"), entry.get("width"))
            images[key] = reading.image(part, str(entry["file_name"]), source, stated)
        known: dict[str, Mapping[str, Any]] = {"image_id": images, "category_id": names}
        for entry in annotations:
            where = f"annotation {entry.get('id', '?')}"
            if unknown := [key for key in known if str(entry[key]) not in known[key]]:
                own = f"{unknown[0]} {entry[unknown[0]]!r:.40}"
                faults.append(f"{file}: {where} has the {own}, which is not among its images and categories")
                continue
            name, box = names[str(entry["category_id"])], entry.get("bbox") or _around(entry.get("segmentation"))
            row = Row(where, name, box, entry.get("iscrowd"), entry.get("area"))
            images[str(entry["image_id"])].rows.append(row)


def _coco_entries(content: Any, section: str, file: Path, faults: list[str]) -> list[dict[str, Any]]:
    """The entries of one of a file's lists that have what they need."""
    entries = content.get(section) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        faults.append(f"{file} is no COCO JSON: it has no list of {section}")
        return []
    found = []
    for entry in entries:
        own = entry if isinstance(entry, dict) else {}
        if bad := [key for key in COCO[section] if not isinstance(own.get(key), (str, int))]:
            faults.append(f"{file}: an entry of {section} has no usable {bad[0]}: {entry!r:.80}")
        else:
            found.append(entry)
    return found


def read_entries(sources: Mapping[str, Source], reading: Reading) -> None:
    """Entries of an image and its objects, which are a list, or an object of lists.

    Parts are folders, or the folders in the images' paths.
    """
    for part, source in sources.items():
        file, entries = source[0], _entries(source[0], reading)
        within = [next(filter(None, map(part_of, Path(str(name)).parent.parts)), "") for _, name, _ in entries]
        for (where, name, objects), inner in zip(entries, within, strict=True):
            if isinstance(objects, dict):
                columns = {key: value for key, value in objects.items() if isinstance(value, list)}
                objects = [dict(zip(columns, values, strict=True)) for values in zip_longest(*columns.values())]
            if not isinstance(name, str) or not isinstance(objects, list):
                fault = f"has no image or no list of its objects, be it empty: {name!r:.80}"
                reading.scan.faults.append(f"{file}: {where} {fault}")
                continue
            rows = reading.image(part or (inner if all(within) else ""), name, source).rows
            for count, entry in enumerate(objects, 1):
                own = entry if isinstance(entry, dict) else {}
                label, box = next((own[key] for key in CATEGORIES if key in own), None), own.get("bbox")
                if isinstance(place := own.get("coordinates"), dict):
                    box = [place.get(end) for end in ("x", "y", "width", "height")]
                label = same_form(str(label)) if isinstance(label, (str, int)) else ""
                rows.append(Row(f"object {count} of {where}", label, box, own.get("iscrowd"), own.get("area")))


def _entries(file: Path, reading: Reading) -> list[tuple[str, Any, Any]]:
    """Where an entry is, the name of its image and its objects: of Create ML's JSON, or of a table."""
    if file.suffix.lower() == ".json":
        content = parse(read_text(file, max_bytes=samples.MAX_BYTES), file)
        own = [entry if isinstance(entry, dict) else {} for entry in content]
        return [(f"entry {count}", one.get("image"), one.get("annotations")) for count, one in enumerate(own, 1)]
    return [(f"line {row['']}", row["file_name"], row.get("objects")) for row in metadata_rows(file, reading.scan)]


# Files of the images' names: YOLO, VOC


def _beside(
    data: Path, scan: Scan, names: Sequence[str], suffix: str, start: re.Pattern[bytes]
) -> dict[str, tuple[Path, Path]]:
    """Folders of images and of the files of a suffix by part, at least one of which starts as it should."""

    def holds(folder: Path, beside: bool) -> bool:
        return next(_like(_files(folder, suffix, beside), start), None) is not None

    return dense.folders_beside(data, scan, names, holds)


find_voc = partial(_beside, names=XML_FOLDERS, suffix="xml", start=VOC_START)


Yolo: TypeAlias = "tuple[Mapping[str, list[tuple[Path, Path]]], Path | None, Mapping[str, Any]]"
"""By part the folders of images and of their texts; and the YAML file beside them with its settings, if any."""


def find_yolo(data: Path, scan: Scan) -> Yolo | None:
    """Folders of images and of their texts: as a YAML file names them, or `images` beside `labels`, or one for both."""
    file, settings = _settings(data)
    given = {key: value if isinstance(value, list) else [value] for key, value in settings.items()}
    named = [(key, str(name)) for key in ("train", "val", "test") for name in given.get(key, []) if name]
    if file is None or not named:
        beside = {part: [pair] for part, pair in _beside(data, scan, ("labels",), "txt", YOLO_START).items()}
        return (beside, file, settings) if beside else None
    found: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    roots = [file.parent / str(settings.get("path", "")), file.parent]
    for key, name in named:
        # Roboflow writes ../train/images for what lies beside the file.
        places = [root / own for own in (name, name.removeprefix("../")) for root in roots]
        images = next((place for place in places if os.path.isdir(place)), None)  # noqa: PTH112 - names may be any text
        if images is not None:
            labels = Path(re.sub(r"^(.*/)?images(?=/|$)", r"\1labels", images.as_posix()))
            found[part_of(key) or ""].append((images, labels if labels.is_dir() else images))
        elif key == "test":  # Roboflow names one where it wrote none
            scan.note(f"{file}: {name}, the part test,", "does not exist: left out")
        else:
            raise DataError([f"{file} says {key}: {name}, which is not a folder of images"])
    return (found, file, settings) if found else None


def read_yolo(found: Yolo, reading: Reading) -> None:
    """The text file of an image has its name; without one it has no objects, as YOLO has it."""
    folders, file, settings = found
    names = settings.get("names")
    if not names:
        places = [reading.data, *(place for pairs in folders.values() for pair in pairs for place in pair)]
        file = next((own for place, name in product(places, NAMES_FILES) if (own := place / name).is_file()), None)
        names = reading.scan.text(file).split("\n") if file else []
    pairs = names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else [])
    numbered = {str(key): same_form(name) for key, name in pairs if isinstance(name, str) and name.strip()}
    reading.classes |= dict.fromkeys(numbered[key] for key in samples.in_order(numbered))
    for part, (images, texts) in ((part, pair) for part, pairs in folders.items() for pair in pairs):
        files = [str(text) for text in _files(texts, "txt", beside=False) if text.name not in NO_LABELS]
        described = dict(dense.by_name((images, texts), files, "text file", reading.scan, without=NO_OBJECTS))
        for path in reading.scan.images(images):
            text = Path(described.get(path, texts))
            objects = reading.parts[part][path] = Objects(text)
            if path in described:
                objects.rows += _yolo_rows(text, numbered, file, reading.scan, keypoints="kpt_shape" in settings)
        for suffix in (".txt", ".yaml", ".yml", ".names", ".labels"):
            reading.scan.was_read(images, suffix)


def _yolo_rows(text: Path, names: Mapping[str, str], source: Path | None, scan: Scan, *, keypoints: bool) -> list[Row]:
    """Lines of a class number and a box, which keypoints may follow, or the points of a polygon."""
    rows = []
    for count, line in enumerate(scan.text(text, max_bytes=MAX_BYTES).splitlines(), 1):
        key, *box = line.split()[: 5 if keypoints else None] or [""]
        key = re.sub(r"\.0*$", "", key)
        if key and not (key in names if names else key.isascii() and key.isdigit()):
            known = f"{source} has {len(names)} names" if names else "a class is a whole number"
            scan.faults.append(f"{text}, line {count}: there is no class {key:.40}: {known}")
        elif key:
            values: Sequence[Any] = box
            if len(values) >= 6 and len(values) % 2 == 0:
                left, top, width, height = _around([values])
                values = [left + width / 2, top + height / 2, width, height]
            rows.append(Row(f"line {count}", names.get(key, key), values))
    return rows


def _settings(data: Path) -> tuple[Path | None, dict[str, Any]]:
    """The YAML file right in DATA that names classes, and what it says, every value as text; or nothing."""
    for file in sorted(data.glob("[!.]*.y*ml")):
        try:
            text = read_text(file, max_bytes=SETTINGS_BYTES)
            if text.count("[") + text.count("{") > MAX_BRACKETS:
                raise ValueError(f"more than {MAX_BRACKETS} brackets")
            # Numbers, dates and words such as `no` stay the text that they are; no object of Python is made.
            content = yaml.load(text, yaml.BaseLoader) if re.search(r"^\W?names", text, re.MULTILINE) else None
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError([f"{file} cannot be read as YAML: {' '.join(str(error).split())}"]) from None
        if isinstance(content, dict) and "names" in content:
            return file, content
    return None, {}


def read_voc(folders: Mapping[str, tuple[Path, Path]], reading: Reading) -> None:
    """Parts are folders, or the lists in ImageSets/Main. An image's file has its name, whatever it says itself."""
    for part, (images, others) in folders.items():
        files = [str(file) for file in _files(others, "xml", images == others)]
        pairs = dense.by_name((images, others), files, "XML file", reading.scan)
        reading.scan.was_read(images, ".xml")
        lists = reading.data / "ImageSets" / "Main"
        for own, chosen in dense.by_lists(part, lists, pairs, images, reading.scan).items():
            reading.parts[own] = {image: _voc_objects(Path(file), reading) for image, file in chosen}


def _voc_objects(file: Path, reading: Reading) -> Objects:
    """The objects of an image; difficult ones count like crowds, as VOC does it."""
    try:
        text = read_text(file, max_bytes=MAX_BYTES)
        if "<!ENTITY" in text:
            raise ValueError("it defines entities, which such a file does not need")
        root = ElementTree.fromstring(text)
    except (OSError, ValueError, RecursionError, ElementTree.ParseError) as error:
        reading.scan.faults.append(f"{file} cannot be read as XML: {error}")
        return Objects(file)
    found = Objects(file, (root.findtext("size/height"), root.findtext("size/width")))
    for count, entry in enumerate(root.iter("object"), 1):
        box = [entry.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
        name = same_form(entry.findtext("name") or "")
        found.rows.append(Row(f"object {count}", name, box, entry.findtext("difficult")))
    return found


class BoxFormat(NamedTuple):
    """How boxes of one kind are found and read.

    `find(data, scan)` gives what `read` takes; nothing where DATA is not in this format. `layout` is how the files lie,
    `numbers` what the four of a box are, `in_shares` of the image's sides or in pixels.
    """

    layout: str
    numbers: str
    find: Callable[[Path, Scan], Any]
    read: Callable[[Any, Reading], None]
    in_shares: bool = False


FORMATS = {
    "COCO JSON": BoxFormat("annotations/*.json or beside the images", "left, top, width, height", find_coco, read_coco),
    "VOC's XML": BoxFormat("Annotations/*.xml", "xmin, ymin, xmax, ymax", find_voc, read_voc),
    "YOLO's text": BoxFormat("labels/*.txt", "centre x, centre y, width, height", find_yolo, read_yolo, in_shares=True),
    "Create ML's JSON": BoxFormat(
        "annotations.json", "centre x, centre y, width, height", find_create_ml, read_entries
    ),
    "Hugging Face's objects": BoxFormat("metadata.jsonl", "left, top, width, height", find_objects, read_entries),
}
"""Name -> format, in the order in which DATA is tried."""
