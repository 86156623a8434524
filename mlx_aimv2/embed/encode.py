"""Embeds many images as fast as they can be decoded or encoded, whichever is slower: paths -> Embedding …

    pixels (B, H, W, 3) -> (B, D) for `mean` and `head`, (B, N, D) for `tokens`, (B, h, w, D) for `map`

AIMv2 has no CLS token. Without `layer` the last hidden state after the final norm is pooled. With `layer` it is the
hidden state with that number in transformers' counting (0 is the patch embedding, -1 the last block's output), without
a norm unless `norm` applies the model's final one. So `layer=-1, norm=True` is the same as no layer.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn
from safetensors.numpy import load, save

from mlx_aimv2 import __version__
from mlx_aimv2.embed.cache import Description, fingerprint
from mlx_aimv2.embed.loader import MAX_PATCHES, Decoder, Known, run_ahead, split_into_chunks
from mlx_aimv2.images import FAST, Policy
from mlx_aimv2.images.find import counted, list_images
from mlx_aimv2.index.reader import NOTHING, Embedding, Index
from mlx_aimv2.index.schema import damaged
from mlx_aimv2.loading import Loaded, read_source
from mlx_aimv2.untrusted_json import Fields, misfit

if TYPE_CHECKING:
    from mlx_aimv2.images.processor import Aimv2Processor
    from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel

FIELDS: Fields = {
    "checkpoint": str,
    "commit": (str, NoneType),
    "dtype": str,
    "pool": str,
    "layer": (int, NoneType),
    "norm": bool,
    "max_patches": (int, NoneType),
    "image_size": (int, NoneType),
    "weights": dict,
}
"""Fields of a description that are reused, and their types."""

OnFailure: TypeAlias = Callable[[str, str], None]
"""Called with a path and the reason it failed, which continues a sentence that starts with the path."""

POOLS = {"mean": 1, "head": 1, "tokens": 2, "map": 3}
"""Name of a pooling -> axes of the result for one image.

`mean` is the mean over the tokens, (D,); `head` the checkpoint's own attention head, in LiT projected to the space
shared with text, (E,); `tokens` every token, (N, D); `map` every token at its place, (rows, columns, D).
"""


@dataclass(frozen=True)
class Pooling:
    """How tokens become an embedding; `of` makes one that the model supports."""

    pool: str
    layer: int | None = None
    norm: bool = False

    @classmethod
    def of(cls, model: nn.Module, pool: str | None = None, *, layer: int | None = None, norm: bool = False) -> Pooling:
        """Checks the settings against the model; without `pool` its head if it has one, else the mean."""
        config = model.vision.config
        if pool is None:
            pool = "head" if config.use_head and layer is None else "mean"
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool}")
        if pool == "head" and not config.use_head:
            raise ValueError("this checkpoint has no pooling head: use mean, tokens or map (only LiT has a head)")
        if pool == "head" and layer is not None:
            raise ValueError("the pooling head reads the last layer: use mean, tokens or map with a layer")
        if layer is None and norm:
            raise ValueError("norm needs a layer: without one the final norm is already applied")
        states = config.num_hidden_layers + 1
        if layer is not None and not -states <= layer < states:
            raise ValueError(f"this checkpoint has hidden states {-states} to {states - 1}, got layer {layer}")
        return cls(pool, layer, norm)

    def width(self, model: nn.Module) -> int:
        """D or E, the length of each vector."""
        hidden = model.vision.config.hidden_size
        return int(getattr(model.config, "projection_dim", hidden)) if self.pool == "head" else hidden

    def __call__(self, model: nn.Module, pixels: mx.array) -> mx.array:
        """Embeddings of a batch in float32, lazily: `(B, H, W, 3) -> (B, …)` as the pooling says."""
        vision = model.vision
        if self.pool == "head":
            pooled = None if hasattr(model.config, "projection_dim") else vision(pixels).pooler_output
            return (model.encode_image(pixels) if pooled is None else pooled).astype(mx.float32)
        if self.layer is None:
            tokens = vision(pixels).last_hidden_state
        else:  # lazy: the blocks after the layer are never computed
            tokens = vision(pixels, output_hidden_states=True).hidden_states[self.layer]
            tokens = vision.norm(tokens) if self.norm else tokens
        tokens = tokens.astype(mx.float32)
        if self.pool == "mean":
            return tokens.mean(axis=1)
        if self.pool == "map":
            return tokens.reshape(len(tokens), *vision.grid(pixels), -1)
        return tokens


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

    `pool`, `layer` and `norm` are explained above. For native checkpoints, images of more than `max_patches` are
    scaled down, keeping their aspect ratio, with a warning below 112 patches. An image that cannot be read raises
    ValueError, or is passed to `on_failure(path, reason)` and left out. `threads` decode, by default one per core;
    `decode`, `max_pixels` and `truncated` are `images.Policy`'s.
    """
    fail = on_failure or raise_failure
    pooling = Pooling.of(model, pool, layer=layer, norm=norm)
    policy = Policy(decode=decode, max_pixels=max_pixels, truncated=truncated)
    decoder = Decoder(processor, max_patches=max_patches, policy=policy)
    chunks = split_into_chunks(listed_files(paths, fail))
    yield from embeddings_of(embed_chunks(chunks, decoder, model, pooling, threads=threads), fail)


def embeddings_of(results: Iterable[Result], fail: OnFailure) -> Iterator[Embedding]:
    """The embeddings of chunks; notes are warnings, an image that cannot be read goes to `fail(path, reason)`."""
    for result in results:
        for path, note in result.notes:
            warnings.warn(f"{path} {note}", stacklevel=3)
        for path, reason in result.failures:
            fail(path, reason)
        yield from result.embeddings


def listed_files(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    fail: OnFailure,
    *,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
) -> list[str]:
    """The image files in files, folders and patterns: `exclude`, `include` are `find.Rules`.

    What is not an image goes to `fail`; empty folders and skipped files are warnings. Raises FileNotFoundError if
    there are no images at all.
    """
    listing = list_images(paths, exclude=exclude, include=include)
    listing.check_any()
    for path, reason in [*((missing, "does not exist") for missing in listing.missing), *listing.problems]:
        fail(path, reason)
    for path in listing.empty:
        warnings.warn(f"no images in {path}", stacklevel=3)
    if listing.skipped:
        warnings.warn(f"skipped: {counted(listing.skipped)}", stacklevel=3)
    return listing.files


@dataclass
class Result:
    """The result of a chunk: embeddings, and failures and notes as pairs (path, reason)."""

    embeddings: list[Embedding] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def packed(self) -> bytes:
        """All of it as bytes, for another process."""
        files = [vars(one) | {"sha256": one.sha256.hex(), "vector": None} for one in self.embeddings]
        head = json.dumps([files, self.failures, self.notes]).encode()
        # Each contiguous, because the library writes raw memory.
        vectors = {str(row): np.ascontiguousarray(one.vector, np.float32) for row, one in enumerate(self.embeddings)}
        return save(vectors | {"head": np.frombuffer(head, np.uint8)})

    @classmethod
    def unpacked(cls, data: bytes) -> Result:
        """The result that `packed` turned into these bytes."""
        arrays = load(data)
        files, *pairs = json.loads(arrays["head"].tobytes())
        for row, file in enumerate(files):
            file |= {"sha256": bytes.fromhex(file["sha256"]), "vector": arrays[str(row)]}
        return cls([Embedding(**file) for file in files], *([(path, why) for path, why in some] for some in pairs))


def embed_chunks(
    chunks: Iterable[Sequence[str]],
    decoder: Decoder,
    model: Aimv2VisionModel | Aimv2Model,
    pooling: Pooling,
    *,
    threads: int | None = None,
) -> Iterator[Result]:
    """The result for each chunk's images, chunk after chunk.

    Files that the decoder knows are hashed and not decoded: their Embedding has an empty vector. Notes are what is
    unusual about an image that is embedded all the same.
    """
    config = model.vision.config
    is_widest = model.dtype == mx.float32
    advice = "the model's weights are damaged (NaN or Inf)" if is_widest else "load the model as float32"

    def compute(levels: mx.array) -> dict[str, mx.array]:
        return {"features": pooling(model, decoder.processor.normalised(levels))}

    patch, tokens = config.patch_size, config.num_patches
    for chunk in run_ahead(chunks, decoder, compute, patch=patch, tokens=tokens, threads=threads):
        result = Result()
        for image, outputs in chunk:
            vector = outputs["features"] if outputs else NOTHING
            if image.note is not None:
                result.notes.append((image.path, image.note))
            if image.failure is not None:
                result.failures.append((image.path, image.failure))
            elif np.isfinite(vector).all():
                size, mtime_ns, ctime_ns, inode = image.marks
                file = (size, mtime_ns, image.sha256, vector, ctime_ns, inode, image.taken)
                result.embeddings.append(Embedding(image.path, *file))
            else:
                result.failures.append((image.path, f"gave values that are not finite: {advice}"))
        yield result


@dataclass(frozen=True)
class Settings:
    """The settings that affect the embeddings of a checkpoint; None stands for the default."""

    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    pool: str | None = None
    layer: int | None = None
    norm: bool = False
    max_patches: int | None = None
    image_size: int | None = None

    def filled(self, made: Mapping[str, Any]) -> Settings:
        """These settings, with those that made an index (`made_by`) where they are None."""
        names = ("dtype", "pool", "layer", "norm", "max_patches", "image_size")
        kept: dict[str, Any] = {name: made.get(name) for name in names}
        if self.model is None:
            kept |= {"model": made["checkpoint"], "revision": made["commit"]}
        given = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        return Settings(**(kept | given))


@dataclass(frozen=True)
class Embedder:
    """A model with its settings, which reads images according to `policy`."""

    loaded: Loaded
    pooling: Pooling
    max_patches: int = MAX_PATCHES
    policy: Policy = FAST

    @classmethod
    def load(cls, settings: Settings, policy: Policy = FAST) -> Embedder:
        """Loads the checkpoint. Raises ValueError for settings it does not support."""
        source = read_source(settings.model or "", revision=settings.revision, image_size=settings.image_size)
        loaded = source.load(dtype=settings.dtype)
        pooling = Pooling.of(loaded.model, settings.pool, layer=settings.layer, norm=settings.norm)
        return cls(loaded, pooling, settings.max_patches or MAX_PATCHES, policy)

    @cached_property
    def description(self) -> Description:
        """Everything that affects an embedding, in the JSON form that `cache.differences` compares.

        How JPEGs are decoded is recorded and never compared: it changes features less than float16 does.
        """
        model = self.loaded.model
        is_native = model.vision.config.num_patches is None
        return {
            **self.loaded.origin,
            **asdict(self.pooling),
            "width": self.pooling.width(model),
            "preprocessing": json.loads(json.dumps(asdict(self.loaded.processor.preprocessing))),
            "max_patches": self.max_patches if is_native else None,
            "image_size": self.loaded.source.image_size,
            "decode": self.policy.decode,
            "weights": fingerprint(model),
            "versions": {
                "mlx-aimv2": __version__,
                **{name: metadata.version(name) for name in ("mlx", "numpy", "pillow")},
            },
        }

    def __call__(
        self, chunks: Iterable[Sequence[str]], *, known: Known | None = None, threads: int | None = None
    ) -> Iterator[Result]:
        """What becomes of each chunk's images."""
        decoder = Decoder(self.loaded.processor, max_patches=self.max_patches, known=known, policy=self.policy)
        return embed_chunks(chunks, decoder, self.loaded.model, self.pooling, threads=threads)


def made_by(index: Index) -> Description:
    """What an index records about the model that made it, checked. Raises ValueError if that is missing."""
    made = index.provenance
    if "weights" not in made:
        raise ValueError(f"{index.path} does not record which model made it: use it from Python, with vectors")
    if made.get("width", index.width) != index.width:
        raise damaged(index.path, f"width {index.width:,}, but the model gives {made['width']:,}")
    if (name := misfit({"image_size": None, **made}, FIELDS)) is not None:  # earlier releases: only the own size
        raise damaged(index.path, f"it records {name} {made.get(name)!r} for the model that made it")
    if misfit(made["weights"], {"digest": str, "sample": list}):
        raise damaged(index.path, "it does not record the weights that made it")
    return made


def raise_failure(path: str, reason: str) -> None:
    """The default for failures: raises ValueError."""
    raise ValueError(f"{path} {reason}")
