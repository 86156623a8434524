"""What does `mlx-aimv2 search` do: which images of an index are most like an image, or fit words best?"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_aimv2.commands.image_flags import add_policy_arguments, policy_of
from mlx_aimv2.find_images import has_suffix, shown

if TYPE_CHECKING:
    import numpy as np

    from mlx_aimv2.index.reader import Index, Match

PAGES = (".html", ".htm")

HELP = "find the images of an index that are most like an image, or fit words best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="what mlx-aimv2 embed wrote")
    parser.add_argument("query", metavar="QUERY", help="an image or, where the index was made with LiT, words")
    parser.add_argument("-k", "--top", type=int, default=12, metavar="N", help="images to find (default: %(default)s)")
    parser.add_argument("-m", "--model", metavar="X", help="Hub name, folder or weight file (default: the index's own)")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: Apple's release, pinned)")
    add_policy_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write (or replace) a page with thumbnails")
    parser.add_argument("--open", action="store_true", help="show that page in the browser")


def run(arguments: argparse.Namespace) -> int:
    """Prints the nearest images, best first."""
    from mlx_aimv2.index.reader import Index

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    if arguments.html is not None:
        arguments.html = Path(os.path.expanduser(arguments.html))  # noqa: PTH111 - ~nobody stays as it is
    with Index.open(arguments.index) as index:
        image = _as_image(arguments.query)
        if arguments.html is not None:
            _check_page(arguments.html, index, image)
        query = _query(index, arguments, image)
        started = time.perf_counter()
        matches = index.search(query, arguments.top, once=True)
        seconds = time.perf_counter() - started
        if arguments.html is not None or arguments.open:
            _show(index, matches, arguments, image)
        if arguments.json:
            found = [{"path": match.path, "score": match.score} for match in matches]
            print(json.dumps({"query": arguments.query, "images": len(index), "seconds": seconds, "matches": found}))
        else:
            for match in matches:
                print(f"{match.score:7.4f}  {shown(match.path)}")
    return 0


def _as_image(query: str) -> str | None:
    """The query as an absolute path, None if it is words."""
    path = Path(os.path.expanduser(query))  # noqa: PTH111
    if path.is_file():
        return os.path.normpath(path.absolute())
    if path.is_dir():
        raise IsADirectoryError(f"{query} is a folder: give one image or words")
    if has_suffix(query) or query.startswith(("/", "./", "../", "~/")):
        raise FileNotFoundError(f"{query} does not exist: give an image or words")
    if not query.strip():
        raise ValueError("the query is empty: give an image or words")
    return None


def _check_page(page: Path, index: Index, image: str | None) -> None:
    """Refuses to write the page where that would do harm or fail."""
    folder = page.absolute().parent
    if page.suffix.lower() not in PAGES:
        raise ValueError(f"--html {page} would be a page: give it a name that ends in {' or '.join(PAGES)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{page.parent} does not exist: make that folder first")
    if page.is_dir():
        raise IsADirectoryError(f"--html {page} is a folder: name a file")
    if page.exists() and any(page.samefile(file) for file in (index.path, image) if file is not None):
        raise ValueError(f"--html {page} would replace the index or the image that it shows: choose another name")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to: choose another --html")


def _query(index: Index, arguments: argparse.Namespace, image: str | None) -> np.ndarray[Any, Any]:
    """The query's vector: from the index where the image is in it as it is now, else from the model."""
    stamp = index.stamp(image) if image is not None else None
    if image is not None and stamp is not None and arguments.model is None and index.axes == 1:
        about = Path(image).stat()
        if (about.st_size, about.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
            return index.vector(image)
    return _from_model(index, arguments, image)


def _from_model(index: Index, arguments: argparse.Namespace, image: str | None) -> np.ndarray[Any, Any]:
    import numpy as np

    from mlx_aimv2.embed.pipeline import embed_chunks
    from mlx_aimv2.embed.pooling import Pooling
    from mlx_aimv2.embed.prefetch import MAX_PATCHES
    from mlx_aimv2.embed.provenance import describe, differences, load_with_origin, made_by

    index.check_search()
    made = made_by(index)
    if image is None and made["pool"] != "head":
        raise ValueError(
            f"{arguments.query} is no image, and {index.path} holds {made['pool']} embeddings of images, which "
            "words cannot be compared with: give an image, or embed with apple/aimv2-large-patch14-224-lit"
        )
    own = arguments.model is None
    name = made["checkpoint"] if own else arguments.model
    revision = arguments.revision or (made["commit"] if own else None)
    try:
        loaded = load_with_origin(name, revision=revision, dtype=made["dtype"] if own else None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {index.path} was made with it, -m says where it is now") from None
    pooling = Pooling.of(loaded.model, made["pool"], layer=made["layer"], norm=made["norm"])
    max_patches = made["max_patches"] or MAX_PATCHES
    refused, notes = differences(made, describe(loaded, pooling, max_patches=max_patches))
    if refused:
        raise ValueError(f"{index.path} was not made with this model, they differ in {'; '.join(refused)}")
    for note in notes:
        print(f"mlx-aimv2: note: the same weights a little otherwise: {note}", file=sys.stderr)
    if image is None:
        ids = loaded.processor.tokenize([arguments.query])
        return np.array(loaded.model.encode_text(ids)[0].tolist())
    (chunk,) = embed_chunks(
        [[image]],
        loaded.model,
        loaded.processor,
        pooling=pooling,
        max_patches=max_patches,
        policy=policy_of(arguments),
    )
    return chunk[0].vector


def _show(index: Index, matches: list[Match], arguments: argparse.Namespace, image: str | None) -> None:
    from mlx_aimv2.index.export import appearing
    from mlx_aimv2.index.html import result_page

    made = index.provenance
    name = str(made.get("checkpoint") or "")
    name = name if made.get("commit") else Path(name).name
    about = " · ".join(filter(None, (f"{len(matches)} nearest of {len(index):,} images", name, str(index.path))))
    words = None if image is not None else arguments.query
    text = result_page(matches, words=words, image=image, about=about)
    target: Path | None = arguments.html
    if target is None:
        handle, name = tempfile.mkstemp(prefix="mlx-aimv2-", suffix=".html")
        os.close(handle)
        target = Path(name)
    with appearing(target) as file:
        file.write(text.encode("utf-8"))
    if arguments.html is None:
        print(f"mlx-aimv2: the page is {target}", file=sys.stderr)
    if arguments.open and not webbrowser.open(f"file://{target.absolute()}"):
        print(f"mlx-aimv2: no browser could be opened: look at {target} yourself", file=sys.stderr)
