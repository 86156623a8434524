"""Turns an image or a text into the vector with which an index is searched."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.embed.encode import FAST, Embedder, Settings, raise_failure
from mlx_aimv2.embed.provenance import differences, made_by
from mlx_aimv2.files import expand_user
from mlx_aimv2.find_images import has_suffix
from mlx_aimv2.images import Policy
from mlx_aimv2.index.reader import Index


def image_path(query: str) -> str | None:
    """The absolute path of a query that is an image, None for one that is text. Raises ValueError or OSError."""
    path = expand_user(query)
    if path.is_file():
        return os.path.normpath(path.absolute())
    if path.is_dir() and (os.sep in query or query.startswith(("~", "."))):  # a bare word is text, as `red` may be
        raise IsADirectoryError(f"{query} is a folder: give one image or a text")
    if has_suffix(query) or query.startswith(("/", "./", "../", "~/")):
        raise FileNotFoundError(f"{query} does not exist: give an image or a text")
    if not query.strip():
        raise ValueError("the query is empty: give an image or a text")
    return None


def query_vector(
    index: Index,
    *,
    image: str | None = None,
    text: str = "",
    model: str | None = None,
    revision: str | None = None,
    policy: Policy = FAST,
) -> NDArray[Any]:
    """The vector of an image (an absolute path) or else of a text, `-> (D,)`.

    It comes from the index where that has the image as it is now and no model is given, else from the model. Raises
    ValueError for a model that did not make the index, and for a text where the index was not made with LiT.
    """
    stamp = index.stamp(image) if image is not None else None
    if image is not None and stamp is not None and model is None and index.axes == 1:
        about = Path(image).stat()
        if (about.st_size, about.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
            return index.vector(image)
    index.check_search()
    made = made_by(index)
    if image is None and made["pool"] != "head":
        what = "a folder" if expand_user(text).is_dir() else "no image"
        raise ValueError(
            f"{text} is {what}, and {index.path} holds {made['pool']} embeddings of images, which "
            "a text cannot be compared with: give an image, or embed with apple/aimv2-large-patch14-224-lit"
        )
    embedder = _embedder(index, made, model, revision)
    if image is None:
        loaded = embedder.loaded
        return np.array(loaded.model.encode_text(loaded.processor.tokenize([text]))[0].tolist())
    (result,) = embedder([[image]], policy=policy)
    for path, note in result.notes:
        warnings.warn(f"{path} {note}", stacklevel=2)
    for path, reason in result.failures:
        raise_failure(path, reason)
    vector: NDArray[Any] = result.embeddings[0].vector
    return vector


def _embedder(index: Index, made: dict[str, Any], model: str | None, revision: str | None) -> Embedder:
    """The model that made the index, or the given one if it gives the same vectors."""
    try:
        embedder = Embedder.load(Settings(model, revision).filled(made))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {index.path} was made with it, -m says where it is now") from None
    refused, notes = differences(made, embedder.description)
    if refused:
        raise ValueError(f"{index.path} was not made with this model, they differ in {'; '.join(refused)}")
    for note in notes:
        warnings.warn(f"the same weights with another setting: {note}", stacklevel=1)
    return embedder
