"""Turns search queries, images and words, into vectors."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.config import LIT_CHECKPOINT
from mlx_aimv2.embed.cache import differences
from mlx_aimv2.embed.encode import Embedder, Settings, embeddings_of, made_by, raise_failure
from mlx_aimv2.files import expand_user, is_file, read_image_file, stat_of
from mlx_aimv2.images import FAST, Policy
from mlx_aimv2.images.find import has_suffix
from mlx_aimv2.index.reader import Index

_WEIGHTED = re.compile(r"(\d+\.?\d*|\.\d+):(.+)", re.DOTALL)
"""rclip's syntax for a weight, as in `2:golden retriever`."""


class Query(NamedTuple):
    """One part of a query: the absolute path of an image, or None and a text; a `weight` below 0 subtracts it."""

    image: str | None
    text: str
    weight: float = 1.0


def title(queries: Sequence[Query]) -> str:
    """A query in words: `Images like a.jpg`, `“a dog” + b.jpg − 2 × “snow”`."""
    if len(queries) == 1 and queries[0].image is not None:
        return f"Images like {Path(queries[0].image).name}"
    words = ""
    for query in queries:
        sign = " − " if query.weight < 0 else " + " if words else ""
        times = "" if abs(query.weight) == 1 else f"{abs(query.weight):g} × "
        words += sign + times + (f"“{query.text}”" if query.image is None else Path(query.image).name)
    return words


def parse_query(words: str) -> Query:
    """Parses `words`, `2:golden retriever -> Query(None, "golden retriever", 2.0)`.

    An image with exactly that name comes first; `1:` before a text keeps the rest of it literally. Raises ValueError or
    OSError for what is neither an image nor a text.
    """
    if not is_file(expand_user(words)) and (found := _WEIGHTED.fullmatch(words)):
        weight, words = float(found[1]), found[2]
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of {words} must be above 0, got {found[1]}: use --subtract to subtract")
        return Query(image_path(words), words, weight)
    return Query(image_path(words), words)


def image_path(query: str) -> str | None:
    """The absolute path of a query that is an image, None for one that is text. Raises ValueError or OSError."""
    path = expand_user(query)
    if "://" in query:
        raise ValueError(f"{query} is a URL: download it first")
    if is_file(path):
        return os.path.normpath(path.absolute())
    if _is_folder(query) and (os.sep in query or query.startswith(("~", "."))):  # a bare word such as `red` is text
        raise IsADirectoryError(f"{query} is a folder: give one image or a text")
    if has_suffix(query) or query.startswith(("/", "./", "../", "~/")):
        raise FileNotFoundError(f"{query} does not exist: give an image or a text")
    if not query.strip():
        raise ValueError("the query is empty: give an image or a text")
    return None


def _is_folder(text: str) -> bool:
    about = stat_of(str(expand_user(text)))  # None for a text that is longer than any name
    return about is not None and stat.S_ISDIR(about.st_mode)


def query_vectors(
    index: Index,
    queries: Sequence[Query],
    *,
    model: str | None = None,
    revision: str | None = None,
    policy: Policy = FAST,
) -> list[tuple[float, NDArray[Any]]]:
    """The weight and the vector (D,) of each part of a query, for `Index.search`.

    A vector comes from the index if it has the unchanged image and no model is given, else from the model, which is
    loaded once. Raises ValueError for a model that did not make the index, and for a text if the index was not made
    with LiT.
    """
    vectors = {query: _known(index, query.image) if model is None else None for query in queries}
    if missing := [query for query, vector in vectors.items() if vector is None]:
        index.check_search()
        text = next((query.text for query in missing if query.image is None), None)
        if text is not None and made_by(index)["pool"] != "head":
            what = "a folder" if _is_folder(text) else "not an image"
            raise ValueError(
                f"{text} is {what}, and {index.path} was made without a text encoder, so it cannot be searched by "
                f"words: give an image, or embed with -m {LIT_CHECKPOINT}"
            )
        embedder = embedder_of(index, Settings(model, revision), policy)
        vectors |= {query: _vector(query, embedder) for query in missing}
    return [(query.weight, vector) for query in queries if (vector := vectors[query]) is not None]


def _known(index: Index, image: str | None) -> NDArray[Any] | None:
    """The vector of an image that is unchanged in the index."""
    stamp = index.stamp(image) if image is not None and index.axes == 1 else None
    if image is not None and stamp is not None:
        with suppress(OSError):  # embedding it will say why
            if hashlib.sha256(read_image_file(image)[1]).digest() == stamp.sha256:
                return index.vector(image)
    return None


def embedder_of(index: Index, given: Settings, policy: Policy = FAST) -> Embedder:
    """The model that made the index, or the given one if it is the same."""
    made = made_by(index)
    try:
        embedder = Embedder.load(given.filled(made), policy)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {index.path} was made with it: give its new place with -m") from None
    refused, notes = differences(made, embedder.description)
    if refused:
        raise ValueError(f"{index.path} was not made with this model: they differ in {'; '.join(refused)}")
    for note in notes:
        warnings.warn(f"the same weights with another setting: {note}", stacklevel=1)
    return embedder


def _vector(query: Query, embedder: Embedder) -> NDArray[Any]:
    if query.image is None:
        loaded = embedder.loaded
        return np.array(loaded.model.encode_text(loaded.processor.tokenize([query.text]))[0].tolist())
    return next(embeddings_of(embedder([[query.image]]), raise_failure)).vector
