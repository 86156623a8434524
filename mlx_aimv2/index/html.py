"""How does a search look on one page that needs nothing but a browser?

The page holds its thumbnails and its style and no script, and tells the browser to run none: whatever a file is called,
its name is text.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from mlx_aimv2.find_images import shown
from mlx_aimv2.images import Policy, open_image
from mlx_aimv2.index.reader import Match

THUMBNAIL = 480
"""Longer side in pixels, twice what a card is wide on most screens."""

QUALITY = 82

FAST = Policy(decode="fast", truncated="accept")
"""For a thumbnail, what is there of an image is enough."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{
  color-scheme: light dark;
  --page: #f5f5f7; --card: #ffffff; --text: #1d1d1f; --quiet: #6e6e73; --line: #e3e3e8; --accent: #0066cc;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #111113; --card: #1c1c1f; --text: #f5f5f7; --quiet: #98989f; --line: #2e2e33; --accent: #4aa3ff;
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; max-width: 1440px; padding: 2rem clamp(1rem, 3vw, 3rem) 3rem; background: var(--page);
  color: var(--text); font: 15px/1.45 -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, sans-serif;
}}
header {{ display: flex; gap: 1.5rem; align-items: center; margin-bottom: 2rem; }}
header img {{ width: 132px; height: 132px; object-fit: cover; border-radius: 14px; border: 1px solid var(--line); }}
h1 {{ margin: 0 0 .3rem; font-size: clamp(1.3rem, 2.6vw, 2rem); line-height: 1.2; letter-spacing: -.01em;
  overflow-wrap: anywhere; }}
header p {{ margin: 0; color: var(--quiet); overflow-wrap: anywhere; }}
ol {{ list-style: none; margin: 0; padding: 0; display: grid; gap: 1.1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(46%, 260px), 1fr)); }}
li {{ background: var(--card); border: 1px solid var(--line); border-radius: 14px; overflow: hidden; }}
li a {{ display: block; color: inherit; text-decoration: none; }}
li a:focus-visible {{ outline: 3px solid var(--accent); outline-offset: -3px; border-radius: 14px; }}
li a:hover .name {{ color: var(--accent); }}
.frame {{ display: flex; align-items: center; justify-content: center; aspect-ratio: 4 / 3; overflow: hidden;
  background: var(--line); color: var(--quiet); font-size: 13px; padding: 0; text-align: center; }}
.frame img {{ width: 100%; height: 100%; object-fit: cover; display: block; }}
.caption {{ display: flex; gap: .6rem; align-items: baseline; padding: .65rem .8rem .5rem; }}
.rank {{ color: var(--quiet); font-variant-numeric: tabular-nums; }}
.name {{ flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
.score {{ font-weight: 600; font-variant-numeric: tabular-nums; }}
.bar {{ height: 3px; margin: 0 .8rem .75rem; border-radius: 2px; background: var(--line); }}
.bar i {{ display: block; height: 100%; border-radius: 2px; background: var(--accent); }}
</style>
</head>
<body>
<header>{image}<div><h1>{title}</h1><p>{subtitle}</p></div></header>
<main><ol>
{cards}
</ol></main>
</body>
</html>
"""

CARD = """<li><a href="{address}" title="{path}">
<div class="frame">{image}</div>
<div class="caption"><span class="rank">{rank}</span><span class="name">{name}</span>
<span class="score">{score:.3f}</span></div>
<div class="bar"><i style="width:{share:.1f}%"></i></div></a></li>"""


def result_page(matches: Sequence[Match], *, words: str | None = None, image: str | None = None, about: str) -> str:
    """The page for a search by words or by an image's path, as HTML; `about` is the line below the title."""
    with ThreadPoolExecutor() as pool:
        thumbnails = list(pool.map(thumbnail, [match.path for match in matches]))
    head = thumbnail(image) if image is not None else None
    title = f"“{words}”" if words is not None else f"Images like {shown(Path(image or '').name)}"
    cards = (
        _card(rank, match, data) for rank, (match, data) in enumerate(zip(matches, thumbnails, strict=True), start=1)
    )
    return PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(about),
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


def _card(rank: int, match: Match, data: bytes | None) -> str:
    return CARD.format(
        address=html.escape(f"file://{quote(os.fsencode(match.path))}"),
        path=html.escape(shown(match.path)),
        name=html.escape(shown(Path(match.path).name)),
        image=_image(data) if data is not None else "cannot be read any more",
        rank=rank,
        score=match.score,
        share=100 * max(0.0, min(1.0, match.score)),
    )


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
