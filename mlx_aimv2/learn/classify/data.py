"""Images with a label each, from folders named after labels, or from tables such as `metadata.csv` beside them.

The target of a sample is the number of its class. Of tables with several labels an image, or with numbers, the rows
are read here too; `multilabel` and `regression` say what a row holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlx_aimv2.images import to_rgb
from mlx_aimv2.images.find import Scan
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import samples, tables
from mlx_aimv2.learn.samples import Format, Found, Labels, Recognised, Sample, listed, one_image, part_of, same_form
from mlx_aimv2.learn.tables import LABEL, PART, TABLES, column, columns_of, metadata_file
from mlx_aimv2.train.augment import Augmentation
from mlx_aimv2.train.batches import Arrays

NUMBER, WHOLE = re.compile(r"-?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE), re.compile(r"(-?\d+)\.0*$")
"""A number as text, and a whole one as pandas writes it where a column has gaps."""

SEVERAL = "has no single label: --task multilabel takes several per image"

Row: TypeAlias = "dict[str, Any]"
Marks: TypeAlias = "Callable[[Path, Sequence[Row], Scan], Sequence[tuple[Any, str]]]"
"""What each row of a table says of its image, None where nothing, and what is wrong with it, "" where nothing is."""


def recognise(data: Path) -> Recognised | None:
    """What in DATA gives each image a label; None where nothing does."""
    scan = Scan()
    sources = sources_of(data, scan)
    if files := [file.name for _, tables in sources.values() for file in tables]:
        return Recognised(f"labels in {listed(dict.fromkeys(files))}", scan, sources)
    count = len({same_form(place.name) for folder, _ in sources.values() for place in _label_folders(folder, scan)})
    return Recognised(f"a folder for each of {one_image(count, 'label')}", scan, sources) if count else None


def sources_of(data: Path, scan: Scan, of: tables.Names | None = LABEL) -> dict[str, tuple[Path, list[Path]]]:
    """Of each part its folder, and its tables with labels; where there are none, folders in it name the labels.

    Right in DATA folders win over a table that is not called metadata, as it may be about something else. Without `of`
    tables may have any columns, and folders name nothing.
    """
    here = tables.tables(data, of=of)
    if len(here) > 1 and "" in here:  # as Kaggle's sample_submission.csv
        scan.note(str(here.pop("")), "belongs to no part, unlike others: not read")
    by_table = {part: (data, [file]) for part, file in here.items()}
    if metadata_file(data) in here.values():
        return by_table

    def inside(folder: Path) -> list[Path]:
        return _label_folders(folder, scan) if of else []

    parts = samples.parts_of(data, scan, lambda folder: bool(_tables(folder, scan, of) or inside(folder)))
    found = {
        part: (folder, [] if here and folder == data else _tables(folder, scan, of)) for part, folder in parts.items()
    }
    names = {place.name for folder, files in found.values() if not files for place in inside(folder)}
    is_by_folder = len(names) > 1 and not all(map(part_of, names))
    return found if is_by_folder or not here else by_table


def _label_folders(folder: Path, scan: Scan) -> list[Path]:
    return [place for place in scan.folders(folder) if scan.images(place)]


def _tables(folder: Path, scan: Scan, of: tables.Names | None) -> list[Path]:
    """The tables with labels right in a folder, else the metadata files in its folders."""
    inside = [metadata_file(place) for place in scan.folders(folder)]
    alike = [file for file in inside if file and (of is None or column(columns_of(file), of))]
    return [*tables.tables(folder, of=of).values()] or alike


def _find(data: Path, sources: Mapping[str, tuple[Path, list[Path]]], scan: Scan) -> Found:
    found = Found({})
    for part, (folder, files) in sources.items():
        if files:
            found.parts |= by_part(by_tables(files, scan), part, data, scan)
            others = {*_label_folders(folder, scan)} - {file.parent for file in files}
            if files[0].parent != folder and others:
                scan.note(sorted(map(str, others)), "has no metadata with labels: skipped")
            continue
        places = scan.folders(folder)
        if not part and places and all(part_of(place.name) for place in places):
            scan.faults += [f"{place} is a part of the data without a folder for each label" for place in places]
            scan.faults += tables.not_read(data)
            places = []
        found.parts[part] = [(path, same_form(place.name)) for place in places for path in scan.images(place)]
        scan.faults += [f"{place} is a label without images" for place in places if not scan.images(place)]
        below = [{inner.name for inner in scan.folders(place)} for place in places if not scan.loose(place)]
        if len(below) == len(places) > 1 and (alike := sorted(set.intersection(*below))):
            inner = f"has no images but folders that the others have too, {listed(alike, shown=3)}"
            scan.note(list(map(str, places)), f"{inner}: its own name is taken for the label")
        if loose := scan.loose(folder):
            scan.note(loose, "is not in a label's folder: skipped")
    if not any(files for _, files in sources.values()):
        _compare(data, dict(pair for pairs in found.parts.values() for pair in pairs), scan)
    return found


def _compare(data: Path, by_folder: Mapping[str, str], scan: Scan) -> None:
    """Notes the tables in DATA that are not read, as folders name the labels; a fault where they differ."""
    for file in sorted(file for file in data.glob("[!.]*") if file.suffix.lower() in TABLES):
        scan.note(str(file), "is not read, because folders name the labels")
        if any(by_folder.get(path, label) != label for path, (label, _) in by_tables([file], Scan()).items()):
            scan.faults.append(f"{file} has other labels: name it metadata.csv if they are right, else move it away")


def by_tables(files: Sequence[Path], scan: Scan, marks: Marks | None = None) -> dict[str, tuple[Any, str]]:
    """Of the path of each image in the rows its mark and its part; what is wrong is added to `scan.faults`."""
    found: dict[str, tuple[Any, str]] = {}
    for file in files:
        rows = tables.rows_with_images(file, scan)
        names = dict.fromkeys(name for _, row, _ in rows for name in row)
        own = (marks or _single)(file, [row for _, row, _ in rows], scan) if rows else []
        for (where, row, image), (mark, fault) in zip(rows, own, strict=False):
            path = str(image)
            if fault:
                scan.faults.append(f"{where} {fault}")
            elif mark is None:
                scan.note(where, "has no label: left out")
            elif image is None:
                scan.faults.append(f"{where} does not exist")
            elif found.get(path, (mark,))[0] != mark:
                scan.faults.append(f"{where} has another label in another row: keep one of them")
            elif path in found:
                scan.note(where, "is a repetition, with the same label: left out")
            else:
                found[path] = mark, part_of(" ".join(str(row.get(name)) for name in column(names, PART))) or ""
    return found


def _single(file: Path, rows: Sequence[Row], scan: Scan) -> list[tuple[Any, str]]:
    """One label in each row, as a text; none, and a fault, where it is not clear which column has them."""
    if not (labels := tables.one_column((name for row in rows for name in row), LABEL, "label", file, scan)):
        return []
    values = [row.get(labels) for row in rows]
    texts = _texts(values)
    if all(NUMBER.fullmatch(text) for text in texts if text):
        texts = [WHOLE.sub(r"\1", text) for text in texts]
        if odd := [text for text in texts if text and not text.lstrip("-").isdigit()]:
            fault = f"{file} has numbers as labels, {odd[0]} for one: a label is a word or a whole number"
            scan.faults.append(f"{fault}; --task regression learns numbers")
            return []
    several = [isinstance(value, dict) or (isinstance(value, list) and len(value) > 1) for value in values]
    return [(text or None, SEVERAL if own else "") for text, own in zip(texts, several, strict=True)]


def _texts(values: Sequence[Any]) -> list[str]:
    """Labels as text, "" where there is none: nothing, an empty list, or what is not a number."""
    single = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    return ["" if value in (None, []) or value != value else same_form(str(value)) for value in single]


def by_part(rows: Mapping[str, tuple[Any, str]], part: str, data: Path, scan: Scan) -> dict[str, list[tuple[str, Any]]]:
    """Rows of a `part`, or by the one that they say or a folder in their path, if all have one or several are named."""
    pairs = [(path, label) for path, (label, _) in rows.items()]
    found: dict[str, list[tuple[str, Any]]] = {} if rows else {"": []}
    for path, (label, own) in rows.items():
        inside = Path(path).relative_to(data).parent.parts if Path(path).is_relative_to(data) else ()
        found.setdefault(own or next(filter(None, map(part_of, inside)), ""), []).append((path, label))
    if part or ("" in found and len(found) == 2):  # a class that is called like a part
        return {part: pairs}
    if len(found) > 2 and (rest := found.pop("", [])):
        scan.note([path for path, _ in rest], "is in no part of the labelled data (train, val, test): skipped")
    return found


def value_columns(rows: Sequence[Row]) -> list[str]:
    """The columns of a table that say neither which image nor which part a row is for."""
    names = dict.fromkeys(name for row in rows for name in row if name)
    others = {*column(names, tables.IMAGE), *column(names, PART), "file_name"}
    return [name for name in names if name not in others]


def find_in_tables(
    data: Path, sources: Mapping[str, tuple[Path, list[Path]]], scan: Scan, marks: Marks, wanted: str
) -> Found:
    """The images of tables by part, each with what `marks` makes of its row; `wanted` says what a table should hold."""
    found = Found({})
    for part, (folder, files) in sources.items():
        if not files:
            scan.faults.append(f"{folder} has no table of images: make a {wanted}")
        found.parts |= by_part(by_tables(files, scan, marks), part, data, scan)
    return found


def _labels(marked: Sequence[tuple[str, str, samples.Size]], scan: Scan) -> list[Labels]:
    return [Labels((label,), None) for _, label, _ in marked]


def _target(labels: Labels, numbers: Mapping[str, int]) -> int:
    return numbers[labels.names[0]]


read = partial(samples.read, form=Format(sources_of, _find, _labels, _target, others=tables.not_read))


def example(
    sample: Sample, processor: Aimv2Processor, *, rng: np.random.Generator | None, flip: bool = False
) -> Arrays:
    """`pixels` (H, W, 3) and the class of a sample, its image changed at random by `rng`."""
    image: Any = sample.path
    if rng is not None:
        # Half of the image at least, more than for pre-training: small objects must not be cut off.
        changed = Augmentation(min_area=0.5, flip=flip, operations=2)
        image = changed(to_rgb(sample.path), processor.canvas, rng)
    return {"pixels": processor.pixels(image), **targets(sample, processor)}


def targets(sample: Sample, processor: Aimv2Processor) -> Arrays:
    """The number of the class, (); a 0 or 1 for each, (classes,); or the number that is learned, (1,)."""
    label = np.asarray(sample.target)
    return {"label": label.astype(np.float32 if label.dtype.kind == "f" else np.int32)}
