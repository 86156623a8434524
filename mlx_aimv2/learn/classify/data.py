"""Images with a label each, from folders named after labels, or from tables such as `metadata.csv` beside them.

The target of a sample is the number of its class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlx_aimv2.images import to_rgb
from mlx_aimv2.images.find import Scan
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import metadata, samples
from mlx_aimv2.learn.metadata import LABEL, PART, column, columns_of, folder_of, image_of, metadata_file, metadata_rows
from mlx_aimv2.learn.samples import DataError, Format, Found, Labels, Sample, listed, one_image, part_of, same_form
from mlx_aimv2.train.augment import Augmentation
from mlx_aimv2.train.batches import Arrays

Labelled: TypeAlias = "list[tuple[str, str]]"
"""Pairs of an image's path and its label."""

MIN_AREA = 0.5
"""Smallest random crop, as a share of the image: more than for pre-training, as small objects must not be cut off."""

OPERATIONS = 2
"""Of RandAugment, on each training image."""

NUMBER, WHOLE = re.compile(r"-?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE), re.compile(r"(-?\d+)\.0*$")
"""A number as text, and a whole one as pandas writes it where a column has gaps."""

SEVERAL = "several labels an image are not possible yet: keep one, or make each combination a label"

tables = partial(metadata.tables, of=LABEL)


def recognise(data: Path) -> str | None:
    """Why `data` has a label for each image, a phrase; None where it has none."""
    scan = Scan()
    sources = _sources(data, scan)
    if files := [source.name for source in sources.values() if source.is_file()]:
        return f"labels in {listed(dict.fromkeys(files))}"
    nested = [file.name for folder in sources.values() for file in _nested(folder, scan)]
    if nested:
        return f"labels in {listed(dict.fromkeys(nested))} of its folders"
    count = len({same_form(place.name) for folder in sources.values() for place in _label_folders(folder, scan)})
    return f"a folder for each of {one_image(count, 'label')}" if count else None


def _sources(data: Path, scan: Scan) -> dict[str, Path]:
    """Of each part its table, or its folder with a folder for each label.

    Right in DATA folders win over a table that is not called metadata, as it may be about something else.
    """
    here = tables(data)
    if metadata_file(data) in here.values():
        return here
    parts = samples.parts_of(
        data, scan, lambda folder: bool(tables(folder) or _label_folders(folder, scan) or _nested(folder, scan))
    )
    found: dict[str, Path] = {}
    for part, folder in parts.items():
        own = tables(folder) if part else {}
        if len(own) > 1:
            raise DataError([f"{folder} has several tables of images ({listed(map(str, own.values()))}): keep one"])
        found[part] = next(iter(own.values()), folder)
    names = {place.name for folder in found.values() if folder.is_dir() for place in _label_folders(folder, scan)}
    is_by_folder = len(names) > 1 and not all(map(part_of, names))
    return found if is_by_folder or not here else here


def _label_folders(folder: Path, scan: Scan) -> list[Path]:
    return [place for place in scan.folders(folder) if scan.images(place)]


def _nested(folder: Path, scan: Scan) -> list[Path]:
    """The metadata files with labels in the folders of a folder."""
    files = [metadata_file(place) for place in scan.folders(folder)]
    return [file for file in files if file and column(columns_of(file), LABEL)]


def _find(data: Path, scan: Scan) -> Found:
    found = Found({})
    sources = _sources(data, scan)
    for part, source in sources.items():
        if files := [source] if source.is_file() else _nested(source, scan):
            rows = [row for file in files for row in _by_table(file, scan, found.faults)]
            parts = {part: [row[:2] for row in rows]} if part else _parts_of_rows(rows, data, scan)
            found.parts |= parts
            if others := {*_label_folders(source, scan)} - {file.parent for file in files} if source.is_dir() else ():
                scan.note(sorted(map(str, others)), "has no metadata with labels: skipped")
            continue
        found.parts[part] = []
        places = scan.folders(source)
        if not part and places and all(part_of(place.name) for place in places):
            found.faults += [f"{place} is a part of the data without a folder for each label" for place in places]
            continue
        for place in places:
            images = scan.images(place)
            found.parts[part] += [(path, same_form(place.name)) for path in images]
            if not images:
                found.faults.append(f"{place} is a label without images")
        if loose := scan.loose(source):
            scan.note(loose, "lies in no label's folder: skipped")
    for file in {*tables(data).values()} - {*sources.values()}:
        if any(label not in map(same_form, Path(path).parts) for path, label, _ in _by_table(file, Scan(), [])):
            found.faults.append(
                f"{file} and the folders have different labels: call it metadata.csv if it is right, else move it away"
            )
        scan.note(str(file), "is not read, as folders name the labels")
    return found


def _by_table(file: Path, scan: Scan, faults: list[str]) -> list[tuple[str, str, str]]:
    """Path, label and part of each row that names an image; what is wrong is added to `faults`."""
    rows, wrong = metadata_rows(file, scan)
    faults += wrong
    names = list(dict.fromkeys(name for row in rows for name in row))
    labels, parts = column(names, LABEL), column(names, PART)
    if rows and len(labels) != 1:
        what = f"{listed(labels)} may all name the labels" if labels else "no column label"
        faults.append(f"{file} has {what}: call the column of the labels label")
    if len(labels) != 1:
        return []
    if labels != ["label"]:
        scan.note(str(file), f"has the labels in its column {labels[0]}")
    texts = _texts([row.get(labels[0]) for row in rows])
    if all(NUMBER.fullmatch(text) for text in texts if text):
        texts = [WHOLE.sub(r"\1", text) for text in texts]
        if odd := [text for text in texts if text and not text.lstrip("-").isdigit()]:
            faults.append(f"{file} has numbers as labels, {odd[0]} for one: a label is a word or a whole number")
            return []
    folder = folder_of(file, rows, scan)
    found: dict[str, tuple[str, str]] = {}
    unlabelled: list[str] = []
    for row, text in zip(rows, texts, strict=True):
        where, path = f"{file}, line {row['']}: {row['file_name']:.80}", image_of(folder, row["file_name"])
        value = row.get(labels[0])
        if (isinstance(value, list) and len(value) > 1) or (path and found.get(str(path), (text,))[0] != text):
            faults.append(f"{where} has more than one label; {SEVERAL}")
        elif isinstance(value, dict):
            faults.append(f"{where} has no text as its label")
        elif not text:
            scan.note(where, "has no label: left out")
            unlabelled.append(str(path))
        elif path is None:
            faults.append(f"{where} does not exist")
        elif str(path) in found:
            scan.note(where, "is there already, with the same label: left out")
        else:
            found[str(path)] = text, part_of(str(row.get(parts[0], ""))) or "" if len(parts) == 1 else ""
    scan.unlisted(folder, file, (*found, *unlabelled))
    return [(path, label, part) for path, (label, part) in found.items()]


def _texts(values: Sequence[Any]) -> list[str]:
    """Labels as text, "" where there is none: nothing, an empty list, or what is not a number."""
    single = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    return ["" if value in (None, []) or value != value else same_form(str(value)) for value in single]


def _parts_of_rows(rows: Sequence[tuple[str, str, str]], folder: Path, scan: Scan) -> dict[str, Labelled]:
    """Rows by the part that they say, or a folder in their path, if all have one or several parts are named."""
    found: dict[str, Labelled] = {} if rows else {"": []}
    for path, label, part in rows:
        inside = Path(path).relative_to(folder).parent.parts if Path(path).is_relative_to(folder) else ()
        found.setdefault(part or next(filter(None, map(part_of, inside)), ""), []).append((path, label))
    if "" in found and len(found) == 2:
        return {"": [row[:2] for row in rows]}  # a class that is called like a part
    if len(found) > 2 and (rest := found.pop("", [])):
        scan.note([path for path, _ in rest], "lies in no part of the labelled data (train, val, test): skipped")
    return found


def _labels(marked: Sequence[tuple[str, str, samples.Size]], scan: Scan) -> list[Labels]:
    return [Labels((label,), None) for _, label, _ in marked]


def _target(labels: Labels, numbers: Mapping[str, int]) -> int:
    return numbers[labels.names[0]]


read = partial(samples.read, form=Format(_find, _labels, _target, min_images=2, others=metadata.not_read))


def example(
    sample: Sample, processor: Aimv2Processor, *, rng: np.random.Generator | None, flip: bool = False
) -> Arrays:
    """`pixels` (H, W, 3) and the class of a sample, its image changed at random by `rng`."""
    image: Any = sample.path
    if rng is not None:
        changed = Augmentation(min_area=MIN_AREA, flip=flip, operations=OPERATIONS)
        image = changed(to_rgb(sample.path), processor.canvas, rng)
    return {"pixels": processor.pixels(image), **targets(sample, processor)}


def targets(sample: Sample, processor: Aimv2Processor) -> Arrays:
    """The number of the class, ()."""
    return {"label": np.array(sample.target, np.int32)}
