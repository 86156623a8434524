"""Shows images of an index in the browser: what a search found, or groups of images that look the same.

A page needs only a browser. It contains its thumbnails, its style and a few lines of script for the arrow keys, and
tells the browser to load and run nothing else: whatever a file is called, its name is text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import Template
from urllib.parse import quote

from PIL import Image

from mlx_aimv2.files import atomic_file, check_file, expand_user
from mlx_aimv2.images import FAST, open_image
from mlx_aimv2.index.reader import Index

THUMBNAIL = 480
"""Longer side in pixels, twice what a card is wide on most screens."""

QUALITY = 82

PAGE, CARD, SCRIPT = (Path(__file__).parent / name for name in ("page.html", "page_card.html", "page.js"))

GENERATOR = b'<meta name="generator" content="mlx-aimv2'
"""Begins a line of every page, so that a page may replace an earlier one."""

ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class Card:
    """An image on a page: its path, what is written beside its name, and the length of its bar from 0 to 1, if any."""

    path: str
    text: str
    bar: float | None = None


def check_page(page: Path, index: Index, images: Iterable[str] = (), *, overwrite: bool = False) -> Path:
    """The page's path with `~` expanded. Raises ValueError or OSError if writing it would do harm or fail.

    The index, its images and the query's are never replaced; another file that is not an earlier page only with
    `overwrite`.
    """
    page = expand_user(page)
    if page.suffix.lower() not in ENDINGS:
        raise ValueError(f"--html {page} must be a name that ends in {' or '.join(ENDINGS)}")
    inputs = [index.path, *images, *(index.paths() if page.exists() else ())]
    check_file(page, option="--html", is_own=lambda head: GENERATOR in head, overwrite=overwrite, inputs=inputs)
    return page


def made_with(index: Index) -> str:
    """The number of images, the model, and the name of an index without its folders, as a page may be shared."""
    made = index.provenance
    name = str(made.get("checkpoint") or "")
    name = name if made.get("commit") else Path(name).name
    return " · ".join(filter(None, (f"{len(index):,} images", name, index.path.name)))


def write_page(page: Path | None, content: str) -> Path:
    """Writes a page, without a name into a temporary file; `-> path`."""
    if page is None:
        handle, temporary = tempfile.mkstemp(prefix="mlx-aimv2-", suffix=".html")
        os.close(handle)
        page = Path(temporary)
    with atomic_file(page) as file:
        file.write(content.encode("utf-8"))
    return page


def result_page(
    groups: Sequence[tuple[str, Sequence[Card]]], *, title: str, about: str, images: Sequence[str] = ()
) -> str:
    """Groups of images, each with a heading or "", as HTML; `about` is below the title, `images` are before it."""
    paths = [*images, *(card.path for _, cards in groups for card in cards)]
    with ThreadPoolExecutor() as pool:
        small = dict(zip(paths, pool.map(thumbnail, paths), strict=True))
    template, script = Template(CARD.read_text(encoding="utf-8").rstrip()), SCRIPT.read_text(encoding="utf-8")
    lines = []
    for heading, cards in groups:
        lines += [f"<h2>{_text(heading)}</h2>"] if heading else []
        lines += [
            "<ol>",
            *(_card(template, rank, card, small[card.path]) for rank, card in enumerate(cards, 1)),
            "</ol>",
        ]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=_text(title),
        subtitle=_text(about),
        images="".join(_image(data) for path in images if (data := small[path]) is not None),
        groups="\n".join(lines),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
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


def _card(template: Template, rank: int, card: Card, data: bytes | None) -> str:
    path, bar = Path(card.path), ""
    if card.bar is not None:
        bar = f'<div class="bar"><i style="width:{100 * min(1.0, max(0.0, card.bar)):.1f}%"></i></div>'
    return template.substitute(
        address=html.escape(f"file://{quote(os.fsencode(card.path))}"),
        path=_text(card.path),
        name=_text(path.name),
        folder=_text(path.parent.name),
        image=_image(data) if data is not None else "file missing or unreadable",
        rank=f"{rank:,}",
        text=_text(card.text),
        bar=bar,
    )


def _text(text: str) -> str:
    """Any text as HTML that is valid and reads in its order: what is not printable is escaped."""
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
