"""The frozen trunk's features of images and random crops of them, computed once and kept on disk in half precision."""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_aimv2.embed.cache import KINDS, Array, Features, cache_key, open_features
from mlx_aimv2.embed.loader import CHUNK, Decoded, Decoder, Known, run_ahead
from mlx_aimv2.images import OpenImage, open_image
from mlx_aimv2.images.pixels import Levels
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.captioned import Data, Example
from mlx_aimv2.train.augment import Augmentation

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
        rows = [self.features[self.keys[image][view]] for image, view in zip(images, views, strict=True)]
        return np.asarray(rows, np.float32)


class Views(Decoder):
    """Turns a file into the levels of the image as it is and of random crops, (views, H, W, 3)."""

    def __init__(
        self, processor: Aimv2Processor, views: int, augmentation: Augmentation, *, seed: int, known: Known
    ) -> None:
        """The crops of an image are drawn from `seed` and its content, so that equal images have equal ones."""
        super().__init__(processor, known=known)
        self.views, self.augmentation, self.seed = views, augmentation, seed

    def example(self, example: Example) -> Decoded:
        """An example's image; any thread may call it."""
        image = example.image
        return self.content(example.name, image) if isinstance(image, bytes) else self(str(image))

    def levels(self, opened: OpenImage, sha256: bytes) -> Levels:
        size = self.processor.preprocessing.final_size or (0, 0)
        rng = np.random.default_rng([self.seed, 2, *np.frombuffer(sha256, "<u4").tolist()])
        image, _ = opened.rgb()
        images = [image, *(self.augmentation(image, size, rng) for _ in range(self.views - 1))]
        return np.stack([self.processor.levels(open_image(one)) for one in images])


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
    tokens = model.config.num_patches
    if tokens is None:
        raise ValueError("LiT tuning keeps features of equal length; this encoder takes images of any size")
    own = folder / cache_key(model, processor, kind="tokens", augmentation=asdict(augmentation), seed=seed)
    shape = (tokens, model.config.hidden_size)
    captions: deque[tuple[str, ...]] = deque()  # of the images that are being prepared

    def chunks() -> Iterator[list[Example]]:
        examples = data.epoch(None)
        while chunk := list(islice(examples, CHUNK)):
            captions.extend(example.texts for example in chunk)
            yield chunk

    def compute(levels: mx.array) -> dict[str, mx.array]:
        features = model(processor.normalised(levels.flatten(0, 1))).last_hidden_state
        return {"features": features.reshape(levels.shape[0], views, *shape)}

    with open_features(own, shape, KINDS["tokens"], advice="take fewer --views") as cache:
        count = sum(1 for _ in data.epoch(None))
        cache.reserve(count * views - len(cache.index))
        decoder = Views(
            processor,
            views,
            augmentation,
            seed=seed,
            known=lambda name, digest: all(key in cache.index for key in _keys(digest, views)),
        )
        keys: list[list[bytes]] = []
        texts: list[tuple[str, ...]] = []
        for chunk in run_ahead(
            chunks(), decoder.example, compute, patch=model.config.patch_size, tokens=views * tokens
        ):
            rows: list[tuple[bytes, Array]] = []
            for image, outputs in chunk:
                own_texts, own_keys = captions.popleft(), _keys(image.sha256, views)
                if image.failure is not None:
                    warnings.warn(f"{image.path} {image.failure}; passed over", stacklevel=2)
                    continue
                if image.note is not None:
                    warnings.warn(f"{image.path} {image.note}", stacklevel=2)
                rows += zip(own_keys, outputs["features"], strict=True) if outputs is not None else ()
                keys.append(own_keys)
                texts.append(own_texts)
                if len(texts) % REPORT_EVERY == 0:
                    report(f"features of {len(texts):,} of {count:,} images")
            cache.append(rows)
        report(f"features of {len(texts):,} of {count:,} images")
        return CaptionedFeatures(cache.features(), keys, texts)


def _keys(digest: bytes, views: int) -> list[bytes]:
    """The key of each view of the image with this SHA-256: its own for the image as it is, the first one."""
    return [digest, *(hashlib.sha256(digest + view.to_bytes(4, "little")).digest() for view in range(1, views))]
