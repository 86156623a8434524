"""Folders of labelled digits that the tests of `mlx_aimv2.learn` share."""

from pathlib import Path

from PIL import Image

from mlx_aimv2 import bundled
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
