"""Features of a frozen encoder, computed once for each image and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_aimv2.embed.cache import Array, Features, open_features
from mlx_aimv2.embed.encode import FAST, embed_chunks
from mlx_aimv2.embed.loader import Decoder, split_into_chunks
from mlx_aimv2.embed.pooling import Pooling
from mlx_aimv2.embed.provenance import fingerprint
from mlx_aimv2.files import cache_folder
from mlx_aimv2.learn.learner import grid_of
from mlx_aimv2.learn.samples import DataError, Sample
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.processor import Aimv2Processor

__all__ = ["Array", "Features", "compute_features"]

FORMAT = 1

KINDS: dict[str, np.dtype[Any]] = {"mean": np.dtype("<f4"), "tokens": np.dtype("<f2")}
"""What is kept of an image -> its numbers: the mean token (D,), or all tokens (N, D) in half the bytes."""


def compute_features(
    samples: Sequence[Sample],
    model: Aimv2VisionModel,
    processor: Aimv2Processor,
    *,
    kind: str,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """Features of every sample, from the cache where it has them: `samples -> Features`.

    `kind` is one of `KINDS`; `folder` is where caches lie. `advance` gets how many images are done. Raises OSError
    with one line where the disk is full; what was computed stays.
    """
    rows, columns = grid_of(processor)
    shape = (*(() if kind == "mean" else (rows * columns,)), model.config.hidden_size)
    own = (folder or cache_folder() / "features") / cache_key(model, processor, kind=kind)
    unique = {sample.sha256: sample.path for sample in samples}
    with open_features(own, shape, KINDS[kind], advice="choose another --cache; what was done is kept") as cache:
        missing = {sha256: path for sha256, path in unique.items() if sha256 not in cache.index}
        cache.reserve(len(missing))
        advance(len(unique) - len(missing))
        failed: list[str] = []
        decoder, chunks = Decoder(processor, policy=FAST), split_into_chunks(sorted(missing.values()))
        for result in embed_chunks(chunks, decoder, model, Pooling.of(model, kind)):
            cache.append((one.sha256, one.vector) for one in result.embeddings if one.sha256 in missing)
            failed += [f"{path} {reason}" for path, reason in result.failures]
            advance(len(result.embeddings))
        if failed:
            raise DataError(failed)
        if changed := [path for sha256, path in missing.items() if sha256 not in cache.index]:
            raise DataError([f"{path} was changed while it was read: run it again" for path in changed])
        return cache.features()


def cache_key(model: Aimv2VisionModel, processor: Aimv2Processor, *, kind: str, **more: Any) -> str:
    """A name that is the same for equal features alone; `more` is what else decides them."""
    decides = {
        "format": FORMAT,
        "kind": kind,
        "weights": fingerprint(model)["digest"],
        "dtype": str(model.dtype),
        "preprocessing": asdict(processor.preprocessing),
        **more,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:24]
