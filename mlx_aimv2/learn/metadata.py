"""`metadata.csv` and `metadata.jsonl`, by which Hugging Face's `imagefolder` knows its images, row by row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_aimv2.files import read_text
from mlx_aimv2.learn.samples import DataError

METADATA = ("metadata.csv", "metadata.jsonl")
"""Names of the files by which Hugging Face's `imagefolder` knows its images."""

MAX_BYTES = 1 << 32
"""Of a list of labels or captions: COCO's own annotations have 450 MB."""


def metadata_file(folder: Path) -> Path | None:
    """The metadata file right in a folder, if there is one. DataError if there are two."""
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError([f"{folder} has {files[0].name} and {files[1].name}: keep one of them"])
    return files[0] if files else None


def metadata_rows(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a metadata file, each with `file_name` and its line under "", and what is wrong with the others."""
    try:
        text = read_text(file, max_bytes=MAX_BYTES)
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
                yield number, json.loads(line)
            except ValueError:
                yield number, None
