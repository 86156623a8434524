"""What ships inside the package: four photographs, 1,797 handwritten digits and a small encoder trained on them.

With these the whole path, foreign checkpoint to features of images, runs offline on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from mlx_aimv2.loading import AnyModel
    from mlx_aimv2.processor import Aimv2Processor

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

ASSETS = Path(__file__).parent / "assets"

BATCH = 256


@dataclass(frozen=True)
class Digits:
    """Scans of handwritten digits, dark ink on white paper: images (n, 8, 8) of grey levels, labels (n,) from 0 to 9.

    The encoder that ships was trained on the training part alone. The parts were drawn at random per digit, so most of
    the 13 writers occur in both.
    """

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes


def photographs() -> list[Path]:
    """Four free photographs (credits in `assets/CREDITS.md`): an astronaut, a cat, a cup of coffee, a rocket."""
    return sorted((ASSETS / "photographs").glob("*.jpg"))


def digits_checkpoint() -> Path:
    """The folder of the small encoder trained on `digits`, in the layout of Apple's own releases."""
    return ASSETS / "digits"


def digits() -> Digits:
    """The scans, as the processor takes them."""
    with np.load(ASSETS / "digits.npz") as file:
        images, labels, held_out = file["images"], file["labels"], file["is_test"]
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def encode(model: AnyModel, processor: Aimv2Processor, images: Bytes) -> Floats:
    """Features of unit length of many small images, batch by batch: `(n, H, W) -> (n, D)` float32."""
    import mlx.core as mx

    batches = (list(images[start : start + BATCH]) for start in range(0, len(images), BATCH))
    return np.concatenate(
        [np.array(model.encode_image(processor(batch), normalize=True).astype(mx.float32)) for batch in batches]
    )


def digits_accuracy(model: AnyModel, processor: Aimv2Processor, *, neighbours: int = 5) -> float:
    """The share of held-out digits whose nearest training digits vote for the right class, from 0 to 1."""
    scans = digits()
    bank = encode(model, processor, scans.train_images)
    found = vote(bank, scans.train_labels, encode(model, processor, scans.test_images), neighbours=neighbours)
    return float((found == scans.test_labels).mean())


def vote(bank: Floats, labels: Bytes, queries: Floats, *, neighbours: int = 5) -> Bytes:
    """The class that most of each query's nearest neighbours have: unit `(n, D), (n,), unit (m, D) -> (m,)`.

    Nearest by cosine; among classes with equally many votes the one of the nearest neighbour wins.
    """
    nearest = np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :neighbours]
    votes = labels[nearest]  # (m, neighbours), nearest first
    same = votes[:, :, None] == votes[:, None, :]
    return votes[np.arange(len(votes)), same.sum(axis=2).argmax(axis=1)]
