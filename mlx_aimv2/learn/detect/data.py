"""Boxes in each of the formats of `formats.py`, and the checks that hold for all of them.

DATA -> the first of `FORMATS` that it is in -> rows of each image -> boxes cut, left out or refused -> GroundTruth

The target of a sample is a `GroundTruth`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_aimv2.images import open_image
from mlx_aimv2.images.find import Scan
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import dense, samples
from mlx_aimv2.learn.detect.boxes_average_precision import GroundTruth, areas
from mlx_aimv2.learn.detect.formats import FORMATS, BoxFormat, Objects, Reading, number
from mlx_aimv2.learn.detect.head import assign, points
from mlx_aimv2.learn.samples import DataError, Format, Found, Labels, Recognised, Sample, Size
from mlx_aimv2.learn.tables import not_read
from mlx_aimv2.train.batches import Arrays

MIN_VISIBLE, VISIBLE = 0.5, 0.3
"""Share of a box that must lie in its image: less is no rounding and no object at the edge, but a wrong number; and of
an object that a training image must show: with less nobody says what its place should answer."""

CORNERS: dict[str, Callable[[float, float, float, float], Sequence[float]]] = {
    "left, top, width, height": lambda x, y, w, h: (x, y, x + w, y + h),
    "centre x, centre y, width, height": lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
    # VOC counts pixels from 1 and includes the last one; other programs write an empty box with equal ends.
    "xmin, ymin, xmax, ymax": lambda x, y, right, bottom: (x - (right > x), y - (bottom > y), right, bottom),
}
"""What four numbers are -> left, top, right, bottom."""


def recognise(data: Path) -> Recognised | None:
    """In which format DATA has boxes, else None."""
    located = _locate(data, scan := Scan())
    return Recognised(f"boxes as {next(iter(located))}", scan, located) if located else None


def _locate(data: Path, scan: Scan) -> dict[str, Any]:
    """What each format finds of itself, or the error that it meets, which is raised where this format is read."""
    located: dict[str, Any] = {}
    for name, form in FORMATS.items():
        try:
            located[name] = form.find(data, scan)
        except (ValueError, OSError) as error:
            located[name] = error
    return {name: found for name, found in located.items() if found}


def _find(data: Path, located: Mapping[str, Any], scan: Scan) -> Found:
    if not located:
        layouts = ", ".join(f"{name} ({form.layout})" for name, form in FORMATS.items())
        raise DataError([f"{data} has no boxes in a format that is read: {layouts}", *not_read(data)])
    (first, found), *others = located.items()
    for other, _ in others:
        scan.note(str(data), f"also has boxes as {other}, which are not read: {first} comes first")
    if isinstance(found, Exception):
        raise found
    form, reading = FORMATS[first], Reading(data, scan)
    form.read(found, reading)
    images = {path: objects for own in reading.parts.values() for path, objects in own.items()}
    for folder, file in reading.listed.items():
        scan.unlisted(folder, file, images)
    used = {row.name for objects in images.values() for row in objects.rows}
    roots = reading.above - used  # as Roboflow has one
    for name in reading.classes:
        if name not in used:
            left_out = "is above others and has no objects: left out"
            scan.note(f"category {name}", left_out if name in roots else "has no objects")
    classes = [name for name in reading.classes if name not in roots]
    parts = {part: [(path, (form, objects)) for path, objects in own.items()] for part, own in reading.parts.items()}
    return Found(parts or {"": []}, classes or None)


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
            if not row.name:
                faults.append(f"{where} has no name of its class")
            if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
                stated = "is missing" if row.box in (None, [], [None] * 4) else f"is {row.box!r:.60}"
                faults.append(f"{where} {stated}, not four numbers: {form.numbers}")
                continue
            corners = CORNERS[form.numbers](*numbers)
            box = [value * side for value, side in zip(corners, sides, strict=True)] if form.in_shares else corners
            cut = tuple(min(max(float(value), 0.0), side) for value, side in zip(box, sides, strict=True))
            area, visible = (max(edges[2] - edges[0], 0) * max(edges[3] - edges[1], 0) for edges in (box, cut))
            if area == 0:
                scan.note(where, "has no width or no height: left out")
            elif not form.in_shares and max(cut) <= 1 > area:
                faults.append(f"{where} is within one pixel, like a share of the sides: give {form.numbers} in pixels")
            elif not visible >= MIN_VISIBLE * area:  # which holds for what is too large to be a number, too
                faults.append(
                    f"{where} goes from {box[0]:g},{box[1]:g} to {box[2]:g},{box[3]:g}, "
                    f"mostly outside the image of {size[1]}x{size[0]} (width x height)"
                )
            else:
                key = (*cut, row.name, number(row.crowd) > 0)
                if key[5]:
                    scan.note(where, "is difficult or a crowd: neither trained on nor scored")
                if key in rows:
                    scan.note(where, "is a repetition, with the same class: left out")
                if any(abs(value - kept) > 1 for value, kept in zip(box, cut, strict=True)):
                    scan.note(where, "extends beyond its image: cut at the edge")
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


read = partial(samples.read, form=Format(_locate, _find, _labels, _target, min_classes=1))


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
