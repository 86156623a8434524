"""Boxes: COCO JSON, the other formats of `formats.py`, and the checks that hold for all of them.

DATA -> the first of `FORMATS` that it is in -> rows of each image -> boxes cut, left out or refused -> GroundTruth

The target of a sample is a `GroundTruth`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_aimv2.images import open_image
from mlx_aimv2.images.find import Scan
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import dense, samples
from mlx_aimv2.learn.detect import formats
from mlx_aimv2.learn.detect.boxes import GroundTruth, areas
from mlx_aimv2.learn.detect.formats import Objects, Reading, Row, number
from mlx_aimv2.learn.detect.head import assign, points
from mlx_aimv2.learn.metadata import not_read
from mlx_aimv2.learn.samples import DataError, Format, Found, Labels, Sample, Size, part_of, same_form
from mlx_aimv2.train.batches import Arrays

ROBOFLOW = "_annotations.coco.json"

FOLDER = "annotations"
"""Folder of the JSON files in COCO's own layout, which CVAT writes too."""

WANTED: dict[str, dict[str, Any]] = {
    "images": {"id": (int, str), "file_name": str},
    "annotations": {"image_id": (int, str), "category_id": (int, str)},
    "categories": {"id": (int, str), "name": (str, int)},
}
"""The lists of a COCO file, and of what type those fields of their entries are that are used."""

MIN_VISIBLE = 0.5
"""Share of a box that must lie in its image: less is no rounding and no object at the edge, but a wrong number."""

VISIBLE = 0.3
"""Share of an object that a training image must show; with less nobody says what its place should answer."""


class BoxFormat(NamedTuple):
    """How boxes of one kind are found and read.

    `find(data, scan)` gives what `read` takes, by part; nothing where DATA is not in this format. `layout` is how the
    files lie, `numbers` what the four of a box are, `in_shares` of the image's sides or in pixels.
    """

    layout: str
    numbers: str
    find: Callable[[Path, Scan], Mapping[str, Any]]
    read: Callable[[Any, Reading], None]
    in_shares: bool = False


CORNERS: dict[str, Callable[[float, float, float, float], Sequence[float]]] = {
    "left, top, width, height": lambda x, y, w, h: (x, y, x + w, y + h),
    "centre x, centre y, width, height": lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
    # VOC counts pixels from 1 and includes the last one; other programs write an empty box with equal ends.
    "xmin, ymin, xmax, ymax": lambda x, y, right, bottom: (x - (right > x), y - (bottom > y), right, bottom),
}
"""What four numbers are -> left, top, right, bottom."""


def recognise(data: Path) -> str | None:
    """In which format DATA has boxes, else None."""
    return next((f"boxes as {name}" for name in _formats_of(data)), None) if data.is_dir() else None


def _formats_of(data: Path) -> Iterator[str]:
    for name, form in FORMATS.items():
        try:
            found: Any = form.find(data, Scan())
        except DataError as error:  # which is raised again where this format is read
            found = error
        if found:
            yield name


def _find(data: Path, scan: Scan) -> Found:
    names = list(_formats_of(data))
    if not names:
        layouts = ", ".join(f"{name} ({form.layout})" for name, form in FORMATS.items())
        raise DataError([f"{data} has no boxes in a format that is read: {layouts}", *not_read(data)])
    for other in names[1:]:
        scan.note(str(data), f"has boxes as {other} too, of which nothing is read: {names[0]} comes first")
    form, reading = FORMATS[names[0]], Reading(data, scan)
    form.read(form.find(data, scan), reading)
    used = {row.name for part in reading.parts.values() for objects in part.values() for row in objects.rows}
    for unused in [own for own in reading.classes if own not in used]:
        if unused in reading.above:  # Roboflow's root category
            scan.note(f"category {unused}", "stands above others and no object has it: left out")
            del reading.classes[unused]
        else:
            scan.note(f"category {unused}", "is the class of no object")
    parts = {part: [(path, (form, objects)) for path, objects in own.items()] for part, own in reading.parts.items()}
    return Found(parts, list(reading.classes) or None, reading.faults)


def _find_coco(data: Path, scan: Scan) -> dict[str, tuple[Path, list[Path]]]:
    """JSON files by part, each with the folders in which its images may lie."""
    found: dict[str, tuple[Path, list[Path]]] = {}
    for around, folder in samples.parts_of(data, scan, lambda folder: bool(_coco_files(folder))).items():
        for file in _coco_files(folder):
            part = around or part_of(file.stem) or ""
            if part in found:
                raise DataError([f"{found[part][0]} and {file} both mean {part or 'all images'}: keep one"])
            word = next((word for word in re.split(r"[^A-Za-z0-9]+", file.stem) if part_of(word)), part)
            names = dict.fromkeys([""] if around else [word, part, "", "default"])  # the last is CVAT's
            found[part] = (file, [place / name for name in names for place in (folder, folder / "images")])
    if "" in found and len(found) > 1:
        raise DataError([f"{found[''][0]} names no part (train, val, test), but other files do: rename it"])
    return found


def _coco_files(folder: Path) -> list[Path]:
    """The COCO files of a folder: Roboflow's, those in `annotations`, or others right in it that are like one."""
    if (file := folder / ROBOFLOW).is_file():
        return [file]
    files = sorted(file for file in (folder / FOLDER).glob("*.json") if not file.name.startswith("."))
    files = [file for file in files if file.stem.startswith("instances")] or files
    return files or formats.json_files(folder, "{", ["images", "annotations"])


def _read_coco(files: Mapping[str, tuple[Path, list[Path]]], reading: Reading) -> None:
    """Classes are the categories of training in the order of their ids."""
    folders: dict[Path, Path] = {}
    for part, (file, places) in files.items():
        content = _content(file, reading.faults)
        categories = {str(entry["id"]): same_form(str(entry["name"])) for entry in content["categories"]}
        if part in ("train", ""):
            reading.classes |= dict.fromkeys(categories[key] for key in samples.in_order(categories))
        reading.above |= {
            name
            for entry in content["categories"]
            if (name := same_form(str(entry.get("supercategory", "")))) != categories[str(entry["id"])]
        }
        found = reading.parts[part] = _objects(file, places, content, categories, reading)
        folder = next((place for place in places if any(Path(path).is_relative_to(place) for path in found)), places[0])
        folders.setdefault(folder, file)
    every = [path for found in reading.parts.values() for path in found]
    for folder, file in folders.items():
        reading.scan.unlisted(folder, file, every)


def _content(file: Path, faults: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The entries of a file's lists that have what they need."""
    found: dict[str, list[dict[str, Any]]] = {section: [] for section in WANTED}
    before = len(faults)
    content = formats.read_json(file, faults)
    if len(faults) > before:
        return found
    missing = [key for key in WANTED if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        faults.append(f"{file} is no COCO JSON: it has no list of {' and of '.join(missing)}")
        return found
    for section, keys in WANTED.items():
        for entry in content[section]:
            usable = [key for key in keys if isinstance(entry, dict) and isinstance(entry.get(key), keys[key])]
            if len(usable) == len(keys):
                found[section].append(entry)
            else:
                bad = next(key for key in keys if key not in usable)
                faults.append(f"{file}: an entry of {section} has no usable {bad}: {entry!r:.80}")
    return found


def _objects(
    file: Path,
    folders: Sequence[Path],
    content: dict[str, list[dict[str, Any]]],
    categories: Mapping[str, str],
    reading: Reading,
) -> dict[str, Objects]:
    """The objects of each image by its path, those without any included."""
    faults = reading.faults
    known: dict[str, Objects] = {}
    found: dict[str, Objects] = {}
    for entry in content["images"]:
        path = formats.find_image(entry["file_name"], folders)
        if str(entry["id"]) in known:
            faults.append(f"{file} has more than one image with the id {entry['id']}")
        if path is None:
            faults.append(f"{file} names {entry['file_name']}, but {folders[0] / entry['file_name']} does not exist")
        elif path in found:
            reading.scan.note(path, f"stands more than once in {file.name}: its objects are taken together")
        else:
            found[path] = Objects(file, (entry.get("height"), entry.get("width")))
        known[str(entry["id"])] = Objects(file) if path is None else found[path]
    for entry in content["annotations"]:
        where = f"annotation {entry.get('id', '?')}"
        for key, others in (("image_id", known), ("category_id", categories)):
            if str(entry[key]) not in others:
                faults.append(
                    f"{file}: {where} has the {key} {entry[key]!r:.40}, "
                    f"which is not among its {'images' if key == 'image_id' else 'categories'}"
                )
        if (objects := known.get(str(entry["image_id"]))) and (name := categories.get(str(entry["category_id"]))):
            crowd = number(entry.get("iscrowd")) > 0
            objects.rows.append(Row(where, name, entry.get("bbox") or _around(entry), crowd, entry.get("area")))
    return found


def _around(entry: Mapping[str, Any]) -> list[float] | None:
    """The box of an annotation that has polygons alone; None where it has none."""
    polygons = entry.get("segmentation")
    lists = [polygon for polygon in polygons if isinstance(polygon, list)] if isinstance(polygons, list) else []
    numbers = [value for polygon in lists for value in polygon[: len(polygon) // 2 * 2]]
    return formats.around(numbers) if numbers else None


def _labels(marked: Sequence[tuple[str, tuple[BoxFormat, Objects], Size]], scan: Scan) -> Iterator[Labels | list[str]]:
    """The class of each box, with its boxes, whether it is a crowd, and its area; checked against the image's size."""
    for path, (form, objects), size in marked:
        if fault := _size_fault(path, size, objects):
            yield [fault]
            continue
        sides = (size[1], size[0]) * 2
        rows: dict[tuple[Any, ...], float] = {}
        faults = []
        for row in objects.rows:
            where = f"{path}: the box of {row.where} in {objects.file.name}"
            numbers = [number(value) for value in row.box] if isinstance(row.box, (list, tuple)) else []
            if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
                faults.append(f"{where} is {row.box!r:.60}, not four numbers: {form.numbers}")
                continue
            corners = CORNERS[form.numbers](*numbers)
            box = [value * side for value, side in zip(corners, sides, strict=True)] if form.in_shares else corners
            cut = tuple(min(max(float(value), 0.0), side) for value, side in zip(box, sides, strict=True))
            area, visible = (max(edges[2] - edges[0], 0) * max(edges[3] - edges[1], 0) for edges in (box, cut))
            if area == 0:
                scan.note(where, "has no width or no height: left out")
            elif not visible >= MIN_VISIBLE * area:  # which holds for what is too large to be a number, too
                faults.append(
                    f"{where} goes from {box[0]:g},{box[1]:g} to {box[2]:g},{box[3]:g}, "
                    f"most of it out of the image of {size[1]}x{size[0]} (width x height)"
                )
            else:
                key = (*cut, row.name, row.crowd)
                if key in rows:
                    scan.note(where, "is there already, with the same class: left out")
                if any(abs(value - kept) > 1 for value, kept in zip(box, cut, strict=True)):
                    scan.note(where, "sticks out of its image: cut at the edge")
                own = number(row.area)
                rows.setdefault(key, own if 0 < own < math.inf else area)
        yield faults or Labels([key[4] for key in rows], rows)


def _size_fault(path: str, size: Size, objects: Objects) -> str | None:
    """Why boxes would not fit on an image of `size`, by what their file states; None where they do."""
    if objects.stated is None:
        return None
    stated = [number(side) for side in objects.stated]
    height, width = (int(side) if 1 <= side < np.inf else own for side, own in zip(stated, size, strict=True))
    if not any(side >= 1 for side in stated) and open_image(path).orientation > 1:
        return (
            f"{path} is turned by its EXIF tag, and {objects.file.name} states no size, so that it is unclear of which "
            "pixels its boxes are: state height and width, or remove the tag"
        )
    return dense.size_fault(path, size, (height, width), objects.file.name)


def _target(labels: Labels, numbers: Mapping[str, int]) -> GroundTruth:
    rows = labels.value
    return GroundTruth(
        boxes=np.array([row[:4] for row in rows], np.float64).reshape(-1, 4),
        labels=np.array([numbers[name] for name in labels.names], int),
        crowd=np.array([row[5] for row in rows], bool),
        area=np.array(list(rows.values()), np.float64),
    )


read = partial(samples.read, form=Format(_find, _labels, _target, min_classes=1))


def targets(sample: Sample, processor: Aimv2Processor, place: dense.Placement | None = None) -> Arrays:
    """What each of the P positions should say, `label` (P,) and `distances` (P, 4), of the image as `place` puts it."""
    truth: GroundTruth = sample.target
    place = place or dense.plain(sample.size, processor.canvas)
    height, width = place.canvas
    whole = place.boxes(truth.boxes)
    cut = whole.clip(0, np.array([width, height] * 2, np.float64))
    there = areas(cut) > 0
    undecided = truth.crowd | (areas(cut) < VISIBLE * areas(whole))
    where = points((height // processor.patch_size, width // processor.patch_size), processor.patch_size)
    label, distances = assign(where, cut[there], truth.labels[there], undecided[there])
    return {"label": label, "distances": distances}


example = partial(dense.example, targets)

FORMATS: dict[str, BoxFormat] = {
    "COCO JSON": BoxFormat(
        "annotations/*.json or beside the images", "left, top, width, height", _find_coco, _read_coco
    ),
    "VOC's XML": BoxFormat("Annotations/*.xml", "xmin, ymin, xmax, ymax", formats.find_voc, formats.read_voc),
    "YOLO's text": BoxFormat(
        "labels/*.txt", "centre x, centre y, width, height", formats.find_yolo, formats.read_yolo, in_shares=True
    ),
    "Create ML's JSON": BoxFormat(
        "annotations.json", "centre x, centre y, width, height", formats.find_create_ml, formats.read_create_ml
    ),
    "Hugging Face's objects": BoxFormat(
        "metadata.jsonl", "left, top, width, height", formats.find_hugging_face, formats.read_hugging_face
    ),
}
"""Name -> format, in the order in which DATA is tried."""
