"""Writes the handwritten digits that ship in the package, from scikit-learn's copy: mlx_aimv2/assets/digits.npz.

python -m tools.make_digits        needs scikit-learn (extra `train`)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_aimv2 import bundled

TEST_SHARE = 1 / 3
"""Of each class, how much is held out."""


def main() -> None:
    write(bundled.ASSETS / "digits.npz")


def write(file: Path) -> None:
    """The scans as grey images with their labels and whether they are held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    labels = found.target.astype(np.uint8)
    ink = np.rint(found.images * 255 / 16).astype(np.uint8)  # 0 to 16 in the data
    _, held_out = train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=0)
    is_test = np.zeros(len(labels), bool)
    is_test[held_out] = True
    np.savez_compressed(file, images=255 - ink, labels=labels, is_test=is_test)


if __name__ == "__main__":
    main()
