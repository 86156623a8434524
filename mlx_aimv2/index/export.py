"""Writes an index's embeddings to files that other tools read, and the result of a search as a page.

`vectors` in float32 as the model gave them, sorted by path: (P, D) for one vector an image; for tokens and maps all
tokens of all images one after another (T, D), and `shapes` (P, 1) or (P, 2) says how many of them each image has.
npz and safetensors hold these arrays, the paths and what the index says of itself; jsonl has a line for each image.
Memory holds one image at a time, for safetensors all vectors.

A page needs nothing but a browser. It holds its thumbnails and its style and no script, and tells the browser to run
none: whatever a file is called, its name is text.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from mlx_aimv2.files import atomic_file, check_file, expand_user
from mlx_aimv2.images import FAST, open_image
from mlx_aimv2.index.reader import Index, Match

THUMBNAIL = 480
"""Longer side in pixels, twice what a card is wide on most screens."""

QUALITY = 82

PAGE = Path(__file__).parent / "search_page.html"
CARD = Path(__file__).parent / "search_card.html"

GENERATOR = b'<meta name="generator" content="mlx-aimv2 search">'
"""Stands in every page, so that a page may replace an earlier one."""

ENDINGS = (".html", ".htm")


def export(index: Index, path: Path, *, kind: str) -> None:
    """Writes a whole index to a file: kind `npz`, `safetensors` or `jsonl`; a file of that name is replaced."""
    if kind not in WRITERS:
        raise ValueError(f"an export is {', '.join(WRITERS)}, not {kind}")
    with atomic_file(path) as file:
        WRITERS[kind](index, file)


def target(output: Path, kind: str, *, overwrite: bool = False, inputs: Iterable[str] = ()) -> Path:
    """Where the export of the index at `output` goes. Raises ValueError or OSError where it would do harm.

    Neither the index nor one of the `inputs` is replaced; another file that is no export only with `overwrite`.
    """
    path = output.with_suffix(f".{kind}")
    if output.suffix.lower() == f".{kind}" or (path.exists() and output.exists() and path.samefile(output)):
        raise ValueError(f"-o {output} is the name of its export: give the index another one, {output.stem}.db")
    start, signatures = SIGNATURES[kind]
    check_file(
        path,
        option="the export",
        is_own=lambda head: head[start:].startswith(signatures),
        overwrite=overwrite,
        inputs=[output, *inputs],
    )
    return path


def _npz(index: Index, file: BinaryIO) -> None:
    npy: Any = np.lib.format  # some versions of NumPy declare no types for it
    paths, shapes, count = _contents(index)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("vectors.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, index.width)}
            npy.write_array_header_1_0(member, header)
            for entry in index.embeddings():
                member.write(entry.vector.astype("<f4").tobytes())
        arrays = {"paths": np.array(paths), "provenance": np.array(json.dumps(index.provenance))}
        if index.axes > 1:
            arrays["shapes"] = shapes
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


def _safetensors(index: Index, file: BinaryIO) -> None:
    paths, shapes, count = _contents(index)
    vectors = np.empty((count, index.width), np.float32)
    done = 0
    for entry in index.embeddings():
        part = entry.vector.reshape(-1, index.width)
        vectors[done : done + len(part)] = part
        done += len(part)
    arrays = {"vectors": vectors} | ({"shapes": shapes} if index.axes > 1 else {})
    save_file(arrays, file.name, {"paths": json.dumps(paths), "provenance": json.dumps(index.provenance)})


def _jsonl(index: Index, file: BinaryIO) -> None:
    for entry in index.embeddings():
        line = {"path": entry.path, "sha256": entry.sha256.hex(), "vector": entry.vector.tolist()}
        file.write(json.dumps(line).encode() + b"\n")


WRITERS: dict[str, Callable[[Index, BinaryIO], None]] = {"npz": _npz, "safetensors": _safetensors, "jsonl": _jsonl}


SIGNATURES = {
    "npz": (30, (b"vectors.npy",)),
    # The second is that of releases which wrote the format themselves.
    "safetensors": (8, (b'{"__metadata__":{"p', b'{"__metadata__": {"paths": ')),
    "jsonl": (0, (b'{"path": ',)),
}
"""Kind -> by which bytes, one or the other, and where, a file is known as an export."""


def _contents(index: Index) -> tuple[list[str], NDArray[Any], int]:
    """All paths, how many tokens each image has, `(P, axes - 1)`, and how many all of them have."""
    paths = list(index.paths())
    shapes = np.empty((len(paths), 0), np.int64)
    if index.axes > 1:
        shapes = np.array([index.vector(path).shape[:-1] for path in paths], np.int64).reshape(len(paths), -1)
    return paths, shapes, int(shapes.prod(axis=1).sum())


def check_page(page: Path, index: Index, image: str | None, *, overwrite: bool = False) -> Path:
    """The page's path with `~` expanded. Raises ValueError or OSError where writing it would do harm or fail.

    Neither the index nor an image is replaced; another file that no earlier search wrote only with `overwrite`.
    """
    page = expand_user(page)
    if page.suffix.lower() not in ENDINGS:
        raise ValueError(f"--html {page} would be a page: give it a name that ends in {' or '.join(ENDINGS)}")
    inputs = [index.path, *([image] if image is not None else []), *(index.paths() if page.exists() else ())]
    check_file(page, option="--html", is_own=lambda head: GENERATOR in head, overwrite=overwrite, inputs=inputs)
    return page


def write_page(
    page: Path | None, index: Index, matches: Sequence[Match], *, text: str | None = None, image: str | None = None
) -> Path:
    """Writes the page for a search by text or by an image's path, without a name into a temporary file; `-> path`."""
    made = index.provenance
    name = str(made.get("checkpoint") or "")
    name = name if made.get("commit") else Path(name).name
    about = " · ".join(filter(None, (f"{len(matches):,} nearest of {len(index):,} images", name, str(index.path))))
    content = result_page(matches, text=text, image=image, about=about)
    if page is None:
        handle, temporary = tempfile.mkstemp(prefix="mlx-aimv2-", suffix=".html")
        os.close(handle)
        page = Path(temporary)
    with atomic_file(page) as file:
        file.write(content.encode("utf-8"))
    return page


def result_page(matches: Sequence[Match], *, text: str | None = None, image: str | None = None, about: str) -> str:
    """The page for a search by text or by an image's path, as HTML; `about` is the line below the title."""
    with ThreadPoolExecutor() as pool:
        thumbnails = list(pool.map(thumbnail, [match.path for match in matches]))
    head = thumbnail(image) if image is not None else None
    card = Template(CARD.read_text(encoding="utf-8").rstrip())
    cards = [
        _card(card, rank, match, data) for rank, (match, data) in enumerate(zip(matches, thumbnails, strict=True), 1)
    ]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=_text(f"“{text}”" if text is not None else f"Images like {Path(image or '').name}"),
        subtitle=_text(about),
        image=_image(head) if head is not None else "",
        cards="\n".join(cards),
    )


def thumbnail(path: str) -> bytes | None:
    """An image, or what is there of it, as a small JPEG; None where it cannot be read any more."""
    try:
        image, _ = open_image(path, policy=FAST).rgb((THUMBNAIL, THUMBNAIL))
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=QUALITY)
    except Exception:  # as when embedding: a decoder may raise anything, and the page goes on without it
        return None
    return stream.getvalue()


def _card(template: Template, rank: int, match: Match, data: bytes | None) -> str:
    return template.substitute(
        address=html.escape(f"file://{quote(os.fsencode(match.path))}"),
        path=_text(match.path),
        name=_text(Path(match.path).name),
        image=_image(data) if data is not None else "file missing or unreadable",
        rank=rank,
        score=f"{match.score:.3f}",
        share=f"{100 * max(0.0, min(1.0, match.score)):.1f}",
    )


def _text(text: str) -> str:
    """Any text as HTML that is valid and reads in its order: what is not printable is escaped."""
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
