"""Streams images with captions: Hugging Face's imagefolder, or WebDataset tar shards; in bounded memory.

    FOLDER/metadata.jsonl: {"file_name": "cat.jpg", "text": "a cat"}      text may be a list: one is drawn each time
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
from pathlib import Path
from typing import Protocol

import numpy as np

from mlx_aimv2.files import expand_user, read_text
from mlx_aimv2.find_images import has_suffix

METADATA = "metadata.jsonl"
MAX_METADATA_BYTES = 1 << 32
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
    """The data at a path: a folder with metadata.jsonl, a folder of .tar shards, or one shard."""
    place = expand_user(path)
    if place.is_dir() and (place / METADATA).is_file():
        return ImageFolder(place)
    shards = sorted(place.glob("*.tar")) if place.is_dir() else [place] if place.suffix == ".tar" else []
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist; wanted a folder with {METADATA}, or .tar shards")
    if not shards:
        raise ValueError(f"{place}: wanted a folder with {METADATA} (file_name, text) or .tar shards, found neither")
    return Shards(shards)


class ImageFolder:
    """Hugging Face's imagefolder with captions; only the list is held in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        notes = _Notes()
        self.rows: list[tuple[str, tuple[str, ...]]] = []
        listed: set[str] = set()
        text = read_text(folder / METADATA, max_bytes=MAX_METADATA_BYTES)
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row["file_name"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'{folder / METADATA}, line {number}: wanted {{"file_name": …, "text": …}}, got {line!r:.80}'
                ) from None
            listed.add(name)
            texts = captions_of(row.get("text"))
            if not texts:
                notes.add("has no caption", name)
            elif not (folder / name).is_file():
                notes.add("is listed but not there", name)
            else:
                self.rows.append((name, texts))
        for file in folder.iterdir():
            if has_suffix(file.name) and file.name not in listed:
                notes.add(f"is not listed in {METADATA}, so it has no caption", file.name)
        notes.warn(folder)
        if not self.rows:
            raise ValueError(f"{folder / METADATA} lists no image with a caption")

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

    def epoch(self, chance: np.random.Generator | None) -> Iterator[Example]:
        notes = _Notes()
        order = range(len(self.files)) if chance is None else chance.permutation(len(self.files))
        found = (example for i in order for example in read_shard(self.files[int(i)], notes))
        yield from found if chance is None else shuffled(found, chance, self.buffer)
        notes.warn(self.files[0].parent)


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


def read_shard(file: Path, notes: _Notes) -> Iterator[Example]:
    """The examples of one tar file in its order: files of one key follow each other. A broken end is passed over."""
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                stem, _, ending = member.name.rpartition("/")[2].partition(".")
                own = f"{member.name.rpartition('/')[0]}/{stem}"
                if own != key:
                    yield from _example(file, key, parts, notes)
                    key, parts = own, {}
                if member.size > MAX_MEMBER_BYTES:
                    notes.add("is too large", f"{file.name}:{member.name}")
                    continue
                content = archive.extractfile(member)
                if content is not None:
                    parts[ending.lower()] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        notes.add("is a broken shard, used up to the fault", f"{file.name} ({error})")
        return  # the last example may be cut
    yield from _example(file, key, parts, notes)


def _example(file: Path, key: str, parts: dict[str, bytes], notes: _Notes) -> Iterator[Example]:
    if not parts:
        return
    name = f"{file.name}:{key.lstrip('/')}"
    image = next((content for ending, content in parts.items() if has_suffix(f"x.{ending}")), None)
    texts = _texts(parts)
    if image is None:
        notes.add("has no image", name)
    elif not texts:
        notes.add("has no caption", name)
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


class _Notes:
    """What was passed over, counted by reason; the first of each kind is named."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, int]] = {}

    def add(self, reason: str, name: str) -> None:
        first, count = self.found.get(reason, (name, 0))
        self.found[reason] = (first, count + 1)

    def warn(self, place: Path) -> None:
        for reason, (first, count) in self.found.items():
            more = f" (and {count - 1:,} more)" if count > 1 else ""
            warnings.warn(f"{place}: {first} {reason}{more}; passed over", stacklevel=3)
