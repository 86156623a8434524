"""The frozen trunk's features of images and random crops of them, computed once and kept on disk in half precision."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_aimv2.embed.cache import Array, Features, open_features
from mlx_aimv2.embed.loader import CHUNK, DECODING_BYTES, Budget, run_ahead
from mlx_aimv2.image_array import Levels
from mlx_aimv2.image_file import read_image_file
from mlx_aimv2.images import open_image
from mlx_aimv2.learn.features import KINDS, cache_key
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.augment import Augmentation
from mlx_aimv2.pretrain.captioned import Data, Example
from mlx_aimv2.processor import Aimv2Processor

REPORT_EVERY = 1024
"""Images between two lines that say how far it is."""


@dataclass(frozen=True)
class CaptionedFeatures:
    """The captions of n images, and the features of each image's views, whose keys are `keys`."""

    features: Features
    keys: list[list[bytes]]
    texts: list[tuple[str, ...]]

    def take(self, images: Sequence[int], views: Sequence[int]) -> Array:
        """A view of each of these images, `(n,), (n,) -> (n, N, D)` float32."""
        return self.features.take([self.keys[image][view] for image, view in zip(images, views, strict=True)])


@dataclass
class _Views:
    """An example with its views' levels (views, H, W, 3), None where their features are known, or with a failure."""

    example: Example
    keys: list[bytes]
    levels: Levels | None = None
    failure: str | None = None
    note: str | None = None


def cache_features(
    model: Aimv2VisionModel,
    processor: Aimv2Processor,
    data: Data,
    folder: Path,
    *,
    views: int,
    augmentation: Augmentation,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> CaptionedFeatures:
    """The trunk's last hidden states of every image, as it is and in `views - 1` random crops.

    An image that cannot be read is passed over with a note. Raises OSError where the disk has no room for them.
    """
    size, tokens = model.config.image_size, model.config.num_patches
    if size is None or tokens is None:
        raise ValueError("LiT tuning keeps features of equal length; this encoder takes images of any size")
    own = folder / cache_key(model, processor, kind="tokens", augmentation=asdict(augmentation), seed=seed)
    shape, budget = (tokens, model.config.hidden_size), Budget(DECODING_BYTES)
    keys: list[list[bytes]] = []
    texts: list[tuple[str, ...]] = []

    def prepare(example: Example) -> _Views:
        found = _Views(example, [])
        try:
            data = example.image if isinstance(example.image, bytes) else read_image_file(example.image)[1]
            digest = hashlib.sha256(data).digest()
            found.keys = [_key(digest, view) for view in range(views)]
            if all(key in cache.index for key in found.keys):
                return found
            opened = open_image(data, name=example.name)
            rng = np.random.default_rng([seed, 2, *np.frombuffer(digest, np.uint32).tolist()])
            with budget.take(opened.decoding_bytes()):
                image, _ = opened.rgb()
            images = [image, *(augmentation(image, (size, size), rng) for _ in range(views - 1))]
            found.levels = np.stack([processor.levels(open_image(one)) for one in images])
            found.note = "; ".join(opened.notes) or None
        except Exception as error:  # decoders raise whatever they meet, and one file must not end the run
            found.failure = " ".join((str(error) or type(error).__name__).split())
        return found

    def compute(levels: mx.array) -> dict[str, mx.array]:
        features = model(processor.normalised(levels.flatten(0, 1))).last_hidden_state
        return {"features": features.reshape(levels.shape[0], views, *shape)}

    with open_features(own, shape, KINDS["tokens"], advice="take fewer --views") as cache:
        count = sum(1 for _ in data.epoch(None))
        cache.reserve(count * views - len(cache.index))
        chunks = _chunks(data.epoch(None))
        for chunk in run_ahead(chunks, prepare, compute, patch=model.config.patch_size, tokens=views * tokens):
            for image, outputs in chunk:
                if image.failure is not None or image.note is not None:
                    passed = "; passed over" if image.failure is not None else ""
                    warnings.warn(f"{_named(image)}{passed}", stacklevel=2)
                if image.failure is not None:
                    continue
                if outputs is not None:
                    cache.append(zip(image.keys, outputs["features"], strict=True))
                keys.append(image.keys)
                texts.append(image.example.texts)
                if len(texts) % REPORT_EVERY == 0:
                    report(f"features of {len(texts):,} of {count:,} images")
        report(f"features of {len(texts):,} of {count:,} images")
        return CaptionedFeatures(cache.features(), keys, texts)


def _key(digest: bytes, view: int) -> bytes:
    """The key of a view of the image with this SHA-256: its own for the image as it is, the first view."""
    return hashlib.sha256(digest + view.to_bytes(4, "little")).digest() if view else digest


def _named(image: _Views) -> str:
    """What is wrong with an image or unusual about it, with its name."""
    text = image.failure or image.note or ""
    return text if image.example.name in text else f"{image.example.name} {text}"


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    examples = iter(examples)
    while chunk := list(islice(examples, CHUNK)):
        yield chunk
