"""Images with a label each, from folders named after labels, or from `metadata.csv` or `metadata.jsonl` beside them.

The target of a sample is the number of its class.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlx_aimv2.files import is_file, read_text
from mlx_aimv2.images import to_rgb
from mlx_aimv2.images.find import Scan
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import samples
from mlx_aimv2.learn.learner import canvas_size
from mlx_aimv2.learn.samples import DataError, Format, Found, Labels, Sample, one_image, part_of, same_form
from mlx_aimv2.train.augment import Augmentation
from mlx_aimv2.train.batches import Arrays
from mlx_aimv2.untrusted_json import parse

Labelled: TypeAlias = "list[tuple[str, str]]"
"""Pairs of an image's path and its label."""

METADATA = ("metadata.csv", "metadata.jsonl")
"""Names of the files by which Hugging Face's `imagefolder` knows its images."""

MIN_AREA = 0.5
"""Smallest random crop, as a share of the image: more than for pre-training, as small objects must not be cut off."""

OPERATIONS = 2
"""Of RandAugment, on each training image."""


def recognise(data: Path) -> str | None:
    """Why `data` has a label for each image, a phrase; None where it has none."""
    scan = Scan()
    for folder in _parts(data, scan).values():
        if (file := metadata_file(folder)) is not None:
            rows, _ = metadata_rows(file)
            return f"labels in {file.name}" if rows and "label" in rows[0] else None
        if count := len({same_form(place.name) for place in scan.folders(folder) if scan.images(place)}):
            return f"a folder for each of {one_image(count, 'label')}"
    return None


def _parts(data: Path, scan: Scan) -> dict[str, Path]:
    """The parts of DATA: folders with a metadata file or a folder for each label."""

    def holds(folder: Path) -> bool:
        return metadata_file(folder) is not None or any(scan.images(place) for place in scan.folders(folder))

    return {"": data} if metadata_file(data) is not None else samples.parts_of(data, scan, holds)


def _find(data: Path, scan: Scan) -> Found:
    found = Found({})
    for part, folder in _parts(data, scan).items():
        if (file := metadata_file(folder)) is not None:
            labelled, faults = _by_metadata(file, scan)
            found.faults += faults
            found.parts |= {part: labelled} if part else _parts_of_rows(labelled, folder, scan)
            continue
        found.parts[part] = []
        places = scan.folders(folder)
        if not part and places and all(part_of(place.name) for place in places):
            found.faults += [f"{place} is a part of the data without a folder for each label" for place in places]
            continue
        for place in places:
            images = scan.images(place)
            found.parts[part] += [(path, same_form(place.name)) for path in images]
            if not images:
                found.faults.append(f"{place} is a label without images")
        if loose := scan.loose(folder):
            scan.note(loose[0], "lies in no label's folder: skipped", len(loose))
    return found


def _by_metadata(file: Path, scan: Scan) -> tuple[Labelled, list[str]]:
    rows, faults = metadata_rows(file)
    labelled = []
    for row in rows:
        where = f"{file}, line {row['']}"
        path, label = file.parent / row["file_name"], row.get("label")
        if label is None or isinstance(label, (dict, list, float)) or str(label).strip() == "":
            faults.append(f"{where}: {row['file_name']} has no label; wanted a column called label")
        elif not is_file(path):
            faults.append(f"{where}: {row['file_name']} does not exist")
        else:
            labelled.append((str(path), same_form(str(label))))
    twice = [path for path, count in Counter(path for path, _ in labelled).items() if count > 1]
    faults += [f"{file}: {path} is listed more than once" for path in twice]
    scan.unlisted(file.parent, file, [path for path, _ in labelled])
    return labelled, faults


def _parts_of_rows(labelled: Labelled, folder: Path, scan: Scan) -> dict[str, Labelled]:
    """Rows by the part that a folder in their path names, if all have one or several parts are named."""
    found: dict[str, Labelled] = {}
    for path, label in labelled:
        inside = Path(path).relative_to(folder).parent.parts if Path(path).is_relative_to(folder) else ()
        part = next((part for name in inside if (part := part_of(name))), "")
        found.setdefault(part, []).append((path, label))
    if "" in found and len(found) == 2:
        return {"": labelled}  # a class that is called like a part
    if len(found) > 2 and (rest := found.pop("", [])):
        scan.note(rest[0][0], "lies in no part of the labelled data (train, val, test): skipped", len(rest))
    return found


def metadata_file(folder: Path) -> Path | None:
    """The metadata file right in a folder, if there is one. DataError if there are two."""
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError([f"{folder} has {files[0].name} and {files[1].name}: keep one of them"])
    return files[0] if files else None


def metadata_rows(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a metadata file, each with `file_name` and its line under "", and what is wrong with the others."""
    try:
        text = read_text(file, max_bytes=samples.MAX_BYTES)
    except UnicodeDecodeError as error:
        return [], [f"{file} is not UTF-8 text: {error}"]
    rows, faults = [], []
    numbered = _csv_rows(file, text) if file.suffix == ".csv" else _json_rows(text)
    for line, row in numbered:
        if not isinstance(row, dict):
            faults.append(f'{file}, line {line}: wanted {{"file_name": …}}, got no JSON object')
        elif not isinstance(row.get("file_name"), str) or not row["file_name"]:
            faults.append(f"{file}, line {line}: no file_name")
        else:
            rows.append({**row, "": line})
    if not rows and not faults:
        faults.append(f"{file} has no rows")
    return rows, faults


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise DataError([f"{file}, line {reader.line_num}: {error}"]) from None


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines, as U+2028, may stand in a string
        if line.strip():
            try:
                yield number, parse(line, "a line")
            except ValueError:
                yield number, None


def _labels(marked: Sequence[tuple[str, str, samples.Size]], scan: Scan) -> list[Labels]:
    return [Labels((label,), None) for _, label, _ in marked]


def _target(labels: Labels, numbers: Mapping[str, int]) -> int:
    return numbers[labels.names[0]]


read = partial(samples.read, form=Format(_find, _labels, _target, min_images=2))


def example(
    sample: Sample, processor: Aimv2Processor, *, rng: np.random.Generator | None, flip: bool = False
) -> Arrays:
    """`pixels` (H, W, 3) and the class of a sample, its image changed at random by `rng`."""
    image: Any = sample.path
    if rng is not None:
        changed = Augmentation(min_area=MIN_AREA, flip=flip, operations=OPERATIONS)
        image = changed(to_rgb(sample.path), canvas_size(processor), rng)
    return {"pixels": processor.pixels(image), **targets(sample, processor)}


def targets(sample: Sample, processor: Aimv2Processor) -> Arrays:
    """The number of the class, ()."""
    return {"label": np.array(sample.target, np.int32)}
