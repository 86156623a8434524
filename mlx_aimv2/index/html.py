"""Writes the result of a search as one page that needs nothing but a browser.

The page holds its thumbnails and its style and no script, and tells the browser to run none: whatever a file is called,
its name is text.
"""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from urllib.parse import quote

from mlx_aimv2.files import atomic_file, check_file, expand_user
from mlx_aimv2.images import Policy, open_image
from mlx_aimv2.index.reader import Index, Match

THUMBNAIL = 480
"""Longer side in pixels, twice what a card is wide on most screens."""

QUALITY = 82

FAST = Policy(decode="fast")
"""For a thumbnail, what is there of an image is enough."""

PAGE = Path(__file__).parent / "search_page.html"
CARD = Path(__file__).parent / "search_card.html"

GENERATOR = b'<meta name="generator" content="mlx-aimv2 search">'
"""Stands in every page, so that a page may replace an earlier one."""

ENDINGS = (".html", ".htm")


def check_page(page: Path, index: Index, image: str | None, *, overwrite: bool = False) -> Path:
    """The page's path with `~` expanded. Raises ValueError or OSError where writing it would do harm or fail.

    The index, its images and the one that is searched for are never replaced; another file that no earlier search
    wrote only with `overwrite`.
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
    about = " · ".join(filter(None, (f"{len(matches)} nearest of {len(index):,} images", name, str(index.path))))
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
    """An image as a small JPEG; None where it cannot be read any more."""
    from PIL import Image

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
        image=_image(data) if data is not None else "cannot be read any more",
        rank=rank,
        score=f"{match.score:.3f}",
        share=f"{100 * max(0.0, min(1.0, match.score)):.1f}",
    )


def _text(text: str) -> str:
    """Any text as HTML that is valid and reads in its order: what is not printable is escaped."""
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
