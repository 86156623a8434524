"""Folders of labelled digits that the tests of `mlx_aimv2.learn` share."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mlx_aimv2 import bundled, files
from mlx_aimv2.files import read_start
from mlx_aimv2.learn import fit, tables
from mlx_aimv2.learn.detect import formats
from mlx_aimv2.learn.tables import START
from tests.small_encoder import small_encoder

CHECKPOINT = small_encoder()


def write_digits(folder: Path, *, per_class: int = 12, classes: int = 3) -> Path:
    """A folder for each of the first digits with `per_class` of the training scans."""
    scans = bundled.digits()
    for label in range(classes):
        place = folder / f"digit {label}"
        place.mkdir(parents=True)
        for number, image in enumerate(scans.train_images[scans.train_labels == label][:per_class]):
            Image.fromarray(image).save(place / f"{number:03}.png")
    return folder


def nearest_labels(model: Any, processor: Any, scans: bundled.Digits) -> NDArray[Any]:
    """The label of the training scan that is most similar to each test scan: `-> (test,)`."""
    known, asked = (
        np.array(model.vision.encode_image(processor(list(images)), normalize=True).astype(mx.float32))
        for images in (scans.train_images, scans.test_images)
    )
    return scans.train_labels[(asked @ known.T).argmax(axis=1)]


class Read(Exception):
    """Ends `fit` where its data has been read."""


def whole_reads(data: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often `fit` reads each file that describes DATA, other than by its first bytes."""
    counted: Counter[str] = Counter()

    def counting(path: Path, *, max_bytes: int) -> bytes:
        if max_bytes != START:
            counted[str(path)] += 1
        return read_start(path, max_bytes=max_bytes)

    def stop(line: str) -> None:
        if re.match(r"\d+ labels?: ", line):
            raise Read

    for module in (files, tables, formats):
        monkeypatch.setattr(module, "read_start", counting)
    with pytest.raises(Read):
        fit(data, CHECKPOINT, output, say=stop)
    return counted
