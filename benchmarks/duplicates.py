"""Measures how many planted copies of images `mlx-aimv2 duplicates` finds, and whether it takes different ones for one.

python -m benchmarks.duplicates FOLDER [-m MODEL] [--of 3]

Of each image below FOLDER, or of every third, eleven copies are made: five sizes, three qualities, two crops, noise.
Prints how many copies are in the group of their image, and how many groups hold copies of several.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_aimv2.bundled import emoji_checkpoint
from mlx_aimv2.embed.encode import Settings
from mlx_aimv2.embed.job import Options, update_index
from mlx_aimv2.images import to_rgb
from mlx_aimv2.images.find import list_images
from mlx_aimv2.index.duplicates import find_duplicates
from mlx_aimv2.index.reader import Index

SMALLEST = 32
"""Pixels on the shorter side below which a copy is counted apart: little of its image is left."""


def resized(image: Image.Image, share: float) -> Image.Image:
    """An image at a share of its size, at least 8 pixels wide and high."""
    width, height = (max(8, round(share * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """An image without these shares of its sides."""
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An image with noise of 8 grey levels."""
    levels = np.asarray(image, np.float32) + rng.normal(0, 8, (*image.size[::-1], 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


COPIES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    **{
        f"size {share}.png": lambda image, rng, share=share: resized(image, share)
        for share in (0.25, 0.5, 0.75, 1.5, 2)
    },
    **{f"quality {quality}.jpg": lambda image, rng: image for quality in (30, 60, 85)},
    "crop of up to 3 %.png": lambda image, rng: cropped(image, *rng.uniform(0, 0.03, 4)),
    "crop of 3 % on each side.png": lambda image, rng: cropped(image, 0.03, 0.03, 0.03, 0.03),
    "noise.png": noisy,
}
"""Name of a copy's file -> how it is made."""


def plant(images: list[str], folder: Path) -> None:
    """Writes a folder for each image, with it and its copies."""
    rng = np.random.default_rng(0)
    for number, path in enumerate(images):
        place = folder / f"{number:05d}"
        place.mkdir(parents=True)
        image = to_rgb(path)
        image.save(place / "image.png")
        for name, copy in COPIES.items():
            quality = {"quality": int(name.split()[1].split(".")[0])} if name.startswith("quality") else {}
            copy(image, rng).save(place / name, **quality)


def main() -> None:
    """Plants copies, embeds them and looks for them."""
    parser = argparse.ArgumentParser(description="Finds planted copies of images.")
    parser.add_argument("folder")
    parser.add_argument("-m", "--model", default=str(emoji_checkpoint()))
    parser.add_argument("--of", type=int, default=1, metavar="N", help="take every Nth image")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        plant(list_images([arguments.folder]).files[:: arguments.of], place / "images")
        update_index([str(place / "images")], place / "images.db", Settings(arguments.model, dtype="auto"), Options())
        started = time.perf_counter()
        with Index.open(place / "images.db") as index:
            groups, _ = find_duplicates(index)
            paths = list(index.paths())
        seconds = time.perf_counter() - started
        group_of = {one.path: number for number, group in enumerate(groups) for one in group.members}
        print(f"{len(paths):,} images in {seconds:,.0f} s; copies in the group of their image:")
        found = {True: [0, 0], False: [0, 0]}
        for name in sorted(COPIES):
            row = {True: [0, 0], False: [0, 0]}
            for path in (path for path in paths if Path(path).name == name):
                with Image.open(path) as image:
                    is_small = min(image.size) < SMALLEST
                original = group_of.get(str(Path(path).with_name("image.png")), -1)
                for counts in (row, found):
                    counts[is_small][0] += group_of.get(path) == original
                    counts[is_small][1] += 1
            (right, count), (right_small, count_small) = row[False], row[True]
            print(f"  {name:30} {right:6,} of {count:6,}, smaller ones {right_small:,} of {count_small:,}")
        for is_small, (right, count) in found.items():
            size = "below" if is_small else "from"
            print(f"{size} {SMALLEST} pixels: {right:,} of {count:,}, {right / max(1, count):.4f}")
        mixed = [sorted({Path(one.path).parent.name for one in group.members}) for group in groups]
        mixed = [names for names in mixed if len(names) > 1]
        print(f"groups of several images: {len(mixed)}: {'; '.join(' '.join(names) for names in mixed)}")


if __name__ == "__main__":
    main()
