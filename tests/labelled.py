"""Folders of labelled digits that the tests of `mlx_aimv2.learn` share."""

import re
from collections import Counter
from pathlib import Path

import pytest
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
