"""Labelled images: samples, the checks that find everything wrong before training starts, and the split into parts."""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_aimv2.embed.cache import KnownFiles
from mlx_aimv2.files import read_image_file
from mlx_aimv2.find_images import has_suffix
from mlx_aimv2.images import open_image, to_rgb

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Name of a folder -> the part that it holds."""

HELD_OUT = 0.15
"""Share of the images that become `val`, and as many `test`, where DATA does not say."""

MAX_LINES = 20
"""Lines of what is wrong that a message shows; the rest is counted."""


class DataError(ValueError):
    """Everything that is wrong with the data, a line each; the message holds the first of them."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        more = f"; and {len(lines) - MAX_LINES:,} more" if len(lines) > MAX_LINES else ""
        counted = f"{len(lines):,} things are wrong with the data: " if len(lines) > 1 else ""
        super().__init__(f"{counted}{'; '.join(lines[:MAX_LINES])}{more}")


@dataclass(frozen=True)
class Sample:
    """One image with what is known of it: `target` is the task's own, for `classify` the number of the class."""

    path: str
    sha256: bytes
    target: Any


@dataclass(frozen=True)
class Dataset:
    """Checked samples of each part (`train`, `val`, `test`; the last two may be empty), and notes for the user."""

    task: str
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    notes: tuple[str, ...] = ()


def check_images(paths: Sequence[str]) -> tuple[dict[str, bytes], list[str]]:
    """Reads, hashes and decodes every image: `paths -> ({path: SHA-256}, what is wrong with which)`.

    A file that was good before and has not been changed since is not read again.
    """
    known_files = KnownFiles()
    hashes = known_files.look_up(paths)
    others = [path for path in dict.fromkeys(paths) if path not in hashes]
    found: dict[str, bytes] = {}
    wrong: list[str] = []
    with ThreadPoolExecutor(os.cpu_count() or 1, "check") as pool:
        for path, result in zip(others, pool.map(_checked, others), strict=True):
            if isinstance(result, bytes):
                found[path] = result
            else:
                wrong.append(result)
    known_files.remember(found.items())
    return hashes | found, wrong


def _checked(path: str) -> bytes | str:
    """The SHA-256 of an image that can be decoded, or what is wrong with it."""
    try:
        _, data = read_image_file(path)
        stream = io.BytesIO(data)
        stream.name = path  # what errors call it
        if to_rgb(stream).size == (1, 1):
            return f"{path} is a single pixel: nothing to see"
        return hashlib.sha256(data).digest()
    except OSError as error:
        return str(error) if path in str(error) else f"{path} {error.strerror or error}"
    except Exception as error:  # decoders raise whatever they meet
        return " ".join(str(error).split()) or f"{path} cannot be read"


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of an image as it is seen upright; raises ValueError or OSError with one line."""
    width, height = open_image(path).size  # of its header: nothing is decoded
    return height, width


def parts(data: Path) -> dict[str, Path]:
    """The folders of DATA that hold its parts: `{"train": DATA/train, …}`, empty if there is none.

    Raises DataError where two folders mean the same part or `train` is missing.
    """
    found: dict[str, Path] = {}
    for folder in sorted(data.iterdir()):
        part = SPLITS.get(folder.name.lower())
        if part is None or not folder.is_dir():
            continue
        if part in found:
            raise DataError([f"{found[part]} and {folder} both mean {part}: keep one of them"])
        found[part] = folder
    if found and "train" not in found:
        raise DataError([f"{data} has {' and '.join(found)} but no train folder: add it, or give one folder"])
    return found


def images_in(folder: Path) -> list[str]:
    """The image files right in a folder and below it, hidden names left out, sorted."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [str(Path(place) / name) for name in files if has_suffix(name) and not name.startswith(".")]
    return sorted(found)


def split(samples: Sequence[Sample], strata: Sequence[int]) -> dict[str, list[Sample]]:
    """Stratified parts, 70 : 15 : 15, by content hash: `samples and the class of each -> {"train": …}`.

    Images of equal content stay together, and adding an image moves hardly any other one. Of a class with two
    different images one is for training and one for `val`; from three on each part has at least one.
    """
    groups: dict[int, dict[bytes, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    owner: dict[bytes, int] = {}
    for sample, stratum in zip(samples, strata, strict=True):
        groups[owner.setdefault(sample.sha256, stratum)][sample.sha256].append(sample)
    result: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for stratum in sorted(groups):
        order = sorted(groups[stratum])
        held = max(1, round(HELD_OUT * len(order))) if len(order) > 1 else 0
        for_test = held if len(order) > 2 else 0
        for place, key in enumerate(order):
            part = "val" if place < held else "test" if place < held + for_test else "train"
            result[part] += groups[stratum][key]
    return {part: sorted(found, key=lambda sample: sample.path) for part, found in result.items()}


def without_val(train: Sequence[Sample], strata: Sequence[int]) -> tuple[list[Sample], list[Sample]]:
    """A `val` part taken from `train` where DATA has none: `-> (train, val)`, as `split` does it."""
    found = split(train, strata)
    return sorted([*found["train"], *found["test"]], key=lambda sample: sample.path), found["val"]


def straddling(splits: dict[str, list[Sample]]) -> list[str]:
    """What is wrong where the same content lies in two parts, which would flatter the result."""
    seen: dict[bytes, tuple[str, str]] = {}
    wrong = []
    for part, samples in splits.items():
        for sample in samples:
            first = seen.setdefault(sample.sha256, (part, sample.path))
            if first[0] != part:
                wrong.append(f"{sample.path} in {part} is the same image as {first[1]} in {first[0]}")
    return wrong


def one_image(count: int, noun: str = "image") -> str:
    """`1 image`, `2 images`, `1,197 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """`a, b, c`, or the first of them and how many more."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
