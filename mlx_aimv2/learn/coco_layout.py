"""Finds COCO JSON files and the folders of their images: COCO's own layout or Roboflow's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_aimv2.learn.data import SPLITS, DataError

ROBOFLOW = "_annotations.coco.json"

FOLDER = "annotations"
"""Folder of the JSON files in COCO's own layout."""


def files_by_part(data: Path) -> dict[str, tuple[Path, list[Path]]]:
    """JSON files by part, each with the folders in which its images may lie; the part is empty where DATA says none."""
    if not data.is_dir():
        return {}
    if (data / ROBOFLOW).is_file():
        return {"": (data / ROBOFLOW, [data])}
    found: dict[str, tuple[Path, list[Path]]] = {}
    for folder in sorted(data.iterdir()):
        if (part := SPLITS.get(folder.name.lower())) and (folder / ROBOFLOW).is_file():
            found[part] = (folder / ROBOFLOW, [folder])
    return found or _plain_files(data)


def _plain_files(data: Path) -> dict[str, tuple[Path, list[Path]]]:
    """COCO's own layout: `annotations/instances_train2017.json` beside `train2017/` or `images/train2017/`."""
    files = sorted(file for file in (data / FOLDER).glob("*.json") if not file.name.startswith("."))
    files = [file for file in files if file.stem.startswith("instances")] or files
    found: dict[str, tuple[Path, list[Path]]] = {}
    for file in files:
        words = [word for word in re.split(r"[^A-Za-z0-9]+", file.stem) if word]
        word = next((word for word in words if word.lower().rstrip("0123456789") in SPLITS), "")
        part = SPLITS.get(word.lower().rstrip("0123456789"), "")
        if part in found:
            raise DataError([f"{found[part][0]} and {file} both mean {part or 'all images'}: keep one"])
        names = dict.fromkeys([word, part, ""])
        found[part] = (file, [place / name for name in names for place in (data, data / "images")])
    if "" in found and len(found) > 1:
        raise DataError([f"{found[''][0]} names no part (train, val, test), but other files do: rename it"])
    return found


def folder_of(images: list[Any], folders: Sequence[Path]) -> Path:
    """The first folder that holds one of the first images, or the first that there is."""
    for folder in folders:
        if any((folder / str(entry["file_name"])).is_file() for entry in images[:5]):
            return folder
    return next((folder for folder in folders if folder.is_dir()), folders[0])
