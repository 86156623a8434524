"""Reads images with masks: a folder of images beside one of masks, or folders with the field's other names for them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.files import read_image_file, read_text
from mlx_aimv2.learn.data import (
    SPLITS,
    DataError,
    Dataset,
    Sample,
    check_images,
    image_size,
    images_in,
    listed,
    one_image,
    split,
    straddling,
    without_val,
)
from mlx_aimv2.learn.metrics import IGNORED

IMAGES = ("images", "img_dir", "JPEGImages", "image", "imgs")
MASKS = ("masks", "ann_dir", "SegmentationClass", "annotations", "labels", "mask")
"""Names of the two folders; the first are this package's, the others mmsegmentation's, PASCAL VOC's and ADE20K's."""

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")

CLASSES_FILE = "classes.txt"

MODES = ("1", "L", "P", "I", "I;16")
"""Pillow's modes in which a pixel is one number."""


def recognise(data: Path) -> str | None:
    """`images/ beside masks/` where DATA has masks, else None."""
    if not data.is_dir():
        return None
    for folder in [data, *(data / name for name in _names(data) if name.lower() in SPLITS)]:
        pair = _pair(folder)
        if pair is not None:
            return f"{pair[1].name}/ beside {pair[0].name}/"
    return None


def read(data: Path, *, classes: Sequence[str] | None = None) -> Dataset:
    """DATA read and checked: every image needs a mask of the same name and size; DataError lists all that is wrong.

    Parts are folders around `images` and `masks` or within both; where there are none, images are split by content.
    Classes are the lines of `classes.txt`, the first for the value 0; without it the values are their own names.
    """
    found = _parts(data)
    if not found:
        raise DataError([f"{data} has no masks: put images in {data / IMAGES[0]} and their masks in {MASKS[0]}/"])
    wrong: list[str] = []
    pairs = {part: _pairs(*folders, wrong) for part, folders in found.items()}
    hashes, unreadable = check_images([image for part in pairs.values() for image, _ in part])
    wrong += unreadable
    values: Counter[int] = Counter()
    names = _class_names(data) if classes is None else list(classes)
    for part in pairs.values():
        readable = [pair for pair in part if pair[0] in hashes]
        with ThreadPoolExecutor(cpu_count() or 1, "masks") as pool:
            for pair, result in zip(readable, pool.map(_values, readable), strict=True):
                if isinstance(result, str):
                    wrong.append(result)
                    continue
                values.update(result)
                if names is not None and (unknown := [v for v in result if v >= len(names)]):
                    where = "classes" if classes is not None else CLASSES_FILE
                    wrong.append(
                        f"{pair[1]} has the value{'s' if len(unknown) > 1 else ''} {listed(map(str, unknown))}, "
                        f"but {where} has {len(names)} lines, from 0 to {len(names) - 1} ({IGNORED} is ignored)"
                    )
    if not wrong and not values:
        wrong.append(f"{data}: no pixel of the masks is labelled, all are {IGNORED}")
    if not wrong and classes is None and len(values) == 1:
        wrong.append(f"{data}: all masks have one value, {next(iter(values))}: two classes are the least")
    if wrong:
        raise DataError(wrong)
    names = names or [str(value) for value in range(max(values) + 1)]
    return _dataset(pairs, hashes, names)


def _dataset(pairs: dict[str, list[tuple[str, str]]], hashes: dict[str, bytes], names: list[str]) -> Dataset:
    samples = {part: [Sample(image, hashes[image], mask) for image, mask in found] for part, found in pairs.items()}
    if set(samples) == {""}:
        splits = split(samples[""], [0] * len(samples[""]))
        counts = ", ".join(f"{len(splits[part]):,} {part}" for part in splits)
        note = f"{one_image(len(samples['']))}, split by content: {counts}"
    else:
        splits = {part: samples.get(part, []) for part in ("train", "val", "test")}
        if wrong := straddling(splits):
            raise DataError(wrong)
        note = ""
        if splits["train"] and not splits["val"]:
            splits["train"], splits["val"] = without_val(splits["train"], [0] * len(splits["train"]))
            note = f"{one_image(len(splits['val']))} of train serve as val"
    return Dataset("segment", tuple(names), splits, (note,) if note else ())


def read_mask(path: str) -> NDArray[Any]:
    """The values of a mask, `-> (H, W) uint8`; raises ValueError or OSError with one line.

    Grey and palette images hold class numbers; white of a black and white image is class 1.
    """
    from PIL import Image

    try:
        _, data = read_image_file(path)
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in MODES:
                raise ValueError(
                    f"{path} has the colour mode {image.mode}; a mask holds one class number per pixel, as a "
                    "grey or palette PNG does: save it so, not in colours"
                )
            values = np.asarray(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a mask: {error}") from None
    if values.max() > IGNORED:
        raise ValueError(f"{path} has the value {values.max()}: classes go from 0 to 254, {IGNORED} is ignored")
    return values.astype(np.uint8)


def _values(pair: tuple[str, str]) -> list[int] | str:
    """The classes of a mask, ascending; or what is wrong with it."""
    try:
        mask, size = read_mask(pair[1]), image_size(pair[0])
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    if mask.shape != size:
        return (
            f"{pair[1]} has {mask.shape[0]}x{mask.shape[1]} pixels (height x width), "
            f"its image {size[0]}x{size[1]}: they must be equal"
        )
    return [int(value) for value in np.unique(mask) if value != IGNORED]


def _parts(data: Path) -> dict[str, tuple[Path, Path]]:
    """Folders of images and masks by part; the part is empty where DATA says none."""
    around = {SPLITS[name.lower()]: _pair(data / name) for name in _names(data) if name.lower() in SPLITS}
    if found := {part: pair for part, pair in around.items() if pair is not None}:
        return found
    pair = _pair(data)
    if pair is None:
        return {}
    within = {
        SPLITS[name.lower()]: (pair[0] / name, pair[1] / name)
        for name in _names(pair[0])
        if name.lower() in SPLITS and (pair[1] / name).is_dir()
    }
    return within or {"": pair}


def _pair(folder: Path) -> tuple[Path, Path] | None:
    names = _names(folder)
    images, masks = (next((name for name in known if name in names), None) for known in (IMAGES, MASKS))
    return (folder / images, folder / masks) if images and masks else None


def _names(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _pairs(images: Path, masks: Path, wrong: list[str]) -> list[tuple[str, str]]:
    """Images with the masks of the same name below the other folder; what has none or no image is wrong."""
    by_stem: dict[Path, Path] = {}
    for mask in sorted(masks.rglob("*")):
        if mask.suffix.lower() in MASK_SUFFIXES and not mask.name.startswith("."):
            by_stem[mask.relative_to(masks).with_suffix("")] = mask
    pairs, missing = [], Path()
    for image in images_in(images):
        stem = Path(image).relative_to(images).with_suffix("")
        if (mask := by_stem.pop(stem, missing)) is missing:
            wrong.append(f"{image} has no mask: {masks / stem.with_suffix('.png')} does not exist")
        else:
            pairs.append((image, str(mask)))
    wrong += [f"{mask!s} has no image in {images!s}" for mask in by_stem.values()]
    return pairs


def _class_names(data: Path) -> list[str] | None:
    """The lines of `classes.txt`, None where there is no such file."""
    file = data / CLASSES_FILE
    if not file.is_file():
        return None
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if double := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError([f"{file} names {listed(double)} twice"])
    return names
