"""Cuts an image file down to what its pixels need, so no metadata can make it unreadable or cost time or memory.

bytes -> Trimmed: for a JPEG, PNG or TIFF the same first frame without comments, profiles, EXIF and later frames; its
orientation and date, from EXIF or XMP; and whether a JPEG's data end early. Other formats, and files that violate
theirs, are left unchanged: the decoder will say what is wrong.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Literal

ORIENTATION, CHANGED, EXIF, TAKEN = 0x0112, 0x0132, 0x8769, 0x9003
"""EXIF tags: orientation, DateTime, the offset of the table with the next one, DateTimeOriginal."""

MAX_SCANS = 100
"""Scans in a JPEG, each of which covers all pixels: encoders write about ten."""

MAX_SCANNED_PIXELS = 1 << 32
"""Pixels times scans of a JPEG."""

MAX_PARTS = 1 << 18
"""Chunks in a PNG, strips or tiles in a TIFF."""

MAX_TAGS = 1 << 16
"""Tags of a TIFF that are read."""

MAX_TEXT = 1 << 20
"""Bytes of metadata that are searched for an orientation."""


@dataclass(frozen=True)
class Trimmed:
    """`orientation` is 1 to 8, or None if the format keeps it elsewhere; a JPEG that `ends_early` has no end marker.

    `taken` is the day from EXIF, as in `date_in`, `raw` the format of a raw photograph.
    """

    data: bytes
    orientation: int | None = None
    ends_early: bool = False
    taken: str = ""
    raw: str = ""


def trimmed(data: bytes) -> Trimmed:
    """The file as its decoder should see it.

    Raises ValueError, which continues a sentence that starts with the file's name, for JPEG XL and files designed to
    take forever.
    """
    for start, trim in TRIMS.items():
        if data.startswith(start):
            return trim(data)
    brand = data[4:] if data[4:8] == b"ftyp" else data  # after the length of the first box
    if brand.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        raise ValueError("is a JPEG XL image, which Pillow does not read: convert it to JPEG or PNG and give that")
    return Trimmed(data, raw=next((kind for start, kind in RAW.items() if brand.startswith(start)), ""))


def orientation_in(exif: object, xmp: object = None) -> int:
    """The orientation, 1 to 8, from a block of EXIF or else one of XMP; 1 if neither has one.

    Pillow's own EXIF reader gives up, and warns, if any other tag is bad.
    """
    found = _values(_block(exif)).get(ORIENTATION, 0)
    if 1 <= found <= 8:
        return found
    text = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
    if isinstance(text, (bytes, bytearray)) and (match := re.search(rb'tiff:Orientation(?:="|>)([1-8])', text)):
        return int(match[1])
    return 1


def date_in(exif: object) -> str:
    """The day of DateTimeOriginal or else DateTime, `2024-05-17`, in a block of EXIF or a TIFF; "" if there is none.

    It is the local day at the place of the photograph: EXIF's dates have no time zone.
    """
    block = _block(exif)
    first = _values(block)
    for at in (_values(block, first.get(EXIF)).get(TAKEN), first.get(CHANGED)):
        if at is not None and (found := _DAY.match(block, min(at, len(block)))):  # BigTIFF has 64 bits
            with suppress(ValueError):  # such as 0000:00:00
                return date(*map(int, found.groups())).isoformat()
    return ""


_DAY = re.compile(rb"(\d{4})[:-](\d\d)[:-](\d\d)")

# TIFF, whose tag table EXIF uses too


def _block(exif: object) -> bytes:
    """Its bytes from its TIFF header on; empty if it has none."""
    block = bytes(exif).removeprefix(b"Exif\0\0") if isinstance(exif, (bytes, bytearray)) else b""
    return block if block.startswith((b"II", b"MM")) else b""


def _values(block: bytes, at: int | None = None) -> dict[int, int]:
    """Tag -> its value or offset, as in `_Tag`; the first of its kind counts."""
    return {tag.number: tag.value for tag in reversed(list(_tags(block, at)))}


_TIFF_KEPT = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 290, 291, 292, 293, 317, 320, 322, 323, 324, 325, 332),
    *(338, 339, 340, 341, 347, 50674, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}
"""Tags without which the pixels cannot be read."""

_TIFF_RAW = {50706: "DNG", 37398: "TIFF/EP"}
"""Tags that only raw photographs have."""

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


@dataclass(frozen=True)
class _Tag:
    """A tag of a TIFF: its `value`, or the offset of its values in the file, each of `width` bytes."""

    number: int
    value: int
    count: int
    width: int
    entry: bytes


def _header(data: bytes) -> tuple[Literal["little", "big"], int, int]:
    """A TIFF's byte order, and the sizes of an offset and of the tag count in bytes; larger in a BigTIFF."""
    return "little" if data[:2] == b"II" else "big", *((8, 8) if 43 in data[2:4] else (4, 2))


def _tags(data: bytes, at: int | None = None) -> Iterator[_Tag]:
    """The tags of a TIFF's first image, or of the table at an offset, up to the end of the file."""
    order, wide, counter = _header(data)

    def number(position: int, length: int = wide) -> int:
        return int.from_bytes(data[position : position + length], order)

    first, size = (number(wide) if at is None else at) + counter, 4 + 2 * wide
    end = first + size * min(number(first - counter, counter), MAX_TAGS)
    for entry in range(first, min(end, len(data) - size + 1), size):
        width, count = _TYPE_BYTES.get(number(entry + 2, 2), 1), number(entry + 4)
        # A single short value is left-aligned, in either byte order; anything longer is elsewhere, at this offset.
        value = number(entry + 4 + wide, min(width, wide) if count == 1 else wide)
        yield _Tag(number(entry, 2), value, count, width, data[entry : entry + size])


def _tiff(data: bytes) -> Trimmed:
    order, wide, counter = _header(data)
    tags, values = list(_tags(data)), _values(data)
    raw = next((name for number, name in _TIFF_RAW.items() if number in values), "")
    if data[8:10] == b"CR" and wide == 4:
        raw = "CR2"
    elif values.get(262) in (32803, 34892) or (values.get(254, 0) & 1 and 330 in values):
        raw = raw or "with a thumbnail first, as NEF, ARW and PEF have it"
    if raw:
        return Trimmed(data, taken=date_in(data), raw=raw)
    kept = [tag for tag in tags if tag.number in _TIFF_KEPT]
    parts = max((tag.count for tag in kept if tag.number in (273, 279, 324, 325)), default=0)
    if parts > MAX_PARTS:
        raise ValueError(f"is a TIFF of {parts:,} strips or tiles, made to take forever")
    if (total := sum(tag.count * tag.width for tag in kept)) > len(data):
        raise ValueError(f"is a broken TIFF: its tags claim {total:,} bytes of a file of {len(data):,}")
    # The remaining tags, in a new table after everything else; no further image follows it.
    padding = bytes(len(data) % 2)
    new = [(len(data) + len(padding)).to_bytes(wide, order), data[2 * wide :], padding]
    new += [len(kept).to_bytes(counter, order), *(tag.entry for tag in kept), bytes(wide)]
    xmp = next((data[tag.value : tag.value + min(tag.count, MAX_TEXT)] for tag in tags if tag.number == 700), b"")
    orientation = values.get(ORIENTATION) or orientation_in(None, xmp)
    return Trimmed(data[:wide] + b"".join(new), orientation if 1 <= orientation <= 8 else 1, taken=date_in(data))


# JPEG

_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # neither a stuffed zero nor one without a length, such as a restart

_COLOURS = (b"JFIF\0", b"Adobe")
"""Starts of the segments that define the colours, in 12 bytes or more; other APPn and comments are metadata."""


_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of the segments that give the size."""


def _jpeg(data: bytes) -> Trimmed:
    kept = [data[:2]]
    exif, xmp = b"", b""
    position, header, scans, pixels = 2, 0, 0, 0
    end, ends_early = len(data), True
    while match := _MARKER.search(data, position):
        marker, start, following = data[match.end() - 1], match.start(), match.end()
        if marker == 0xD9:
            end, ends_early = following, False
            break
        position = following + int.from_bytes(data[following : following + 2], "big")
        if position < following + 2 or position > len(data):
            end = start  # the file ends inside the header of the next scan
            break
        if marker == 0xDA:
            header, scans = header or start, scans + 1
            if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
                raise ValueError(
                    f"is a JPEG of more than {scans - 1} scans over {pixels:,} pixels, made to take forever: encoders "
                    "write about ten"
                )
        segment = data[following + 2 : position]
        if marker in _FRAMES:
            pixels = max(pixels, int.from_bytes(segment[1:3], "big") * int.from_bytes(segment[3:5], "big"))
        if scans:
            continue
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif = exif or segment
        elif marker == 0xE1 and segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or segment
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not is_metadata or (segment.startswith(_COLOURS) and len(segment) >= 12):
            kept.append(data[start:position])
    if not scans:
        return Trimmed(data)
    pixels_alone = b"".join([*kept, memoryview(data)[header:end]])
    return Trimmed(pixels_alone, orientation_in(exif, xmp), ends_early, date_in(exif))


# PNG

_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}

_XMP, _PROFILES = b"XML:com.adobe.xmp", (b"Raw profile type exif", b"Raw profile type APP1")
"""Names of text chunks that may contain an orientation; the second kind is how ImageMagick keeps EXIF."""


def _png(data: bytes) -> Trimmed:
    kept, position, parts, kind = [data[:8]], 8, 0, b""
    texts: dict[bytes, bytes] = {}
    while position + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        start, position, parts = position, position + 12 + length, parts + 1
        if parts > MAX_PARTS:
            raise ValueError(f"is a PNG of more than {MAX_PARTS:,} chunks, made to take forever")
        if kind in _PNG_KEPT:
            kept.append(data[start:position])
        elif not (kind[0] & 0x20 and kind.isalpha()):
            return Trimmed(data)  # a chunk that must not be left out, or none at all
        elif kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            content = data[start + 8 : min(position - 4, start + 8 + MAX_TEXT)]
            name, text = (kind, content) if kind == b"eXIf" else content.partition(b"\0")[::2]
            if name in (kind, _XMP, *_PROFILES) and name not in texts:
                texts[name] = text
                with suppress(zlib.error):  # it is not compressed
                    # Flags and an empty language may precede it.
                    texts[name] = zlib.decompressobj().decompress(text.lstrip(b"\0\1"), MAX_TEXT)
    exif = texts.get(b"eXIf", b"")
    profile = next((texts[name] for name in _PROFILES if name in texts), b"")
    with suppress(ValueError):  # a heading of three lines, then hexadecimal digits
        exif = exif or bytes.fromhex(b"".join(profile.split(b"\n")[3:]).decode("ascii"))
    return Trimmed(b"".join(kept), orientation_in(exif, texts.get(_XMP)), taken=date_in(exif))


TRIMS: dict[bytes, Callable[[bytes], Trimmed]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff),
}
"""Start of a file -> the function that trims it."""

RAW = {
    b"ftypcrx ": "CR3",
    b"FUJIFILMCCD-RAW": "RAF",
    **dict.fromkeys((b"IIRO", b"IIRS", b"MMOR"), "ORF"),
    b"IIU\0": "RW2",
    b"FOVb": "X3F",
}
"""Start of raw photographs other than TIFF -> their format."""
