"""Boxes as COCO JSON: one file per part in `annotations`, or Roboflow's beside each part's images.

Classes are the categories in the order of their ids. Roboflow's root category, which no object has and others name as
their own, is left out. The target of a sample is a `GroundTruth`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_aimv2.files import is_file, read_text
from mlx_aimv2.images.find import Scan
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import dense, samples
from mlx_aimv2.learn.detect.boxes import GroundTruth, areas
from mlx_aimv2.learn.detect.head import assign, points
from mlx_aimv2.learn.learner import canvas_size
from mlx_aimv2.learn.samples import DataError, Format, Found, Labels, Sample, Size, part_of, same_form
from mlx_aimv2.train.batches import Arrays
from mlx_aimv2.untrusted_json import Fields, are_numbers, misfit, parse

ROBOFLOW = "_annotations.coco.json"

FOLDER = "annotations"
"""Folder of the JSON files in COCO's own layout."""

WANTED: dict[str, Fields] = {
    "images": {"id": (int, str), "file_name": str},
    "annotations": {"image_id": (int, str), "category_id": (int, str)},
    "categories": {"id": (int, str), "name": (str, int)},
}
"""The lists of a COCO file, and of what type those fields of their entries are that are used."""

MIN_VISIBLE = 0.5
"""Share of a box that must lie in its image: less is no rounding and no object at the edge, but a wrong number."""

VISIBLE = 0.3
"""Share of an object that a training image must show; with less nobody says what its place should answer."""


def recognise(data: Path) -> str | None:
    """Which COCO JSON was found, else None."""
    files = _files_by_part(data, Scan()) if data.is_dir() else {}
    return next((file.name for file, _ in files.values()), None)


def _files_by_part(data: Path, scan: Scan) -> dict[str, tuple[Path, list[Path]]]:
    """JSON files by part, each with the folders in which its images may lie; the part is empty where DATA says none."""
    if (data / ROBOFLOW).is_file():
        return {"": (data / ROBOFLOW, [data])}
    folders = samples.parts_of(data, scan, lambda folder: (folder / ROBOFLOW).is_file())
    return {part: (folder / ROBOFLOW, [folder]) for part, folder in folders.items() if part} or _plain_files(data)


def _plain_files(data: Path) -> dict[str, tuple[Path, list[Path]]]:
    """COCO's own layout: `annotations/instances_train2017.json` beside `train2017/` or `images/train2017/`."""
    files = sorted(file for file in (data / FOLDER).glob("*.json") if not file.name.startswith("."))
    files = [file for file in files if file.stem.startswith("instances")] or files
    found: dict[str, tuple[Path, list[Path]]] = {}
    for file in files:
        part = part_of(file.stem) or ""
        if part in found:
            raise DataError([f"{found[part][0]} and {file} both mean {part or 'all images'}: keep one"])
        word = next((word for word in re.split(r"[^A-Za-z0-9]+", file.stem) if part_of(word)), part)
        names = dict.fromkeys([word, part, ""])
        found[part] = (file, [place / name for name in names for place in (data, data / "images")])
    if "" in found and len(found) > 1:
        raise DataError([f"{found[''][0]} names no part (train, val, test), but other files do: rename it"])
    return found


@dataclass
class _Objects:
    """What a file says of one image: its size as it is stated, and pairs of an annotation and its category."""

    file: Path
    stated: tuple[Any, Any]
    entries: list[tuple[dict[str, Any], str]] = field(default_factory=list)


def _find(data: Path, scan: Scan) -> Found:
    files = _files_by_part(data, scan)
    if not files:
        raise DataError([f"{data} has no COCO JSON: wanted {FOLDER}/*.json or {ROBOFLOW} beside the images"])
    found = Found({})
    names: dict[str, None] = {}
    above: set[str] = set()
    for part in sorted(files, key=lambda part: part != "train"):  # the classes are those of training
        file, folders = files[part]
        content = _content(file, found.faults)
        categories = {str(entry["id"]): same_form(str(entry["name"])) for entry in content["categories"]}
        if part in ("train", ""):
            names |= dict.fromkeys(categories[key] for key in samples.in_order(categories))
        above |= {
            name
            for entry in content["categories"]
            if (name := same_form(str(entry.get("supercategory", "")))) != categories[str(entry["id"])]
        }
        found.parts[part] = list(_objects(file, folders, content, categories, scan, found.faults).items())
    used = {name for pairs in found.parts.values() for _, objects in pairs for _, name in objects.entries}
    for name in (name for name in names if name not in used):
        is_root = name in above
        reason = "stands above others and no object has it: left out" if is_root else "is the class of no object"
        scan.note(f"category {name}", reason)
    found.classes = [name for name in names if name in used or name not in above]
    return found


def _content(file: Path, faults: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The entries of a file's lists that have what they need."""
    found: dict[str, list[dict[str, Any]]] = {section: [] for section in WANTED}
    try:
        content = parse(read_text(file, max_bytes=samples.MAX_BYTES), file)
    except (OSError, ValueError) as error:
        faults.append(str(error))
        return found
    missing = [key for key in WANTED if misfit(content, {key: list})]
    if missing:
        faults.append(f"{file} is no COCO JSON: it has no list of {' and of '.join(missing)}")
        return found
    for section, keys in WANTED.items():
        for entry in content[section]:
            if (bad := misfit(entry, keys)) is None:
                found[section].append(entry)
            else:
                faults.append(f"{file}: an entry of {section} has no usable {bad}: {entry!r:.80}")
    return found


def _objects(
    file: Path,
    folders: Sequence[Path],
    content: dict[str, list[dict[str, Any]]],
    categories: Mapping[str, str],
    scan: Scan,
    faults: list[str],
) -> dict[str, _Objects]:
    """The objects of each image by its path, those without any included."""
    images = content["images"]
    folder = _folder_of(images, folders)
    known: dict[str, _Objects] = {}
    found: dict[str, _Objects] = {}
    for entry in images:
        path = str(folder / str(entry["file_name"]))
        if str(entry["id"]) in known:
            faults.append(f"{file} has more than one image with the id {entry['id']}")
        if path in found:
            scan.note(path, f"stands more than once in {file.name}: its objects are taken together")
        elif is_file(path):
            found[path] = _Objects(file, (entry.get("height"), entry.get("width")))
        else:
            faults.append(f"{file} names {entry['file_name']!s}, but {path} does not exist")
        known[str(entry["id"])] = found.get(path) or _Objects(file, (None, None))
    for entry in content["annotations"]:
        for key, others in (("image_id", known), ("category_id", categories)):
            if str(entry[key]) not in others:
                faults.append(
                    f"{file}: annotation {entry.get('id', '?')} has the {key} {entry[key]!r:.40}, "
                    f"which is not among its {'images' if key == 'image_id' else 'categories'}"
                )
        if (objects := known.get(str(entry["image_id"]))) and (name := categories.get(str(entry["category_id"]))):
            objects.entries.append((entry, name))
    scan.unlisted(folder, file, found)
    return found


def _folder_of(images: Sequence[dict[str, Any]], folders: Sequence[Path]) -> Path:
    """The first folder that holds one of the first images, or the first that there is."""
    for folder in folders:
        if any(is_file(folder / str(entry["file_name"])) for entry in images[:5]):
            return folder
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _labels(marked: Sequence[tuple[str, _Objects, Size]], scan: Scan) -> Iterator[Labels | list[str]]:
    """The class of each box, with its boxes, whether it is a crowd, and its area; checked against the image's size."""
    for path, objects, size in marked:
        stated = [int(side) if str(side).isdigit() else own for side, own in zip(objects.stated, size, strict=True)]
        if tuple(stated) != size:
            yield [
                f"{path} has {size[0]}x{size[1]} pixels upright (height x width), "
                f"but {objects.file.name} says {stated[0]}x{stated[1]}: its boxes would not fit"
            ]
            continue
        limits = np.array([size[1], size[0]] * 2, np.float64)
        rows: dict[tuple[Any, ...], float] = {}
        faults = []
        for entry, name in objects.entries:
            where = f"{path}: the box of annotation {entry.get('id', '?')} in {objects.file.name}"
            box = _corners(entry.get("bbox"))
            if box is None:
                faults.append(f"{where} is {entry.get('bbox')!r:.60}, not four numbers: left, top, width, height")
                continue
            cut = box.clip(0, limits)
            area, visible = (float(np.prod(np.maximum(corners[2:] - corners[:2], 0))) for corners in (box, cut))
            if area == 0:
                scan.note(where, "has no width or no height: left out")
            elif visible < MIN_VISIBLE * area:
                faults.append(
                    f"{where} goes from {box[0]:g},{box[1]:g} to {box[2]:g},{box[3]:g}, "
                    f"most of it out of the image of {size[1]}x{size[0]} (width x height)"
                )
            else:
                row = (*cut.tolist(), name, bool(entry.get("iscrowd", 0)))
                if row in rows:
                    scan.note(where, "is there already, with the same class: left out")
                if max(-box[0], -box[1], box[2] - size[1], box[3] - size[0]) > 1:
                    scan.note(where, "sticks out of its image: cut at the edge")
                is_area = not misfit(entry, {"area": (int, float)}) and entry["area"] > 0
                rows.setdefault(row, float(entry["area"]) if is_area else area)
        yield faults or Labels([row[4] for row in rows], rows)


def _corners(box: Any) -> np.ndarray[Any, Any] | None:
    """COCO's left, top, width, height as left, top, right, bottom; None for what is no box."""
    if not are_numbers(box) or len(box) != 4:
        return None
    left, top, width, height = box
    return np.array([left, top, left + max(width, 0), top + max(height, 0)], np.float64)


def _target(labels: Labels, numbers: Mapping[str, int]) -> GroundTruth:
    rows = labels.value
    return GroundTruth(
        boxes=np.array([row[:4] for row in rows], np.float64).reshape(-1, 4),
        labels=np.array([numbers[name] for name in labels.names], int),
        crowd=np.array([row[5] for row in rows], bool),
        area=np.array(list(rows.values()), np.float64),
    )


read = partial(samples.read, form=Format(_find, _labels, _target, noun="object", min_classes=1))


def targets(sample: Sample, processor: Aimv2Processor, place: dense.Placement | None = None) -> Arrays:
    """What each of the P positions should say, `label` (P,) and `distances` (P, 4), of the image as `place` puts it."""
    truth: GroundTruth = sample.target
    place = place or dense.plain(sample.size, canvas_size(processor))
    height, width = place.canvas
    whole = place.boxes(truth.boxes)
    cut = whole.clip(0, np.array([width, height] * 2, np.float64))
    there = areas(cut) > 0
    undecided = truth.crowd | (areas(cut) < VISIBLE * areas(whole))
    where = points((height // processor.patch_size, width // processor.patch_size), processor.patch_size)
    label, distances = assign(where, cut[there], truth.labels[there], undecided[there])
    return {"label": label, "distances": distances}


example = partial(dense.example, targets)
