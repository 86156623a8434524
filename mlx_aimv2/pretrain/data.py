"""Images with captions to batches: Hugging Face's imagefolder or WebDataset's tar shards, streamed in bounded memory.

    FOLDER/metadata.jsonl: {"file_name": "cat.jpg", "text": "a cat"}      text may be a list: one is drawn each time
    FOLDER/metadata.csv with the columns file_name and text; either file may lie in folders of FOLDER too
    SHARD.tar: 0001.jpg, 0001.txt (or .caption, or .json with "text" or "caption"), 0002.jpg, …

What cannot be used (a caption missing or empty, an image without a caption, a broken shard) is skipped with a note that
names it; the notes of one kind are counted. An image that cannot be read is found out when it is its turn, since nobody
decodes a collection of this size beforehand: it is named once and skipped, unless the caller wants none.

Example number n, counted over all epochs, has a random generator of its own. So what it becomes depends on neither the
batch it falls into nor on the rank that prepares it, and a resumed run needs to know n alone.
"""

from __future__ import annotations

import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.files import BLOCK, expand_user
from mlx_aimv2.images.find import Scan, has_suffix, is_junk
from mlx_aimv2.images.open import open_image, warn_of
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn.samples import DataError, part_of, parts_of
from mlx_aimv2.learn.tables import (
    CAPTION,
    CAPTIONS,
    METADATA,
    TABLES,
    column,
    decoded,
    not_read,
    rows_with_images,
    tables,
)
from mlx_aimv2.pretrain.objective import Batch, Grid, draw_lengths
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.train.augment import ASPECT, Augmentation
from mlx_aimv2.train.batches import MakeAll
from mlx_aimv2.train.state import digest_of
from mlx_aimv2.untrusted_json import parse

MAX_CAPTION_BYTES = 1 << 20
"""Of a caption's file, and of a header that has a long name."""

MAX_KEY_BYTES = 1 << 28
"""Of the files of one example of a shard, those alone that are read."""

MAX_EXPANSION = 20
"""Bytes of a shard's files for each of its own: images hardly get smaller by gzip, and captions by ten times. More
takes long, too: tarfile unpacks 10 KB at a time and copies the rest each time."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, as JSON may hold one: no text, which no tokenizer takes."""

CAPTION_ENDINGS = ("txt", "caption", "text", "cap")
"""Of plain captions in a shard."""

WANTED = f"wanted a folder with {' or '.join(METADATA)} (file_name, text) or .tar shards"

SHUFFLE_BUFFER = 1000
"""Examples of shards held at a time, from which the next is drawn."""


@dataclass(frozen=True)
class Example:
    """An image, as a path or as the bytes of its file, and its captions, one at least."""

    name: str
    image: Path | bytes
    texts: tuple[str, ...]


class Data:
    """A collection that can be gone through in a new order for each epoch; what is wrong with it is told once."""

    def __init__(self, scan: Scan, skip_broken: bool) -> None:
        self._said: set[str] = set()
        self._skip_broken = skip_broken
        self.tell(scan)

    def epoch(self, rng: np.random.Generator | None) -> Iterator[Example]:
        """All examples, shuffled by `rng`; in the order of the files with None."""
        raise NotImplementedError

    def tell(self, scan: Scan) -> None:
        """Gives what was left out as warnings."""
        for note in scan.notes:
            self._warn(note)

    def broken(self, line: str) -> None:
        """Warns once that an image cannot be read, or raises ValueError where that is not to be skipped."""
        if not self._skip_broken:
            raise ValueError(f"{line}; --skip-broken leaves such images out")
        self._warn(f"{line}; skipped")

    def _warn(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            warnings.warn(line, stacklevel=4)


def open_data(path: str | Path, *, skip_broken: bool = True) -> Data:
    """The data at a path: a folder with metadata, a folder of .tar shards, or one shard; of parts `train`.

    Without `skip_broken` the first image that cannot be read is an error.
    """
    place, scan = expand_user(path), Scan()
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist; {WANTED}")
    found = _files_by_part(place, scan) if place.is_dir() else {"": [place] if place.suffix.lower() == ".tar" else []}
    part = next((part for part in ("train", "", *found) if found.get(part)), None)
    if part is None or (part not in ("train", "") and len(found) > 1):
        raise ValueError("; ".join([f"{place}: {WANTED}, found neither", *not_read(place, "text", CAPTION)]))
    for file in (file for name in found if name != part for file in found[name]):
        scan.note(str(file), "belongs to another part: left out")
    is_table = found[part][0].suffix.lower() in TABLES
    return ImageFolder(found[part], scan, skip_broken) if is_table else Shards(found[part], scan, skip_broken)


def _files_by_part(place: Path, scan: Scan) -> dict[str, list[Path]]:
    """The tables with captions, or the shards, in a folder or in its folders, by part."""
    found: dict[str, list[Path]] = {part: [file] for part, file in tables(place, of=CAPTION).items()}
    for file in sorted([] if found else place.iterdir()):
        if file.suffix.lower() == ".tar" and not is_junk(file.name):
            found.setdefault(part_of(file.stem) or "", []).append(file)
    if found:
        return found
    for part, folder in parts_of(place, scan, lambda folder: bool(_files_by_part(folder, Scan()))).items():
        inside = [folder] if part else scan.folders(folder)
        found[part] = [file for one in inside for files in _files_by_part(one, Scan()).values() for file in files]
    return {part: files for part, files in found.items() if files}


class ImageFolder(Data):
    """Hugging Face's imagefolder with captions; only the list is held in memory."""

    def __init__(self, files: Sequence[Path], scan: Scan, skip_broken: bool = True) -> None:
        """Takes the tables of images. Raises DataError for rows that are none."""
        found: dict[Path, tuple[str, dict[str, None]]] = {}
        for file in files:
            for where, row, image in rows_with_images(file, scan):
                if not (texts := captions_of(row, where, scan)):
                    scan.note(where, "has no caption: skipped")
                elif image is None:
                    scan.note(where, "is listed but not there: skipped")
                else:
                    found.setdefault(image, (row["file_name"], {}))[1].update(dict.fromkeys(texts))
        if scan.faults:
            raise DataError(scan.faults)
        super().__init__(scan, skip_broken)
        self.captioned = list(found.items())
        if not self.captioned:
            raise ValueError(f"{files[0]} lists no image with a caption")

    def epoch(self, rng: np.random.Generator | None) -> Iterator[Example]:
        for i in range(len(self.captioned)) if rng is None else rng.permutation(len(self.captioned)):
            image, (name, texts) = self.captioned[i]
            yield Example(name, image, tuple(texts))


class Shards(Data):
    """WebDataset tar shards, read one after another; a buffer of examples is shuffled."""

    def __init__(
        self, files: list[Path], scan: Scan | None = None, skip_broken: bool = True, *, buffer: int = SHUFFLE_BUFFER
    ) -> None:
        super().__init__(scan or Scan(), skip_broken)
        self.files, self.buffer = files, buffer

    def epoch(self, rng: np.random.Generator | None) -> Iterator[Example]:
        scan = Scan()
        order = range(len(self.files)) if rng is None else rng.permutation(len(self.files))
        found = (example for i in order for example in read_shard(self.files[i], scan))
        yield from found if rng is None else shuffled(found, rng, self.buffer)
        self.tell(scan)


def shuffled(examples: Iterable[Example], rng: np.random.Generator, buffer: int) -> Iterator[Example]:
    """The examples in a random order, of which `buffer` are held at a time."""
    held: list[Example] = []
    for example in examples:
        if len(held) < buffer:
            held.append(example)
            continue
        i = int(rng.integers(buffer))
        yield held[i]
        held[i] = example
    for i in rng.permutation(len(held)):
        yield held[i]


def read_shard(file: Path, scan: Scan) -> Iterator[Example]:
    """The examples of one tar file in its order: files of one key follow each other. A broken end is skipped."""
    try:
        with tarfile.open(file, "r|*", tarinfo=_Header) as archive:
            for key, members in groupby(_members(archive, file, scan), key=itemgetter(0)):
                # The last example of a broken shard, which may be cut, raises here.
                found = [(ending, content) for _, ending, content in members]
                parts, name = dict(found), f"{file.name}:{key.lstrip('/')}"
                if len(parts) < len(found):
                    scan.note(f"{file.parent / name}", "has several files with the same ending: the last is used")
                exact_first = sorted(parts, key=lambda ending: "." in ending)  # 0.jpg before 0.depth.png
                image = next((parts[ending] for ending in exact_first if has_suffix(f"x.{ending}")), None)
                texts = _texts(parts, f"{file.parent / name}", scan)
                if image is None:
                    scan.note(f"{file.parent / name}", "has no image: skipped")
                elif not texts:
                    scan.note(f"{file.parent / name}", "has no caption in UTF-8: skipped")
                else:
                    yield Example(name, image, texts)
    except Exception as error:  # tarfile and what it unpacks with raise whatever they meet
        scan.note(f"{file} ({error})", "is a broken shard: used up to the damage")


class _Header(tarfile.TarInfo):
    """A header of a shard. One that holds the name of the next file is kept in memory, so it must be short."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0 or (found.type not in tarfile.REGULAR_TYPES and found.size > MAX_CAPTION_BYTES):
            raise tarfile.ReadError(f"a header of {found.size:,} bytes")
        return found


def _members(archive: tarfile.TarFile, file: Path, scan: Scan) -> Iterator[tuple[str, str, bytes]]:
    """Key, ending and content of each file of a shard that is used: images, captions."""
    limit = MAX_EXPANSION * (file.stat().st_size + BLOCK)
    unpacked, last, held = 0, "", 0
    for member in archive:
        unpacked += member.size
        # Before the stream reads on to where the next one should begin, which of a sparse file its size does not tell.
        if not 0 <= member.size <= unpacked <= limit or archive.offset > limit:
            raise tarfile.ReadError(f"{member.name} goes beyond {MAX_EXPANSION} times the size of the shard")
        path = PurePosixPath(member.name)
        stem, _, ending = path.name.partition(".")
        is_caption = ending.lower() in (*CAPTION_ENDINGS, "json")
        if not member.isfile() or is_junk(member.name) or not (is_caption or has_suffix(f"x.{ending}")):
            continue
        key = str(path.parent / stem)
        held = member.size + (held if key == last else 0)
        last = key
        if held > MAX_KEY_BYTES or (is_caption and member.size > MAX_CAPTION_BYTES):
            scan.note(f"{file}:{member.name}", "is too large: skipped")
        elif (content := archive.extractfile(member)) is not None:
            yield key, ending.lower(), content.read()


def _texts(parts: dict[str, bytes], where: str, scan: Scan) -> tuple[str, ...]:
    plain = next((parts[ending] for ending in CAPTION_ENDINGS if parts.get(ending, b"").strip()), None)
    try:
        told = {"text": decoded(plain)[0]} if plain is not None else None
        about = told or parse(parts.get("json", b"{}"), "json", but=CAPTIONS)
    except ValueError:  # no JSON
        return ()
    return captions_of(about, where, scan) if isinstance(about, dict) else ()


def captions_of(about: Mapping[str, Any], where: str, scan: Scan) -> tuple[str, ...]:
    """The captions under `text` or `caption`, a string or a list of strings, without the empty ones.

    One with half a character is left out too, and noted.
    """
    found = next((about[name] for name in column([name for name in about if about[name]], CAPTION)), None)
    texts = [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
    whole = [text.strip() for text in texts if not _SURROGATE.search(text)]
    if len(whole) < len(texts):
        scan.note(where, "has a caption with half a character, such as an emoji cut in two: left out")
    return tuple(filter(None, whole))


@dataclass(frozen=True)
class Prepared:
    """One example, ready to be stacked: pixels (H, W, 3), its caption and its prefix length."""

    pixels: np.ndarray[Any, np.dtype[np.float32]]
    caption: str
    length: int


@dataclass
class Preparation:
    """Examples to pixels and captions: with `augmentation` for training, without for validation."""

    vision: Aimv2VisionConfig
    seed: int
    augmentation: Augmentation | None = None
    first_caption: float = 0.0

    def __post_init__(self) -> None:
        self.processor = Aimv2Processor(published(self.vision.image_size), patch_size=self.vision.patch_size)
        self._told: set[str] = set()

    def __call__(self, number: int, example: Example, grid: Grid) -> Prepared:
        """Raises ValueError or OSError for an image that cannot be read."""
        rng = np.random.default_rng((self.seed, 1, number))
        rows, columns = grid
        length = int(draw_lengths(1, rows * columns, rng)[0])
        texts = example.texts
        if self.augmentation is None or rng.random() < self.first_caption:
            texts = texts[:1]
        caption = texts[int(rng.integers(len(texts)))]
        name = example.name if isinstance(example.image, bytes) else str(example.image)
        opened = open_image(example.image, name=name)
        image, _ = opened.rgb()
        if opened.notes and self.augmentation is not None and name not in self._told:  # not of samples to be shown
            self._told.add(name)
            warn_of(opened)
        size = (rows * self.vision.patch_size, columns * self.vision.patch_size)
        if self.augmentation is not None:
            aspects = (size[1] / size[0],) * 2 if self.vision.is_native else ASPECT
            image = self.augmentation(image, size, rng, aspects=aspects)
        elif self.vision.is_native:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        return Prepared(self.processor.pixels(image), caption, length)


class Stream:
    """Examples without end, those of one rank: `rank`, `rank + ranks`, … from number `start` on."""

    def __init__(
        self,
        data: Data,
        grid: Callable[[int], Grid],
        *,
        size: Callable[[Grid], int],
        seed: int,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """`grid` gives the grid of a batch by its number, `size` the examples of such a batch on this rank."""
        self.position = start
        self._grid, self._size = grid, size
        self._broken = data.broken
        self._numbered = islice(enumerate(_without_end(data, seed)), start + (rank - start) % ranks, None, ranks)

    def __call__(self, number: int, make_all: MakeAll) -> tuple[list[Prepared], int]:
        """The examples of batch `number`, in one grid; batches are taken in their order.

        An image that cannot be read is skipped with a note; too many of them in a row are an error.
        """
        found: list[Prepared] = []
        failed, grid = 0, self._grid(number)
        size = self._size(grid)
        while len(found) < size:
            drawn = list(islice(self._numbered, size - len(found)))
            for (n, _), made in zip(drawn, make_all([(*one, grid) for one in drawn]), strict=True):
                self.position = n + 1
                if not isinstance(made, Exception):
                    found.append(made)
                    failed = 0
                    continue
                self._broken(str(made))
                failed += 1
                if failed > 10 * size + 100:
                    raise ValueError(f"{failed:,} images in a row cannot be read, the last one: {made}")
        return found, self.position


def _without_end(data: Data, seed: int) -> Iterator[Example]:
    for epoch in count():
        example = None
        for example in data.epoch(np.random.default_rng((seed, 0, epoch))):
            yield example
        if example is None:
            raise ValueError("the data has no readable image with a caption")


def content_of(data: Data) -> str:
    """A short name of a collection's images and captions."""
    if isinstance(data, Shards):
        return digest_of((file.name, file) for file in data.files)
    return digest_of((example.name, example.image, example.texts) for example in data.epoch(None))


def first_examples(data: Data, prepare: Preparation, grid: Grid, limit: int) -> list[Prepared]:
    """The first examples in the order of the files, those that can be read: for validation and sample images."""
    found: list[Prepared] = []
    for number, example in enumerate(islice(data.epoch(None), limit)):
        try:
            found.append(prepare(number, example, grid))
        except (ValueError, OSError) as error:
            data.broken(str(error))
    return found


def collate(examples: Sequence[Prepared], tokenizer: Tokenizer) -> Batch:
    """Prepared examples as one batch."""
    return Batch(
        pixels=mx.array(np.stack([one.pixels for one in examples])),
        ids=mx.array(tokenizer([one.caption for one in examples])),
        lengths=mx.array(np.array([one.length for one in examples], np.int32)),
    )
