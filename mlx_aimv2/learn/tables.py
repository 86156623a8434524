"""Reads tables of images: `metadata.csv` and `metadata.jsonl` as Hugging Face has them, and those of other people.

FILE -> rows, each with its image under `file_name` and its line under "", and what is wrong with the others

What means one thing alone is taken: other separators and names of columns, letter case, byte order marks. What may mean
two things is refused with what to change.
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
"""Names of the files by which Hugging Face's `imagefolder` knows its images."""

TABLES = (".csv", ".tsv", ".jsonl")
"""Endings of tables, which may have any name where they are the only one."""

SEPARATORS = (",", ";", "\t", "|")

Names: TypeAlias = "tuple[str, ...]"
"""What a column may be called, without case and underscores: the first line of which there is one decides."""

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
"""Bytes of a table in which its first rows lie."""


def column(names: Iterable[str], meant: Names) -> list[str]:
    """The columns that are called what is meant: one, none, or several where it is not clear which."""
    plain = {name: re.sub(r"[\W_]", "", name) for name in names}
    found = ([name for name in plain if plain[name] in alike.split()] for alike in meant)
    return next((columns for columns in found if columns), [])


def one_column(names: Iterable[str], meant: Names, called: str, file: Path, scan: Scan) -> str:
    """The column that is meant, with a note if it is not `called` so; "" and a fault where that is not clear."""
    names = [name for name in dict.fromkeys(names) if name]
    found = column(names, meant)
    if len(found) != 1:
        count = f"{len(found)} columns that may be" if found else "no column"
        scan.faults.append(f"{file} has {count} {called} ({listed(found or names)}): call one of them {called}")
    elif found[0] != called:
        scan.note(str(file), f"has the column {found[0]} as its {called}")
    return found[0] if len(found) == 1 else ""


def columns_of(file: Path) -> list[str]:
    """The names of a table's columns in lower case, from its first rows; none where these cannot be read."""
    try:
        text, fault = decoded(read_start(file, max_bytes=START), "ignore")
    except (ValueError, OSError):
        return []
    if fault or file.suffix.lower() != ".jsonl":
        return [] if fault else _header(text)[0]
    return list(dict.fromkeys(name for _, row in islice(_json_rows(text), 5) if isinstance(row, dict) for name in row))


def metadata_file(folder: Path) -> Path | None:
    """The metadata file right in a folder, if there is one. DataError if there are two."""
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError([f"{folder} has {files[0].name} and {files[1].name}: keep one of them"])
    return files[0] if files else None


def tables(folder: Path, *, of: Names | None) -> dict[str, Path]:
    """The tables right in a folder that name images and have a column `of` something, by the part that they are for.

    That is the metadata file, be it readable or not, or else those of other names; the part is "" where a name says
    none. Raises DataError where two are for the same part.
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

    Names of columns are in lower case. What was left out or taken for something is noted in `scan`, where what is wrong
    with the others becomes a fault.
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
        yield 1, f"the column {listed(twice)} is there more than once: keep one"
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
    """A cell's text, or the list or object that it holds as JSON or as Python shows it, as pandas writes both."""
    found: Any = None
    if cell[:1] in ("[", "{"):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = ast.literal_eval(cell)
        with suppress(ValueError):
            found = parse(cell, "a cell")
    return found if isinstance(found, (list, dict)) else cell


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines, as U+2028, may stand in a string
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
    """The file that a row names: with either slash, in either Unicode form, and without its suffix if it is the one."""
    slashed = name.replace("\\", "/")
    forms = dict.fromkeys([name, slashed, normalize("NFC", slashed), normalize("NFD", slashed)])
    for suffixes in ([""], [] if has_suffix(name) else SUFFIXES):
        for form in forms:
            there = [path for suffix in suffixes if is_file(path := folder / f"{form}{suffix}")]
            if len(there) == 1:
                return there[0]
    return None


def rows_with_images(file: Path, scan: Scan) -> list[tuple[str, dict[str, Any], Path | None]]:
    """Where each row of a table stands, the row, and its image if it is there; what is wrong is told as above.

    Images lie beside the table, or else in the one folder beside it that holds one of the first. Those that no row
    names are noted in `scan`.
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
    (".tfrecord", ".tfrecords", ".rec", ".mdb"): "holds records, which are not read: write its images as files",
    (".npz", ".npy", ".mat", ".h5", ".hdf5", ".pkl", ".pt"): "holds arrays, which are not read: write them as images",
    (".tar",): "is an archive, of which only pretrain and lit read the images: unpack it",
    (".zip", ".tgz", ".gz", ".7z", ".rar"): "is an archive: unpack it",
    (".xlsx", ".xls", ".ods"): "is a spreadsheet: save it as metadata.csv",
    (".yaml", ".yml", ".xml", ".json"): "is in no form that is read: programs export others, as COCO or CSV",
}
"""Endings of what may describe images, or hold them, and is not read, and what to do about it."""


def not_read(data: Path, word: str = "label", of: Names = LABEL) -> list[str]:
    """What lies in DATA or its folders that may describe it and is not read, a line for each reason."""
    scan = Scan()
    for file in sorted(file for file in [*data.glob("[!.]*"), *data.glob("[!.]*/[!.]*")] if file.is_file()):
        ending = file.suffix.partition("-")[0].lower()
        reason = next((reason for endings, reason in FOREIGN.items() if ending in endings), None)
        if ending in TABLES:
            names = columns_of(file)
            missing = [name for name, meant in (("file_name", IMAGE), (word, of)) if not column(names, meant)]
            wanted = " and no ".join(f"column {name}" for name in missing)
            one_hot = (
                "; several labels an image, a column for each, are for --task multilabel"
                if missing == ["label"] and len(names) > 2
                else ""
            )
            reason = f"has no {wanted} among its columns ({listed(names)}){one_hot}" if missing else None
            if of is LABEL and (boxes := column(names, BOX)):
                reason = f"has boxes ({listed(boxes)}), which are read in other forms: export COCO, VOC's XML or YOLO"
        if ending == ".txt" and of is CAPTION:
            reason = "is no table or shard: a table is called .csv, and tar --sort=name -cf packs images and texts"
        if reason:
            scan.note(str(file), reason)
    return scan.notes
