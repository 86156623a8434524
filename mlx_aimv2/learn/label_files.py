"""Reads the labels of images: a folder for each label, or `metadata.csv` or `metadata.jsonl` beside the images."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlx_aimv2.files import read_text
from mlx_aimv2.learn.data import (
    SPLITS,
    DataError,
    Dataset,
    Sample,
    check_images,
    images_in,
    listed,
    one_image,
    parts,
    split,
    straddling,
    without_val,
)

METADATA = ("metadata.csv", "metadata.jsonl")
"""Names of the files by which Hugging Face's `imagefolder` knows its images."""

Labelled: TypeAlias = "list[tuple[str, str]]"
"""Pairs of an image's path and its label."""

MAX_BYTES = 1 << 30
"""Of a list of labels: COCO's own annotations have 450 MB."""


def recognise(data: Path) -> str | None:
    """Why `data` has a label for each image, a phrase; None where it has none."""
    for folder in [data, *parts(data).values()]:
        if (file := metadata_file(folder)) is not None:
            rows, _ = metadata_rows(file)
            return f"labels in {file.name}" if rows and "label" in rows[0] else None
    folders = label_folders(next(iter(parts(data).values()), data))
    return f"a folder for each of {one_image(len(folders), 'label')}" if folders else None


def read(data: Path, *, classes: Sequence[str] | None = None) -> Dataset:
    """Labelled images, checked: `folder -> Dataset`.

    Without `classes` these are the labels of the training part, and DATA without parts is split. With them, as for
    `evaluate`, nothing is split: what lies in no part counts as `test`. DataError lists everything that is wrong.
    """
    found, wrong = _found(data)
    names = tuple(classes) if classes is not None else tuple(_sorted({label for _, label in found["train"]}))
    every = [pair for labelled in found.values() for pair in labelled]
    hashes, unreadable = check_images([path for path, _ in every])
    wrong += unreadable
    wrong += _unknown(found, names)
    if classes is None:
        wrong += _too_few(found["train"], names, hashes, data)
    elif not every:
        wrong.append(f"{data} has no labelled images in it")
    if wrong:
        raise DataError(wrong)
    number = {name: i for i, name in enumerate(names)}
    splits = {
        part: [Sample(path, hashes[path], number[label]) for path, label in labelled]
        for part, labelled in found.items()
    }
    if classes is not None:
        if not (splits["val"] or splits["test"]):
            splits = {"train": [], "val": [], "test": splits["train"]}
        return Dataset("classify", names, splits)
    notes = _contradictions([sample for samples in splits.values() for sample in samples], names)
    if not (splits["val"] or splits["test"]):
        splits = split(splits["train"], [sample.target for sample in splits["train"]])
        counts = ", ".join(f"{len(samples):,} {part}" for part, samples in splits.items())
        notes.append(f"split by content, the same each time: {counts}")
    elif not splits["val"]:
        train, val = without_val(splits["train"], [sample.target for sample in splits["train"]])
        splits = {"train": train, "val": val, "test": splits["test"]}
        notes.append(f"{one_image(len(val))} of train taken as val, by content")
    if overlap := straddling(splits):
        notes.append(f"{one_image(len(overlap))} in two parts, which flatters the result: {listed(overlap, most=3)}")
    return Dataset("classify", names, splits, tuple(notes))


def label_folders(folder: Path) -> list[Path]:
    """The folders right in `folder` that hold images, by name."""
    return sorted(
        place for place in folder.iterdir() if place.is_dir() and place.name[0] != "." and any(images_in(place))
    )


def metadata_file(folder: Path) -> Path | None:
    """The metadata file right in a folder, if there is one. DataError if there are two."""
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError([f"{folder} has {files[0].name} and {files[1].name}: keep one of them"])
    return files[0] if files else None


def metadata_rows(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a metadata file, each a dictionary with `file_name`, and what is wrong with the others."""
    try:
        text = read_text(file, max_bytes=MAX_BYTES)
    except UnicodeDecodeError as error:
        return [], [f"{file} is not UTF-8 text: {error}"]
    rows, wrong = [], []
    numbered = _csv_rows(text) if file.suffix == ".csv" else _json_rows(text)
    for line, row in numbered:
        if not isinstance(row, dict):
            wrong.append(f"{file}, line {line}: not a JSON object")
        elif not isinstance(row.get("file_name"), str) or not row["file_name"]:
            wrong.append(f"{file}, line {line}: no file_name")
        else:
            rows.append({**row, "": line})
    if not rows and not wrong:
        wrong.append(f"{file} has no rows")
    return rows, wrong


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise DataError([f"metadata.csv, line {reader.line_num}: {error}"]) from None


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def _found(data: Path) -> tuple[dict[str, Labelled], list[str]]:
    """The images of each part with their labels, and what is wrong."""
    if not data.is_dir():
        raise FileNotFoundError(f"{data} is not a folder: give the folder that holds the labelled images")
    found: dict[str, Labelled] = {"train": [], "val": [], "test": []}
    folders = parts(data)
    wrong: list[str] = []
    if (file := metadata_file(data)) is not None:
        labelled, wrong = _by_metadata(file)
        for path, label in labelled:
            first = Path(path).relative_to(data).parts[0].lower() if Path(path).is_relative_to(data) else ""
            found[SPLITS.get(first, "train")].append((path, label))
        return found, wrong
    for part, folder in (folders or {"train": data}).items():
        if (file := metadata_file(folder)) is not None:
            found[part], more = _by_metadata(file)
            wrong += more
            continue
        for place in sorted(folder.iterdir()):
            if not place.is_dir() or place.name.startswith("."):
                continue
            images = images_in(place)
            found[part] += [(path, place.name) for path in images]
            if not images:
                wrong.append(f"{place} is a label without images")
    return found, wrong


def _by_metadata(file: Path) -> tuple[Labelled, list[str]]:
    rows, wrong = metadata_rows(file)
    labelled = []
    for row in rows:
        where = f"{file}, line {row['']}"
        path, label = file.parent / row["file_name"], row.get("label")
        if label is None or isinstance(label, (dict, list, float)) or str(label).strip() == "":
            wrong.append(f"{where}: {row['file_name']} has no label; wanted a column called label")
        elif not path.is_file():
            wrong.append(f"{where}: {row['file_name']} does not exist")
        else:
            labelled.append((str(path), str(label).strip()))
    twice = [path for path, count in Counter(path for path, _ in labelled).items() if count > 1]
    return labelled, wrong + [f"{file}: {path} is listed more than once" for path in twice]


def _sorted(labels: set[str]) -> list[str]:
    """Labels by name, by number where all are whole numbers."""
    if all(label.isascii() and label.isdigit() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _unknown(found: dict[str, Labelled], classes: Sequence[str]) -> list[str]:
    """What is wrong with labels that are not among the classes."""
    known = set(classes)
    counts = Counter(label for labelled in found.values() for _, label in labelled if label not in known)
    return [
        f"the label {label} ({one_image(count)}) is not in the list {listed(classes)}"
        for label, count in sorted(counts.items())
    ]


def _too_few(train: Labelled, classes: Sequence[str], hashes: dict[str, bytes], data: Path) -> list[str]:
    """What is missing for training: two labels, and of each two images that are not copies of each other."""
    if len(classes) < 2:
        one = f"only one label, {classes[0]}" if classes else "no labelled images"
        return [f"{data} has {one}: a classifier needs at least two labels"]
    contents: dict[str, set[bytes]] = {label: set() for label in classes}
    for path, label in train:
        contents[label].add(
            hashes.get(path, path.encode(errors="surrogateescape"))
        )  # unreadable ones are reported apart
    counts = Counter(label for _, label in train)
    return [
        f"the label {label} has one image{f' in {counts[label]} copies' if counts[label] > 1 else ''}: "
        "it needs at least two"
        for label in classes
        if len(contents[label]) == 1
    ]


def _contradictions(samples: Sequence[Sample], classes: Sequence[str]) -> list[str]:
    """A note where the same image has two labels."""
    first: dict[bytes, Sample] = {}
    lines = []
    for sample in samples:
        other = first.setdefault(sample.sha256, sample)
        if other.target != sample.target:
            labels = f"{classes[other.target]} and {classes[sample.target]}"
            lines.append(f"{other.path} and {sample.path} are the same image, called {labels}")
    return [f"{one_image(len(lines))} with two labels: {listed(lines, most=3)}"] if lines else []
