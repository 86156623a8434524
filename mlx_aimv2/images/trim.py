"""Cuts an image file down to what its pixels need, so that no metadata can cost the image, time or memory.

bytes -> Trimmed: of a JPEG, PNG or TIFF the same first frame without comments, profiles, EXIF and later frames; its
orientation, by the number that EXIF or XMP holds; and whether a JPEG's data end early. What is another format, or does
not follow its own, stays as it is: the decoder will say what is wrong with it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ORIENTATION = 0x0112

MAX_SCANS = 100
"""Scans of one JPEG, each of which passes over all pixels: encoders write about ten."""

MAX_SCANNED_PIXELS = 1 << 32
"""Pixels times scans of one JPEG."""

MAX_PARTS = 1 << 18
"""Chunks of a PNG, strips or tiles of a TIFF."""

MAX_TEXT = 1 << 20
"""Bytes of compressed metadata that are looked at for an orientation."""

RAW = "is a raw photograph ({}), which nothing here develops: export it as JPEG, PNG or TIFF and give that"
JXL = "is a JPEG XL image, which Pillow does not read: convert it to JPEG or PNG and give that"


class TrimError(ValueError):
    """Why a file is refused before it is decoded; continues a sentence that starts with its name."""


@dataclass(frozen=True)
class Trimmed:
    """`orientation` is 1 to 8, or None where the format keeps it elsewhere; `cut` tells of a JPEG without its end."""

    data: bytes
    orientation: int | None = None
    cut: bool = False


def trimmed(data: bytes) -> Trimmed:
    """The file as its decoder should see it. TrimError refuses raw photographs and files made to take for ever."""
    for start, trim in TRIMS.items():
        if data.startswith(start):
            try:
                return trim(data) or Trimmed(data)
            except (struct.error, IndexError, OverflowError):  # it ends too early for its own format
                return Trimmed(data)
    for start, kind in RAW_STARTS.items():
        if data.startswith(start) or data[4:].startswith(start):
            raise TrimError(RAW.format(kind))
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        raise TrimError(JXL)
    return Trimmed(data)


def orientation_in(exif: object, xmp: object = None) -> int:
    """The orientation, 1 to 8, that a block of EXIF or else one of XMP holds; 1 where neither tells one.

    Pillow's own reading of EXIF gives up, and warns, where any other tag is bad.
    """
    if isinstance(exif, (bytes, bytearray)) and (found := _in_exif(bytes(exif))) is not None:
        return found
    if isinstance(xmp, str):
        xmp = xmp.encode("utf-8", "replace")
    if isinstance(xmp, (bytes, bytearray)) and (match := re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)):
        return int(match[1])
    return 1


def _in_exif(block: bytes) -> int | None:
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    try:
        if order is None:
            return None
        (place,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", block, entry)
            if tag == ORIENTATION and kind in (1, 3, 4):
                value = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], block, entry + 8)[0]
                return int(value) if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


# JPEG

_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # neither a stuffed zero nor one that stands alone, as a restart

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}

_KEPT_SEGMENTS = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12)}
"""What says what the colours are, how it starts and its least length; all other APPn and comments are metadata."""


def _jpeg(data: bytes) -> Trimmed | None:
    kept: list[bytes | memoryview] = [data[:2]]
    exif, xmp = b"", b""
    place, scans, pixels, header = 2, 0, 0, 0
    end, cut = len(data), True
    while match := _MARKER.search(data, place):
        marker, start, following = data[match.end() - 1], match.start(), match.end()
        if marker == 0xD9:
            end, cut = following, False
            break
        place = following + int.from_bytes(data[following : following + 2], "big")
        if place < following + 2 or place > len(data):
            end = start  # the file ends within what describes the next scan
            break
        segment = data[following + 2 : place]
        if marker == 0xDA:
            header, scans = header or start, scans + 1
            if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
                raise TrimError(
                    f"is a JPEG of more than {scans - 1} scans over {pixels:,} pixels, "
                    f"made to take for ever: encoders write about ten"
                )
            continue
        if marker in _FRAMES:
            pixels = max(pixels, int.from_bytes(segment[1:3], "big") * int.from_bytes(segment[3:5], "big"))
        if scans:
            continue
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif = exif or segment
        elif marker == 0xE1 and segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or segment
        begin, least = _KEPT_SEGMENTS.get(marker, (b"", 0))
        is_metadata = (0xE0 <= marker <= 0xEF or marker == 0xFE) and not least
        if not is_metadata and segment.startswith(begin) and len(segment) >= least:
            kept.append(data[start:place])
    if not scans:
        return None
    kept.append(memoryview(data)[header:end])
    return Trimmed(b"".join(kept), orientation_in(exif, xmp), cut)


# PNG

_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


def _png(data: bytes) -> Trimmed | None:
    kept, place, parts, kind = [data[:8]], 8, 0, b""
    texts: dict[bytes, bytes] = {}
    while place + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, place)
        start, place, parts = place, place + 12 + length, parts + 1
        if parts > MAX_PARTS:
            raise TrimError(f"is a PNG of more than {MAX_PARTS:,} chunks, made to take for ever")
        if kind in _PNG_KEPT:
            kept.append(data[start:place])
        elif not (kind[0] & 0x20 and kind.isalpha()):
            return None  # a chunk that may not be left out, or none at all
        elif kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            name, text = _png_text(kind, data[start + 8 : min(place - 4, start + 8 + MAX_TEXT)])
            texts.setdefault(name, text)
    raw = texts.get(b"Raw profile type exif") or texts.get(b"Raw profile type APP1") or b""
    try:  # ImageMagick's way to keep EXIF in a PNG: a heading of three lines, then hexadecimal digits
        profile = bytes.fromhex(b"".join(raw.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        profile = b""
    return Trimmed(b"".join(kept), orientation_in(texts.get(b"eXIf") or profile, texts.get(b"XML:com.adobe.xmp")))


def _png_text(kind: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A text's keyword and as much of it as an orientation may stand in; nothing where it cannot be unpacked."""
    if kind == b"eXIf":
        return kind, content
    name, _, text = content.partition(b"\0")
    is_packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]
    elif is_packed:
        text = text[1:]
    if is_packed and name.startswith((b"XML:", b"Raw profile")):
        try:
            text = zlib.decompressobj().decompress(text, MAX_TEXT)
        except zlib.error:
            return name, b""
    return name, text


# TIFF

_TIFF_KEPT = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 290, 291, 292, 293, 317, 320, 322, 323, 324, 325, 332),
    *(338, 339, 340, 341, 347, 50674, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}
"""Tags without which the pixels cannot be read."""

_TIFF_RAW = {50706: "DNG", 37398: "TIFF/EP"}
"""Tags that only raw photographs have."""

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def _tiff(data: bytes) -> Trimmed | None:
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    is_big = 43 in data[2:4]  # BigTIFF, whose numbers have 8 bytes
    sign, header = "<" if order == "little" else ">", 8 if is_big else 4
    offset, counter, entry = (sign + layout for layout in (("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")))
    if data[8:10] == b"CR" and not is_big:
        raise TrimError(RAW.format("CR2"))
    (place,) = struct.unpack_from(offset, data, header)
    (count,) = struct.unpack_from(counter, data, place)
    if count > 65536:
        return None
    first, size = place + struct.calcsize(counter), struct.calcsize(entry)
    kept: list[bytes] = []
    values: dict[int, int] = {}
    total, xmp = 0, b""
    for start in range(first, first + count * size, size):
        tag, kind, number, raw = struct.unpack_from(entry, data, start)
        # A single short value stands at the left, in either order; what is longer stands elsewhere, at this offset.
        value = int.from_bytes(raw[: _TYPE_BYTES[kind]] if kind in (1, 3) and number == 1 else raw, order)
        values.setdefault(tag, value)
        if tag == 700:
            xmp = data[value : value + min(number, MAX_TEXT)]
        if tag in _TIFF_KEPT:
            total += number * _TYPE_BYTES.get(kind, 1)
            if number > MAX_PARTS and tag in (273, 279, 324, 325):
                raise TrimError(f"is a TIFF of {number:,} strips or tiles, made to take for ever")
            kept.append(data[start : start + size])
    for tag, name in _TIFF_RAW.items():
        if tag in values:
            raise TrimError(RAW.format(name))
    if values.get(262) in (32803, 34892) or (values.get(254, 0) & 1 and 330 in values):
        raise TrimError(RAW.format("with a thumbnail first, as NEF, ARW and PEF have it"))
    if total > len(data):
        raise TrimError(f"is a broken TIFF: its tags claim {total:,} bytes of a file of {len(data):,}")
    # The tags that stay, in a table of their own behind everything else; no further image follows it.
    body = data[:header] + struct.pack(offset, len(data) + len(data) % 2) + data[header + struct.calcsize(offset) :]
    table = struct.pack(counter, len(kept)) + b"".join(kept) + struct.pack(offset, 0)
    orientation = values.get(ORIENTATION) or orientation_in(None, xmp)
    return Trimmed(body + b"\0" * (len(body) % 2) + table, orientation if 1 <= orientation <= 8 else 1)


TRIMS: dict[bytes, Callable[[bytes], Trimmed | None]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
    b"II+\0": _tiff,
    b"MM\0+": _tiff,
}
"""How a file starts -> what trims it."""

RAW_STARTS = {
    b"ftypcrx ": "CR3",
    b"FUJIFILMCCD-RAW": "RAF",
    b"IIRO": "ORF",
    b"IIRS": "ORF",
    b"MMOR": "ORF",
    b"IIU\0": "RW2",
    b"FOVb": "X3F",
}
"""How raw photographs that are no TIFF start, at byte 0 or 4."""
