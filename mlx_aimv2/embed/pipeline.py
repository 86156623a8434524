"""How do many pictures become embeddings as fast as they can be decoded or encoded, whichever takes longer?

Threads read and decode ahead; one thread owns the model. Pictures of one patch grid go through the model together,
about 4096 tokens at a time, and none is padded. Files are taken in sheets of 32 consecutive names, and a batch never
crosses a sheet: which pictures meet in a batch depends on the list alone, not on where an earlier run was interrupted
or on how many Macs share the work, so the numbers come out the same to the last bit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_aimv2.embed.pooling import Pooling
from mlx_aimv2.embed.prefetch import MAX_PATCHES, Decoded, Decoder, Known
from mlx_aimv2.find_images import list_pictures, shown
from mlx_aimv2.index.reader import Embedding

if TYPE_CHECKING:
    from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel
    from mlx_aimv2.processor import Aimv2Processor

SHEET = 32
"""Consecutive names whose pictures may share a batch."""

BATCH_TOKENS = 4096
"""Tokens of one batch: 16, 8 or 4 pictures at 224, 336 or 448."""

IN_FLIGHT = 2
"""Batches that the device has been given and not finished: it computes one while the next is put together."""

OnFailure: TypeAlias = Callable[[str, str], None]
"""Called with a path and what is wrong with it, which continues a sentence that starts with the path."""

Batch: TypeAlias = tuple[mx.array, list[int]]
"""Features of a batch, and the places of its pictures in their sheet."""


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
    on_failure: OnFailure | None = None,
) -> Iterator[Embedding]:
    """Embeds files, folders and patterns one picture after another: `paths -> Embedding …`, sorted by name.

    `pool`, `layer` and `norm` are explained in `pooling.py`. For native checkpoints, pictures of more than
    `max_patches` are scaled down in their shape, and below 112 patches a warning is given. A picture that cannot be
    read raises ValueError, or is passed to `on_failure(path, reason)` and left out. `threads` decode, by default one
    for each core.
    """
    fail = on_failure or _raise
    pooling = Pooling.of(model, pool, layer=layer, norm=norm)
    listing = list_pictures(paths)
    for missing in listing.missing:
        fail(missing, "does not exist")
    for path, reason in listing.problems:
        fail(path, reason)
    sheets = sheets_of(listing.files)
    for sheet in embed_sheets(
        sheets, model, processor, pooling=pooling, max_patches=max_patches, threads=threads, on_failure=fail
    ):
        yield from sheet


def sheets_of(files: Sequence[str]) -> list[list[str]]:
    """Cuts a sorted list of names into sheets."""
    return [list(files[start : start + SHEET]) for start in range(0, len(files), SHEET)]


def embed_sheets(
    sheets: Sequence[Sequence[str]],
    model: Aimv2VisionModel | Aimv2Model,
    processor: Aimv2Processor,
    *,
    pooling: Pooling,
    max_patches: int = MAX_PATCHES,
    threads: int | None = None,
    on_failure: OnFailure | None = None,
    on_remark: OnFailure | None = None,
    known: Known | None = None,
) -> Iterator[list[Embedding]]:
    """Embeddings of each sheet's pictures, sheet after sheet; those that failed are left out.

    Files that are `known` are hashed and not decoded: their Embedding has a vector of no numbers. `on_remark` gets what
    is unusual about a picture that is embedded all the same; without it that is a warning.
    """
    fail, remark = on_failure or _raise, on_remark or _warn
    config = model.vision.config
    if max_patches < 1:
        raise ValueError(f"max_patches is a number of patches, at least 1; got {max_patches}")
    is_native = config.num_patches is None
    decoder = Decoder(processor, max_patches=max_patches if is_native else None, known=known)
    is_widest = model.dtype == mx.float32
    advice = "the model's weights are damaged (NaN or Inf)" if is_widest else "load the model as float32"
    threads = threads or os.cpu_count() or 1
    # Enough to feed the threads and the next two batches; a native picture may take ten megabytes.
    ahead = 2 * threads + min(SHEET, 2 * max(1, BATCH_TOKENS // (config.num_patches or BATCH_TOKENS // 8)))
    names = [name for sheet in sheets for name in sheet]
    with ThreadPoolExecutor(threads, "decode") as pool:
        try:
            decoded = decoder.ahead(names, pool, ahead)
            before: tuple[list[Decoded], list[Batch]] | None = None
            for sheet in sheets:
                now = _submitted((_told(next(decoded), fail, remark) for _ in sheet), model, pooling)
                if before is not None:  # read now that the device has more to do
                    yield _finished(*before, fail, advice)
                before = now
                if is_native:
                    mx.clear_cache()  # buffers of shapes that may not come again
            if before is not None:
                yield _finished(*before, fail, advice)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _told(picture: Decoded, fail: OnFailure, remark: OnFailure) -> Decoded:
    if picture.failure is not None:
        fail(picture.path, picture.failure)
    if picture.remark is not None:
        remark(picture.path, picture.remark)
    return picture


def _submitted(
    coming: Iterable[Decoded], model: Aimv2VisionModel | Aimv2Model, pooling: Pooling
) -> tuple[list[Decoded], list[Batch]]:
    """Gives a sheet's pictures to the device, those of one size together, a batch as soon as it is full."""
    patch = model.vision.config.patch_size
    pictures: list[Decoded] = []
    batches: list[Batch] = []
    groups: dict[tuple[int, ...], list[int]] = {}

    def submit(places: list[int]) -> None:
        features = pooling(model, mx.array(_stacked(pictures, places)))
        if len(batches) >= IN_FLIGHT:
            mx.eval(batches[-IN_FLIGHT][0])
        mx.async_eval(features)  # type: ignore[no-untyped-call]
        batches.append((features, places))

    for place, picture in enumerate(coming):
        pictures.append(picture)
        if picture.pixels is None:
            continue
        group = groups.setdefault(picture.pixels.shape, [])
        group.append(place)
        tokens = (picture.pixels.shape[0] // patch) * (picture.pixels.shape[1] // patch)
        if (len(group) + 1) * tokens > BATCH_TOKENS:
            submit(groups.pop(picture.pixels.shape))
    for group in groups.values():
        submit(group)
    return pictures, batches


def _stacked(pictures: list[Decoded], places: list[int]) -> np.ndarray[Any, Any]:
    """The pixels at these places as one array (B, H, W, 3), taken out so that they are freed."""
    arrays = [pictures[place].pixels for place in places]
    for place in places:
        pictures[place].pixels = None
    return np.stack([array for array in arrays if array is not None])


def _finished(pictures: list[Decoded], batches: list[Batch], fail: OnFailure, advice: str) -> list[Embedding]:
    """Reads a sheet's features from the device; pictures whose features are not finite fail."""
    vectors: dict[int, np.ndarray[Any, Any]] = {}
    for features, places in batches:
        vectors |= zip(places, np.array(features), strict=True)
    done = []
    for place, picture in enumerate(pictures):
        if picture.failure is not None:
            continue
        vector = vectors.get(place, np.empty(0, np.float32))
        if np.isfinite(vector).all():
            done.append(Embedding(picture.path, picture.size, picture.mtime_ns, picture.sha256, vector))
        else:
            fail(picture.path, f"gave numbers that are not finite: {advice}")
    return done


def _raise(path: str, reason: str) -> None:
    raise ValueError(f"{shown(path)} {reason}")


def _warn(path: str, remark: str) -> None:
    warnings.warn(f"{shown(path)} {remark}", stacklevel=4)
