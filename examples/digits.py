"""Classifies the bundled digits by their nearest neighbours; `demo.py` and the maintainer scripts import it.

python -m examples.digits [--model MODEL]
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2 import Aimv2Processor, Aimv2VisionModel, bundled, load

BATCH = 256

Floats = NDArray[np.float32]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Classify held-out digits by their nearest training digits.")
    parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
    accuracy = digits_accuracy(*load(parser.parse_args(argv).model, dtype="auto"))
    print(f"a 5-nearest-neighbour vote classifies {accuracy:.2%} of the held-out digits correctly")


def encode(model: Aimv2VisionModel, processor: Aimv2Processor, images: NDArray[np.uint8]) -> Floats:
    """Features of unit length of many small images, batch by batch: `(n, H, W) -> (n, D)` float32."""
    batches = (list(images[start : start + BATCH]) for start in range(0, len(images), BATCH))
    return np.concatenate(
        [np.array(model.encode_image(processor(batch), normalize=True).astype(mx.float32)) for batch in batches]
    )


def digits_accuracy(model: Aimv2VisionModel, processor: Aimv2Processor, *, neighbours: int = 5) -> float:
    """The share of held-out digits whose nearest training digits vote for the correct class, from 0 to 1."""
    scans = bundled.digits()
    bank = encode(model, processor, scans.train_images)
    found = vote(bank, scans.train_labels, encode(model, processor, scans.test_images), neighbours=neighbours)
    return float((found == scans.test_labels).mean())


def vote(bank: Floats, labels: NDArray[Any], queries: Floats, *, neighbours: int = 5) -> NDArray[Any]:
    """The class that most of each query's nearest neighbours have: unit `(n, D), (n,), unit (m, D) -> (m,)`.

    Nearest by cosine; among classes with equally many votes the one of the nearest neighbour wins.
    """
    nearest = np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :neighbours]
    votes = labels[nearest]  # (m, neighbours), nearest first
    same = votes[:, :, None] == votes[:, None, :]
    return votes[np.arange(len(votes)), same.sum(axis=2).argmax(axis=1)]


if __name__ == "__main__":
    main()
