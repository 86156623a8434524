"""Streams images with captions: Hugging Face's imagefolder, or WebDataset tar shards; in bounded memory.

    FOLDER/metadata.jsonl: {"file_name": "cat.jpg", "text": "a cat"}      text may be a list: one is drawn each time
    FOLDER/metadata.csv with the columns file_name and text
    SHARD.tar: 0001.jpg, 0001.txt (or 0001.json with "text" or "caption"), 0002.jpg, …

What cannot be used (a caption missing or empty, an image without a caption, a broken shard) is passed over with a note
that names it; the notes of one kind are counted.
"""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from mlx_aimv2.files import expand_user
from mlx_aimv2.images.find import Scan, has_suffix, is_junk
from mlx_aimv2.learn.classify.data import METADATA, metadata_file, metadata_rows
from mlx_aimv2.learn.samples import DataError

MAX_MEMBER_BYTES = 1 << 28
"""Of one file within a shard."""

SHUFFLE_BUFFER = 1000
"""Examples of shards held at a time, from which the next is drawn."""


@dataclass(frozen=True)
class Example:
    """An image, as a path or as the bytes of its file, and its captions, one at least."""

    name: str
    image: Path | bytes
    texts: tuple[str, ...]


class Data(Protocol):
    """A collection that can be gone through in a new order for each epoch."""

    def epoch(self, chance: np.random.Generator | None) -> Iterator[Example]:
        """All examples, shuffled by `chance`; in the order of the files with None."""
        ...


def open_data(path: str | Path) -> Data:
    """The data at a path: a folder with metadata, a folder of .tar shards, or one shard."""
    place = expand_user(path)
    if place.is_dir() and metadata_file(place) is not None:
        return ImageFolder(place)
    found = sorted(place.glob("*.tar")) if place.is_dir() else [place] if place.suffix == ".tar" else []
    shards = [file for file in found if not is_junk(file.name)]
    wanted = f"wanted a folder with {' or '.join(METADATA)} (file_name, text) or .tar shards"
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist; {wanted}")
    if not shards:
        raise ValueError(f"{place}: {wanted}, found neither")
    return Shards(shards)


class ImageFolder:
    """Hugging Face's imagefolder with captions; only the list is held in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[tuple[str, tuple[str, ...]]] = []
        file = metadata_file(folder)
        rows, faults = metadata_rows(file) if file is not None else ([], [f"{folder} has no {METADATA}"])
        if faults:
            raise DataError(faults)
        scan = Scan()
        for row in rows:
            name, texts = row["file_name"], captions_of(row.get("text", row.get("caption")))
            if not texts:
                scan.note(str(folder / name), "has no caption: passed over")
            elif not (folder / name).is_file():
                scan.note(str(folder / name), "is listed but not there: passed over")
            else:
                self.rows.append((name, texts))
        if file is not None:
            scan.unlisted(folder, file, [str(folder / row["file_name"]) for row in rows])
        warn_of(scan, set())
        if not self.rows:
            raise ValueError(f"{file} lists no image with a caption")

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(self, chance: np.random.Generator | None) -> Iterator[Example]:
        order = range(len(self.rows)) if chance is None else chance.permutation(len(self.rows))
        for i in order:
            name, texts = self.rows[int(i)]
            yield Example(name, self.folder / name, texts)


class Shards:
    """WebDataset tar shards, read one after another; a buffer of examples is shuffled."""

    def __init__(self, files: list[Path], *, buffer: int = SHUFFLE_BUFFER) -> None:
        self.files = files
        self.buffer = buffer
        self._said: set[str] = set()

    def epoch(self, chance: np.random.Generator | None) -> Iterator[Example]:
        scan = Scan()
        order = range(len(self.files)) if chance is None else chance.permutation(len(self.files))
        found = (example for i in order for example in read_shard(self.files[int(i)], scan))
        yield from found if chance is None else shuffled(found, chance, self.buffer)
        warn_of(scan, self._said)


def shuffled(examples: Iterable[Example], chance: np.random.Generator, buffer: int) -> Iterator[Example]:
    """The examples in a random order, of which `buffer` are held at a time."""
    held: list[Example] = []
    for example in examples:
        if len(held) < buffer:
            held.append(example)
            continue
        i = int(chance.integers(buffer))
        yield held[i]
        held[i] = example
    for i in chance.permutation(len(held)):
        yield held[int(i)]


def read_shard(file: Path, scan: Scan) -> Iterator[Example]:
    """The examples of one tar file in its order: files of one key follow each other. A broken end is passed over."""
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
                if not member.isfile() or is_junk(member.name):
                    continue
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                own = str(path.parent / stem)
                if own != key:
                    yield from _example(file, key, parts, scan)
                    key, parts = own, {}
                if member.size > MAX_MEMBER_BYTES:
                    scan.note(f"{file}:{member.name}", "is too large: passed over")
                    continue
                content = archive.extractfile(member)
                if content is not None:
                    parts[ending.lower()] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        scan.note(f"{file} ({error})", "is a broken shard: used up to the fault")
        return  # the last example may be cut
    yield from _example(file, key, parts, scan)


def _example(file: Path, key: str, parts: dict[str, bytes], scan: Scan) -> Iterator[Example]:
    if not parts:
        return
    name = f"{file.name}:{key.lstrip('/')}"
    exact_first = sorted(parts, key=lambda ending: "." in ending)  # 0.jpg before 0.depth.png
    image = next((parts[ending] for ending in exact_first if has_suffix(f"x.{ending}")), None)
    texts = _texts(parts)
    if image is None:
        scan.note(f"{file.parent / name}", "has no image: passed over")
    elif not texts:
        scan.note(f"{file.parent / name}", "has no caption: passed over")
    else:
        yield Example(name, image, texts)


def _texts(parts: dict[str, bytes]) -> tuple[str, ...]:
    try:
        if "txt" in parts:
            return captions_of(parts["txt"].decode("utf-8-sig"))
        about = json.loads(parts.get("json", b"{}"))
        return captions_of(about.get("text", about.get("caption"))) if isinstance(about, dict) else ()
    except ValueError:  # neither UTF-8 nor JSON
        return ()


def captions_of(text: object) -> tuple[str, ...]:
    """The captions in a `text` field, a string or a list of strings, without the empty ones."""
    texts = text if isinstance(text, list) else [text]
    return tuple(one.strip() for one in texts if isinstance(one, str) and one.strip())


def warn_of(scan: Scan, said: set[str]) -> None:
    """Gives what was passed over as warnings, but for those that were `said` before."""
    for note in scan.notes:
        if note not in said:
            said.add(note)
            warnings.warn(note, stacklevel=3)
