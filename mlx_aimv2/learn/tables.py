"""Reads tables of images: Hugging Face's `metadata.csv` and `metadata.jsonl`, and other people's.

FILE -> rows, each with its image under `file_name` and its line under "", and what is wrong with the others

Anything unambiguous is accepted: other separators and column names, letter case, byte order marks. Anything ambiguous
is refused, saying what to change.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias
from unicodedata import normalize

from mlx_aimv2.files import is_file, read_bytes, read_start
from mlx_aimv2.images.find import SUFFIXES, Scan, has_suffix
from mlx_aimv2.learn.samples import MAX_BYTES, DataError, listed, part_of
from mlx_aimv2.untrusted_json import parse

METADATA = ("metadata.csv", "metadata.jsonl")
"""Names of the files that list images for Hugging Face's `imagefolder`."""

TABLES = (".csv", ".tsv", ".jsonl")
"""Suffixes of tables, which may have any name if there is only one."""

SEPARATORS = (",", ";", "\t", "|")

Names: TypeAlias = "tuple[str, ...]"
"""Names of a column, without case and underscores: the first line with a match decides."""

IMAGE: Names = (
    "filename",
    "file filepath filepaths path image imagename imagepath imagefile img",
    "imageid id",
)
LABEL: Names = (
    "label",
    "labels labelname class classname category target tag choice species breed diagnosis",
    "classid classindex labelid categoryid",
)
CAPTION: Names = ("text", "caption captions texts", "description prompt alttext title comment")
CAPTIONS = " ".join(CAPTION).split()
BOX: Names = ("xmin bbox bboxes boxes regionshapeattributes",)
PART: Names = ("split part subset partition dataset",)

START = 1 << 16
"""Bytes at the start of a table that contain its first rows."""


def column(names: Iterable[str], meant: Names) -> list[str]:
    """The columns with a matching name: one, none, or several if it is ambiguous."""
    plain = {name: re.sub(r"[\W_]", "", name) for name in names}
    found = ([name for name in plain if plain[name] in alike.split()] for alike in meant)
    return next((columns for columns in found if columns), [])


def one_column(names: Iterable[str], meant: Names, called: str, file: Path, scan: Scan) -> str:
    """The matching column, with a note if its name is not `called`; "" and a fault if that is ambiguous."""
    names = [name for name in dict.fromkeys(names) if name]
    found = column(names, meant)
    if len(found) != 1:
        count = f"{len(found)} columns that may be" if found else "no column"
        scan.faults.append(f"{file} has {count} {called} ({listed(found or names)}): call one of them {called}")
    elif found[0] != called:
        scan.note(str(file), f"has the column {found[0]} as its {called}")
    return found[0] if len(found) == 1 else ""


def columns_of(file: Path) -> list[str]:
    """The names of a table's columns in lower case, from its first rows; none if they cannot be read."""
    try:
        text, fault = decoded(read_start(file, max_bytes=START), "ignore")
    except (ValueError, OSError):
        return []
    if fault or file.suffix.lower() != ".jsonl":
        return [] if fault else _header(text)[0]
    return list(dict.fromkeys(name for _, row in islice(_json_rows(text), 5) if isinstance(row, dict) for name in row))


def metadata_file(folder: Path) -> Path | None:
    """The metadata file directly in a folder, if there is one. DataError if there are two."""
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError([f"{folder} has {files[0].name} and {files[1].name}: keep one of them"])
    return files[0] if files else None


def tables(folder: Path, *, of: Names | None) -> dict[str, Path]:
    """The tables directly in a folder that name images and have a column `of` something, by their part.

    That is the metadata file, readable or not, or else those with other names; the part is "" if the name has none.
    Raises DataError if two are for the same part.
    """
    given = metadata_file(folder)
    if given and (of is None or not (names := columns_of(given)) or column(names, of)):
        return {"": given}
    found: dict[str, Path] = {}
    for file in sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in TABLES):
        names = columns_of(file)
        if not column(names, IMAGE) or not (of is None or column(names, of)):
            continue
        if of is LABEL and column(names, BOX):
            continue
        part = part_of(file.stem) or ""
        if part in found:
            raise DataError([f"{found[part]} and {file} both list images: keep one, or call it {METADATA[0]}"])
        found[part] = file
    return found


def metadata_rows(file: Path, scan: Scan) -> list[dict[str, Any]]:
    """The rows of a table, each with `file_name` and its line under "".

    Column names are in lower case. What was left out or interpreted is noted in `scan`, where errors in the other rows
    become faults.
    """
    faults = scan.faults
    text, fault = decoded(read_bytes(file, max_bytes=MAX_BYTES))
    if fault:
        faults.append(f"{file}, {fault}")
        return []
    rows: list[dict[str, Any]] = []
    before = len(faults)
    for line, row in _json_rows(text) if file.suffix.lower() == ".jsonl" else _csv_rows(text):
        if isinstance(row, str):
            faults.append(f"{file}, line {line}: {row}")
        elif any(cell not in ("", None) for cell in row.values()):
            rows.append({**row, "": line})
        else:
            scan.note(f"{file}, line {line},", "is an empty row: left out")
    if not rows:
        faults += [] if len(faults) > before else [f"{file} has no rows"]
        return []
    if not (images := one_column((name for row in rows for name in row), IMAGE, "file_name", file, scan)):
        return []
    for row in rows:
        row["file_name"] = row.get(images)
        if not isinstance(row["file_name"], str) or not row["file_name"]:
            faults.append(f"{file}, line {row['']}: no file_name")
    return [row for row in rows if isinstance(row["file_name"], str) and row["file_name"]]


def decoded(data: bytes, errors: str = "strict") -> tuple[str, str]:
    """A table's text, or what is wrong with it."""
    coding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(coding, errors)
    except UnicodeDecodeError as error:
        before, after = data[: error.start].split(b"\n"), data[error.start :].split(b"\n")
        guess = (before[-1] + after[0]).decode("cp1252", "replace").strip()
        return "", f"line {len(before)}, is not UTF-8 (cp1252, perhaps: {guess:.60}): save it as UTF-8"
    return text, "which holds NULs, is no text in UTF-8, nor in UTF-16 with its mark" if "\0" in text else ""


def _header(text: str) -> tuple[list[str], str]:
    """The names of the columns, and what separates them."""
    first = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    names = {separator: [cell.strip(' "').lower() for cell in first.split(separator)] for separator in SEPARATORS}
    separator = max(names, key=lambda one: (bool(column(names[one], IMAGE)), len(names[one])))
    return names[separator], separator


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    names, separator = _header(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        yield 1, f"the column {listed(twice)} occurs more than once: keep one"
        return
    try:
        for cells in islice(filter(None, reader), 1, None):
            own = [cell.strip() for cell in cells] + [""] * len(names)
            if any(own[len(names) :]):
                yield reader.line_num, f"{len(cells)} cells, but {len(names)} columns: quote a text with {separator!r}"
            else:
                yield reader.line_num, {name: _value(cell) for name, cell in zip(names, own, strict=False) if name}
    except csv.Error as error:
        yield reader.line_num, str(error)


def _value(cell: str) -> Any:
    """A cell's text, or its list or object in JSON or Python notation, since pandas writes both."""
    found: Any = None
    if cell[:1] in ("[", "{"):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = ast.literal_eval(cell)
        with suppress(ValueError):
            found = parse(cell, "a cell")
    return found if isinstance(found, (list, dict)) else cell


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), 1):  # other line ends, such as U+2028, may occur in a string
        if not line.strip():
            continue
        try:
            row = parse(line, "a line", but=CAPTIONS)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield number, {name.strip().lower(): value for name, value in row.items()}
        else:
            yield number, 'wanted {"file_name": …}, got no JSON object'


def image_of(folder: Path, name: str) -> Path | None:
    """The file that a row names: with either slash, in either Unicode form, and without its suffix if unambiguous."""
    slashed = name.replace("\\", "/")
    forms = dict.fromkeys([name, slashed, normalize("NFC", slashed), normalize("NFD", slashed)])
    for suffixes in ([""], [] if has_suffix(name) else SUFFIXES):
        for form in forms:
            there = [path for suffix in suffixes if is_file(path := folder / f"{form}{suffix}")]
            if len(there) == 1:
                return there[0]
    return None


def rows_with_images(file: Path, scan: Scan) -> list[tuple[str, dict[str, Any], Path | None]]:
    """Each row of a table with its location and its image, if it exists; errors are reported as above.

    Images are next to the table, or else in the one folder next to it that contains one of the first. Images without a
    row are noted in `scan`.
    """
    rows = metadata_rows(file, scan)
    places = [file.parent, *scan.folders(file.parent)]
    holding = [place for place in places if any(image_of(place, row["file_name"]) for row in rows[:5])]
    folder = holding[0] if len(holding) == 1 else file.parent
    if folder != file.parent:
        scan.note(str(file), f"has its images in {folder.name}/")
    found = [
        (f"{file}, line {row['']}: {row['file_name']:.80}", row, image_of(folder, row["file_name"])) for row in rows
    ]
    scan.unlisted(folder, file, [str(image) for _, _, image in found if image])
    return found


FOREIGN = {
    (".parquet", ".arrow", ".feather"): "is a table with images in it, which is not read: write them as files first",
    (".tfrecord", ".tfrecords", ".rec", ".mdb"): "contains records, which are not read: write its images as files",
    (
        ".npz",
        ".npy",
        ".mat",
        ".h5",
        ".hdf5",
        ".pkl",
        ".pt",
    ): "has arrays, which are not read: write them as images",
    (".tar",): "is an archive, whose images only pretrain and lit can read: unpack it",
    (".zip", ".tgz", ".gz", ".7z", ".rar"): "is an archive: unpack it",
    (".xlsx", ".xls", ".ods"): "is a spreadsheet: save it as metadata.csv",
    (".yaml", ".yml", ".xml", ".json"): "has an unsupported format: export another one, such as COCO or CSV",
}
"""Suffixes of files that may describe or contain images but are not read -> what to do."""


def not_read(data: Path, word: str = "label", of: Names = LABEL) -> list[str]:
    """Files in DATA or its folders that may describe it but are not read, a line for each reason."""
    scan = Scan()
    for file in sorted(file for file in [*data.glob("[!.]*"), *data.glob("[!.]*/[!.]*")] if file.is_file()):
        ending = file.suffix.partition("-")[0].lower()
        reason = next((reason for endings, reason in FOREIGN.items() if ending in endings), None)
        if ending in TABLES:
            names = columns_of(file)
            missing = [name for name, meant in (("file_name", IMAGE), (word, of)) if not column(names, meant)]
            wanted = " and no ".join(f"column {name}" for name in missing)
            one_hot = (
                "; several labels per image, a column for each, need --task multilabel"
                if missing == ["label"] and len(names) > 2
                else ""
            )
            reason = f"has no {wanted} among its columns ({listed(names)}){one_hot}" if missing else None
            if of is LABEL and (boxes := column(names, BOX)):
                reason = f"has boxes ({listed(boxes)}), which are read in other formats: export COCO, VOC's XML or YOLO"
        if ending == ".txt" and of is CAPTION:
            reason = "is not a table or shard: name a table .csv, and pack images and texts with tar --sort=name -cf"
        if reason:
            scan.note(str(file), reason)
    return scan.notes
