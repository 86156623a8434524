"""What ships inside the package: a small image-text pair of encoders, 300 emoji, photographs, digits.

With these the whole path, from a foreign checkpoint to features of images, runs offline on any machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ASSETS = Path(__file__).parent / "assets"


class Digits(NamedTuple):
    """Scans of handwritten digits, dark ink on white paper: images (n, 8, 8) of grey levels, labels (n,) from 0 to 9.

    None of the bundled models was trained on them. The parts were drawn at random per digit, so most of the 13 writers
    occur in both.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def photographs() -> list[Path]:
    """Four free photographs (credits in `assets/CREDITS.md`): an astronaut, a cat, a cup of coffee, a rocket."""
    return sorted((ASSETS / "photographs").glob("*.jpg"))


def emoji_checkpoint() -> Path:
    """The folder of a small image encoder and its text encoder, in the layout of Apple's own releases.

    Pre-trained and tuned on emoji by `make train`, never on the style of `emoji_images`.
    """
    return ASSETS / "emoji"


def digits() -> Digits:
    """The scans, as the processor takes them."""
    with np.load(ASSETS / "digits.npz") as file:
        images, labels, held_out = file["images"], file["labels"], file["is_test"]
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def emoji_images() -> dict[Path, str]:
    """300 emoji, 84 x 84 pixels on white, in the order of their names: `{file: name}`.

    None of the bundled models was trained on their style, Noto's.
    """
    folder = ASSETS / "noto"
    rows = map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return {folder / row["file_name"]: row["text"] for row in rows}
