"""Embeds many images as fast as they can be decoded or encoded, whichever takes longer: paths -> Embedding …

An image or a text with which an index is searched becomes a vector here, too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.embed import provenance
from mlx_aimv2.embed.loader import MAX_PATCHES, Decoder, Known, run_ahead, split_into_chunks
from mlx_aimv2.embed.pooling import Pooling
from mlx_aimv2.files import expand_user
from mlx_aimv2.images import Policy
from mlx_aimv2.images.find import has_suffix, list_images
from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.loading import Loaded, read_source

if TYPE_CHECKING:
    from mlx_aimv2.images.processor import Aimv2Processor
    from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel

FAST = Policy(decode="fast")

OnFailure: TypeAlias = Callable[[str, str], None]
"""Called with a path and what is wrong with it, which continues a sentence that starts with the path."""


def embed(
    paths: Iterable[str | os.PathLike[str]],
    model: Aimv2VisionModel | Aimv2Model,
    processor: Aimv2Processor,
    *,
    pool: str | None = None,
    layer: int | None = None,
    norm: bool = False,
    max_patches: int = MAX_PATCHES,
    threads: int | None = None,
    decode: str = "fast",
    max_pixels: int | None = None,
    truncated: str = "accept",
    on_failure: OnFailure | None = None,
) -> Iterator[Embedding]:
    """Embeds files, folders and patterns one image after another: `paths -> Embedding …`, sorted by name.

    `pool`, `layer` and `norm` are explained in `pooling.py`. For native checkpoints, images of more than
    `max_patches` are scaled down in their shape, and below 112 patches a warning is given. An image that cannot be
    read raises ValueError, or is passed to `on_failure(path, reason)` and left out. `threads` decode, by default one
    for each core; `decode`, `max_pixels` and `truncated` are `images.Policy`'s.
    """
    fail = on_failure or raise_failure
    pooling = Pooling.of(model, pool, layer=layer, norm=norm)
    policy = Policy(decode=decode, max_pixels=max_pixels, truncated=truncated)
    decoder = Decoder(processor, max_patches=max_patches, policy=policy)
    for result in embed_chunks(split_into_chunks(listed_files(paths, fail)), decoder, model, pooling, threads=threads):
        for path, note in result.notes:
            warnings.warn(f"{path} {note}", stacklevel=2)
        for path, reason in result.failures:
            fail(path, reason)
        yield from result.embeddings


def listed_files(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], fail: OnFailure) -> list[str]:
    """The image files that files, folders and patterns mean; what is none goes to `fail`."""
    listing = list_images(paths)
    for missing in listing.missing:
        fail(missing, "does not exist")
    for path, reason in listing.problems:
        fail(path, reason)
    return listing.files


@dataclass
class Result:
    """What became of a chunk: embeddings, and what failed or deserves a note as pairs (path, reason)."""

    embeddings: list[Embedding] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def embed_chunks(
    chunks: Iterable[Sequence[str]],
    decoder: Decoder,
    model: Aimv2VisionModel | Aimv2Model,
    pooling: Pooling,
    *,
    threads: int | None = None,
) -> Iterator[Result]:
    """What becomes of each chunk's images, chunk after chunk.

    Files that the decoder knows are hashed and not decoded: their Embedding has a vector of no numbers. Notes are what
    is unusual about an image that is embedded all the same.
    """
    config, processor = model.vision.config, decoder.processor
    is_widest = model.dtype == mx.float32
    advice = "the model's weights are damaged (NaN or Inf)" if is_widest else "load the model as float32"
    none = {"features": np.empty(0, np.float32)}
    for chunk in run_ahead(
        chunks,
        decoder,
        lambda levels: {"features": pooling(model, processor.normalised(levels))},
        patch=config.patch_size,
        tokens=config.num_patches,
        threads=threads,
    ):
        result = Result()
        for image, outputs in chunk:
            vector = (outputs or none)["features"]
            if image.note is not None:
                result.notes.append((image.path, image.note))
            if image.failure is not None:
                result.failures.append((image.path, image.failure))
            elif np.isfinite(vector).all():
                result.embeddings.append(Embedding(image.path, image.size, image.mtime_ns, image.sha256, vector))
            else:
                result.failures.append((image.path, f"gave numbers that are not finite: {advice}"))
        yield result


@dataclass(frozen=True)
class Settings:
    """What decides the embeddings of a checkpoint; None stands for the default."""

    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    pool: str | None = None
    layer: int | None = None
    norm: bool = False
    max_patches: int | None = None

    def filled(self, made: Mapping[str, Any]) -> Settings:
        """These settings and, where they say nothing, those that made an index (`provenance.made_by`)."""
        kept = {name: made[name] for name in ("pool", "layer", "norm", "max_patches")}
        if self.model is None:
            kept |= {"model": made["checkpoint"], "revision": made["commit"], "dtype": made["dtype"]}
        return Settings(**(kept | {name: value for name, value in asdict(self).items() if value not in (None, False)}))


@dataclass(frozen=True)
class Embedder:
    """A model with its settings; `description` says of them what JSON holds and `provenance.differences` compares."""

    loaded: Loaded
    pooling: Pooling
    max_patches: int
    description: dict[str, Any]

    @classmethod
    def load(cls, settings: Settings, *, decode: str = "fast") -> Embedder:
        """Loads the checkpoint and records `decode`. Raises ValueError for settings that it cannot meet."""
        loaded = read_source(settings.model or "", revision=settings.revision).load(dtype=settings.dtype)
        pooling = Pooling.of(loaded.model, settings.pool, layer=settings.layer, norm=settings.norm)
        max_patches = settings.max_patches or MAX_PATCHES
        description = provenance.describe(loaded, pooling, max_patches=max_patches, decode=decode)
        return cls(loaded, pooling, max_patches, description)

    def __call__(
        self,
        chunks: Iterable[Sequence[str]],
        *,
        policy: Policy,
        known: Known | None = None,
        threads: int | None = None,
    ) -> Iterator[Result]:
        """What becomes of each chunk's images."""
        decoder = Decoder(self.loaded.processor, max_patches=self.max_patches, known=known, policy=policy)
        return embed_chunks(chunks, decoder, self.loaded.model, self.pooling, threads=threads)


def raise_failure(path: str, reason: str) -> None:
    """What is done about a failure where nobody else takes it: raises ValueError."""
    raise ValueError(f"{path} {reason}")


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
    made = provenance.made_by(index)
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
    refused, notes = provenance.differences(made, embedder.description)
    if refused:
        raise ValueError(f"{index.path} was not made with this model, they differ in {'; '.join(refused)}")
    for note in notes:
        warnings.warn(f"the same weights with another setting: {note}", stacklevel=1)
    return embedder
