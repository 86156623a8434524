"""Embeds many images as fast as they can be decoded or encoded, whichever takes longer.

Threads read and decode ahead; one thread owns the model. Images of one patch grid go through the model together,
about 4096 tokens at a time, and none is padded. Files are taken in chunks of 32 consecutive names, and a batch never
crosses a chunk: which images meet in a batch depends on the list alone, not on where an earlier run was interrupted
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
from mlx_aimv2.find_images import list_images
from mlx_aimv2.images import Policy
from mlx_aimv2.index.reader import Embedding

if TYPE_CHECKING:
    from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel
    from mlx_aimv2.processor import Aimv2Processor

CHUNK = 32
"""Consecutive names whose images may share a batch."""

BATCH_TOKENS = 4096
"""Tokens of one batch: 16, 8 or 4 images at 224, 336 or 448."""

IN_FLIGHT = 2
"""Batches that the device has been given and not finished: it computes one while the next is put together."""

FAST = Policy(decode="fast")

OnFailure: TypeAlias = Callable[[str, str], None]
"""Called with a path and what is wrong with it, which continues a sentence that starts with the path."""

Batch: TypeAlias = tuple[mx.array, list[int]]
"""Features of a batch, and the places of its images in their chunk."""


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
    truncated: str | None = None,
    on_failure: OnFailure | None = None,
) -> Iterator[Embedding]:
    """Embeds files, folders and patterns one image after another: `paths -> Embedding …`, sorted by name.

    `pool`, `layer` and `norm` are explained in `pooling.py`. For native checkpoints, images of more than
    `max_patches` are scaled down in their shape, and below 112 patches a warning is given. An image that cannot be
    read raises ValueError, or is passed to `on_failure(path, reason)` and left out. `threads` decode, by default one
    for each core; `decode`, `max_pixels` and `truncated` are `images.Policy`'s.
    """
    policy = Policy(decode=decode, max_pixels=max_pixels, truncated=truncated)
    fail = on_failure or _raise
    pooling = Pooling.of(model, pool, layer=layer, norm=norm)
    listing = list_images(paths)
    for missing in listing.missing:
        fail(missing, "does not exist")
    for path, reason in listing.problems:
        fail(path, reason)
    chunks = split_into_chunks(listing.files)
    for chunk in embed_chunks(
        chunks,
        model,
        processor,
        pooling=pooling,
        max_patches=max_patches,
        threads=threads,
        policy=policy,
        on_failure=fail,
    ):
        yield from chunk


def split_into_chunks(files: Sequence[str]) -> list[list[str]]:
    """Cuts a sorted list of names into chunks."""
    return [list(files[start : start + CHUNK]) for start in range(0, len(files), CHUNK)]


def embed_chunks(
    chunks: Sequence[Sequence[str]],
    model: Aimv2VisionModel | Aimv2Model,
    processor: Aimv2Processor,
    *,
    pooling: Pooling,
    max_patches: int = MAX_PATCHES,
    threads: int | None = None,
    policy: Policy = FAST,
    on_failure: OnFailure | None = None,
    on_note: OnFailure | None = None,
    known: Known | None = None,
) -> Iterator[list[Embedding]]:
    """Embeddings of each chunk's images, chunk after chunk; those that failed are left out.

    Files that are `known` are hashed and not decoded: their Embedding has a vector of no numbers. `on_note` gets what
    is unusual about an image that is embedded all the same; without it that is a warning.
    """
    fail, note = on_failure or _raise, on_note or _warn
    config = model.vision.config
    if max_patches < 1:
        raise ValueError(f"max_patches is a number of patches, at least 1; got {max_patches}")
    is_native = config.num_patches is None
    decoder = Decoder(processor, max_patches=max_patches if is_native else None, known=known, policy=policy)
    is_widest = model.dtype == mx.float32
    advice = "the model's weights are damaged (NaN or Inf)" if is_widest else "load the model as float32"
    threads = threads or os.cpu_count() or 1
    # Enough to feed the threads and the next two batches; a native image may take ten megabytes.
    ahead = 2 * threads + min(CHUNK, 2 * max(1, BATCH_TOKENS // (config.num_patches or BATCH_TOKENS // 8)))
    names = [name for chunk in chunks for name in chunk]
    pool = ThreadPoolExecutor(threads, "decode")
    wait = True
    try:
        decoded = decoder.ahead(names, pool, ahead)
        before: tuple[list[Decoded], list[Batch]] | None = None
        for chunk in chunks:
            now = _submitted((_told(next(decoded), fail, note) for _ in chunk), model, processor, pooling)
            if before is not None:  # read now that the device has more to do
                yield _finished(*before, fail, advice)
            before = now
            if is_native:
                mx.clear_cache()  # buffers of shapes that may not come again
        if before is not None:
            yield _finished(*before, fail, advice)
    except KeyboardInterrupt:
        wait = False  # whoever stops the run does not wait for a slow decoder
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


def _told(image: Decoded, fail: OnFailure, note: OnFailure) -> Decoded:
    if image.failure is not None:
        fail(image.path, image.failure)
    if image.note is not None:
        note(image.path, image.note)
    return image


def _submitted(
    coming: Iterable[Decoded], model: Aimv2VisionModel | Aimv2Model, processor: Aimv2Processor, pooling: Pooling
) -> tuple[list[Decoded], list[Batch]]:
    """Gives a chunk's images to the device, those of one size together, a batch as soon as it is full."""
    patch = model.vision.config.patch_size
    images: list[Decoded] = []
    batches: list[Batch] = []
    groups: dict[tuple[int, ...], list[int]] = {}

    def submit(places: list[int]) -> None:
        # One byte a level goes to the device, a quarter of what the pixels made of it there would take.
        features = pooling(model, processor.normalised(mx.array(_stacked(images, places))))
        if len(batches) >= IN_FLIGHT:
            mx.eval(batches[-IN_FLIGHT][0])
        mx.async_eval(features)  # type: ignore[no-untyped-call]
        batches.append((features, places))

    for place, image in enumerate(coming):
        images.append(image)
        if image.levels is None:
            continue
        group = groups.setdefault(image.levels.shape, [])
        group.append(place)
        tokens = (image.levels.shape[0] // patch) * (image.levels.shape[1] // patch)
        if (len(group) + 1) * tokens > BATCH_TOKENS:
            submit(groups.pop(image.levels.shape))
    for group in groups.values():
        submit(group)
    return images, batches


def _stacked(images: list[Decoded], places: list[int]) -> np.ndarray[Any, Any]:
    """The levels at these places as one array (B, H, W, 3), taken out so that they are freed."""
    arrays = [images[place].levels for place in places]
    for place in places:
        images[place].levels = None
    return np.stack([array for array in arrays if array is not None])


def _finished(images: list[Decoded], batches: list[Batch], fail: OnFailure, advice: str) -> list[Embedding]:
    """Reads a chunk's features from the device; images whose features are not finite fail."""
    vectors: dict[int, np.ndarray[Any, Any]] = {}
    for features, places in batches:
        vectors |= zip(places, np.array(features), strict=True)
    done = []
    for place, image in enumerate(images):
        if image.failure is not None:
            continue
        vector = vectors.get(place, np.empty(0, np.float32))
        if np.isfinite(vector).all():
            done.append(Embedding(image.path, image.size, image.mtime_ns, image.sha256, vector))
        else:
            fail(image.path, f"gave numbers that are not finite: {advice}")
    return done


def _raise(path: str, reason: str) -> None:
    raise ValueError(f"{path} {reason}")


def _warn(path: str, note: str) -> None:
    warnings.warn(f"{path} {note}", stacklevel=4)
