"""Reads and writes boxes as COCO JSON: one file per part in `annotations`, or Roboflow's beside each part's images."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np

from mlx_aimv2.files import read_text
from mlx_aimv2.learn.average_precision import Found, Truth
from mlx_aimv2.learn.coco_layout import FOLDER, ROBOFLOW, files_by_part, folder_of
from mlx_aimv2.learn.data import (
    DataError,
    Dataset,
    Sample,
    check_images,
    image_size,
    one_image,
    split,
    straddling,
    without_val,
)
from mlx_aimv2.learn.label_files import MAX_BYTES

TOLERANCE = 1.0
"""Pixels by which a box may stick out of its image, as rounding makes it; it is cut there."""


def recognise(data: Path) -> str | None:
    """Which COCO JSON was found, else None."""
    files = files_by_part(data)
    return f"{next(iter(files.values()))[0].name}" if files else None


def read(data: Path, *, classes: Sequence[str] | None = None) -> Dataset:
    """DATA read and checked; DataError lists all that is wrong.

    Classes are the categories in the order of their ids. Roboflow's root category, which no object has and others name
    as their own, is left out.
    """
    files = files_by_part(data)
    if not files:
        raise DataError([f"{data} has no COCO JSON: wanted {FOLDER}/*.json or {ROBOFLOW} beside the images"])
    wrong: list[str] = []
    parts = {part: _Part(file, folders, wrong) for part, (file, folders) in files.items()}
    names, notes = _classes(parts, wrong)
    wrong += (
        []
        if classes is None
        else [
            f"{data} has objects of the class {name}, which is not in the list" for name in names if name not in classes
        ]
    )
    order = list(names) if classes is None else list(classes)
    hashes, unreadable = check_images([path for part in parts.values() for path in part.paths.values()])
    wrong += unreadable
    samples = {part: content.samples(order, hashes, wrong) for part, content in parts.items()}
    if not wrong and not any(len(sample.target.boxes) for found in samples.values() for sample in found):
        wrong.append(f"{data}: no image has an object")
    if wrong:
        raise DataError(wrong)
    if set(samples) == {""}:
        splits = split(samples[""], [_stratum(sample, len(order)) for sample in samples[""]])
        notes.append(f"{one_image(len(samples['']))}, split by content: {_counts(splits)}")
    else:
        splits = {part: samples.get(part, []) for part in ("train", "val", "test")}
        if wrong := straddling(splits):
            raise DataError(wrong)
        if splits["train"] and not splits["val"]:
            strata = [_stratum(sample, len(order)) for sample in splits["train"]]
            splits["train"], splits["val"] = without_val(splits["train"], strata)
            notes.append(f"{one_image(len(splits['val']))} of train serve as val")
    return Dataset("detect", tuple(order), splits, tuple(notes))


def as_results(predictions: Sequence[tuple[str, tuple[int, int], Found]], classes: Sequence[str]) -> dict[str, Any]:
    """Predictions as a COCO file with scores: `(path, (height, width), boxes), … -> JSON`; category ids start at 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, (height, width), found) in enumerate(predictions, 1):
        images.append({"id": number, "file_name": path, "width": width, "height": height})
        for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True):
            left, top, right, bottom = (round(float(n), 2) for n in box)
            shape = [left, top, round(right - left, 2), round(bottom - top, 2)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": int(label) + 1, "bbox": shape}
                | {"area": round(shape[2] * shape[3], 2), "iscrowd": 0, "score": round(float(score), 5)}
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


class _Part:
    """One JSON file: its images, categories and annotations, checked for all that needs no image."""

    def __init__(self, file: Path, folders: Sequence[Path], wrong: list[str]) -> None:
        self.file = file
        content = _content(file, wrong)
        images = [entry for entry in content["images"] if self._has(entry, ("id", "file_name"), "images", wrong)]
        self.folder = folder_of(images, folders)
        self.images = {entry["id"]: entry for entry in images}
        if len(self.images) < len(images):
            double = [name for name, count in Counter(entry["id"] for entry in images).items() if count > 1]
            wrong.append(f"{file} has more than one image with the id {double[0]}")
        self.paths: dict[Any, str] = {}
        for key, entry in self.images.items():
            path = self.folder / str(entry["file_name"])
            if path.is_file():
                self.paths[key] = str(path)
            else:
                wrong.append(f"{file} names {entry['file_name']!s}, but {path} does not exist")
        self.categories = {
            entry["id"]: entry
            for entry in content["categories"]
            if self._has(entry, ("id", "name"), "categories", wrong)
        }
        self.annotations = [
            entry
            for entry in content["annotations"]
            if self._has(entry, ("image_id", "category_id", "bbox"), "annotations", wrong)
        ]
        for entry in self.annotations:
            for key, known in (("image_id", self.images), ("category_id", self.categories)):
                if entry[key] not in known:
                    wrong.append(
                        f"{file}: annotation {entry.get('id', '?')} has the {key} {entry[key]!r:.40}, "
                        f"which is not among its {'images' if key == 'image_id' else 'categories'}"
                    )

    def _has(self, entry: Any, keys: Sequence[str], section: str, wrong: list[str]) -> bool:
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        named = [key for key in keys if key.endswith("id") and key not in missing]
        bad = missing or [key for key in named if not isinstance(entry[key], (int, str))]
        if bad:
            wrong.append(f"{self.file}: an entry of {section} has no usable {bad[0]}: {entry!r:.80}")
        return not bad

    def samples(self, classes: Sequence[str], hashes: dict[str, bytes], wrong: list[str]) -> list[Sample]:
        """An image with its objects for each entry; boxes are checked against the image itself."""
        of_image: dict[Any, list[dict[str, Any]]] = {}
        for entry in self.annotations:
            of_image.setdefault(entry["image_id"], []).append(entry)
        readable = {key: path for key, path in self.paths.items() if path in hashes}  # the others are said elsewhere
        with ThreadPoolExecutor(cpu_count() or 1, "sizes") as pool:
            sizes = list(pool.map(image_size, readable.values()))
        result = []
        for (key, path), size in zip(readable.items(), sizes, strict=True):
            entry = self.images[key]
            stated = (entry.get("height", size[0]), entry.get("width", size[1]))
            if stated != size:
                wrong.append(
                    f"{path} has {size[0]}x{size[1]} pixels upright (height x width), "
                    f"but {self.file.name} says {stated[0]}x{stated[1]}: its boxes would not fit"
                )
                continue
            result.append(Sample(path, hashes[path], self._truth(of_image.get(key, []), size, path, classes, wrong)))
        return result

    def _truth(
        self, entries: list[dict[str, Any]], size: tuple[int, int], path: str, classes: Sequence[str], wrong: list[str]
    ) -> Truth:
        boxes, labels, crowd, area = [], [], [], []
        for entry in entries:
            category = self.categories.get(entry["category_id"])
            reason = _fault(entry["bbox"], size)
            if reason is not None:
                wrong.append(f"{path}: the box of annotation {entry.get('id', '?')} in {self.file.name} {reason}")
            elif category is not None and category["name"] in classes:
                left, top, width, height = (float(n) for n in entry["bbox"])
                boxes.append([left, top, left + width, top + height])
                labels.append(classes.index(category["name"]))
                crowd.append(bool(entry.get("iscrowd", 0)))
                own = entry.get("area")
                area.append(float(own) if isinstance(own, (int, float)) and own > 0 else width * height)
        limits = np.array([size[1], size[0]] * 2, np.float64)
        table = np.array(boxes, np.float64).reshape(-1, 4).clip(0, limits)
        return Truth(table, np.array(labels, int), np.array(crowd, bool), np.array(area, np.float64))


def _content(file: Path, wrong: list[str]) -> dict[str, list[Any]]:
    empty: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    try:
        content = json.loads(read_text(file, max_bytes=MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        wrong.append(f"{file} cannot be read as JSON: {error}")
        return empty
    missing = [key for key in empty if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        wrong.append(f"{file} is no COCO JSON: it has no list of {' and of '.join(missing)}")
        return empty
    return {key: content[key] for key in empty}


def _fault(box: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with a box of COCO's form, to follow its name; None if nothing is."""
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in box)
    ):
        return f"is {box!r:.60}, not four numbers: left, top, width, height"
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return f"is {width:g} wide and {height:g} high: nothing in it"
    out = max(-left, -top, left + width - size[1], top + height - size[0])
    if out > TOLERANCE:
        return (
            f"goes from {left:g},{top:g} to {left + width:g},{top + height:g}, "
            f"{out:g} pixels out of the image of {size[1]}x{size[0]} (width x height)"
        )
    return None


def _classes(parts: dict[str, _Part], wrong: list[str]) -> tuple[list[str], list[str]]:
    """Names of the classes in the order of their ids, and notes; all parts must mean the same."""
    named: dict[Any, str] = {}
    used: set[str] = set()
    above: set[str] = set()
    for part in parts.values():
        counts = Counter(str(entry["name"]) for entry in part.categories.values())
        wrong += [f"{part.file} has more than one category called {n}" for n, count in counts.items() if count > 1]
        for key, entry in part.categories.items():
            name = named.setdefault(key, str(entry["name"]))
            if name != str(entry["name"]):
                wrong.append(f"{part.file} calls category {key} {entry['name']}, another file {name}")
            above.add(str(entry.get("supercategory", "")))
        used |= {
            str(part.categories[e["category_id"]]["name"])
            for e in part.annotations
            if e["category_id"] in part.categories
        }
    order = sorted(named, key=lambda key: (isinstance(key, str), key))
    roots = {named[key] for key in order if named[key] in above and named[key] not in used}
    names = [named[key] for key in order if named[key] not in roots]
    notes = [f"category {name} is left out: it stands above others and no object has it" for name in sorted(roots)]
    notes += [f"no object is of the class {name}" for name in names if name not in used]
    return names, notes


def _stratum(sample: Sample, classes: int) -> int:
    """The class that most objects of an image have; `classes` where it has none."""
    labels = sample.target.labels
    return int(np.bincount(labels).argmax()) if len(labels) else classes


def _counts(splits: dict[str, list[Sample]]) -> str:
    return ", ".join(f"{len(found):,} {part}" for part, found in splits.items())
