"""Images with masks: a folder of images beside one of masks, or folders with the field's other names for them.

Every image needs a mask of the same name and size. Parts are folders around `images` and `masks` or within both.
Without `classes.txt`, whose first line is the class of the value 0, the values are their own names. The target of a
sample is what `read_mask` takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.files import read_text
from mlx_aimv2.images import open_image
from mlx_aimv2.images.find import Scan
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import dense, samples
from mlx_aimv2.learn.learner import canvas_size
from mlx_aimv2.learn.samples import DataError, Format, Found, Labels, Sample, Size, listed, same_form
from mlx_aimv2.plot import IGNORED
from mlx_aimv2.train.batches import Arrays

IMAGES = ("images", "img_dir", "JPEGImages", "image", "imgs")

MASKS = ("masks", "ann_dir", "SegmentationClass", "annotations", "labels", "mask")
"""Names of the two folders; the first are this package's, the others mmsegmentation's, PASCAL VOC's and ADE20K's."""

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")

CLASSES_FILE = "classes.txt"

MODES = ("1", "L", "P", "I", "I;16")
"""Pillow's modes in which a pixel is one number."""

Names: TypeAlias = "tuple[str, ...] | None"
"""The class of each value, from 0 on; None where the values are their own names."""

MaskTarget: TypeAlias = "str | tuple[str, tuple[tuple[int, int], ...]]"
"""The file of a mask whose values are the numbers of the classes; or the file, and pairs of a value and its class."""


def recognise(data: Path) -> str | None:
    """`images/ beside masks/` where DATA has masks, else None."""
    folders = samples.parts_of(data, Scan(), _holds).values() if data.is_dir() else ()
    pair = next((pair for folder in folders if (pair := _pair(folder)) is not None), None)
    return f"{pair[1].name}/ beside {pair[0].name}/" if pair else None


def read_mask(mask: MaskTarget) -> NDArray[Any]:
    """The classes of a mask's pixels, `-> (H, W) uint8`; raises ValueError or OSError with one line.

    Grey and palette images hold class numbers; white of a black and white image is class 1.
    """
    path, numbers = (mask, ()) if isinstance(mask, str) else mask
    image = open_image(path).image
    if image.mode not in MODES:
        raise ValueError(
            f"{path} has the colour mode {image.mode}; a mask holds one class number per pixel, as a grey or palette "
            "PNG does: save it so, not in colours"
        )
    try:
        values = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a mask: {error}") from None
    if values.max() > IGNORED:
        raise ValueError(
            f"{path} has the value {values.max()}: classes go from 0 to {IGNORED - 1}, {IGNORED} is ignored"
        )
    classes = np.arange(IGNORED + 1, dtype=np.uint8)
    for value, number in numbers:
        classes[value] = number
    return classes[values.astype(np.uint8)] if numbers else values.astype(np.uint8)


def _parts(data: Path, scan: Scan) -> dict[str, tuple[Path, Path]]:
    """Folders of images and masks by part; the part is empty where DATA says none."""
    around = samples.parts_of(data, scan, _holds)
    pairs = {part: pair for part, folder in around.items() if (pair := _pair(folder)) is not None}
    if "" not in pairs:
        return pairs
    images, masks = pairs[""]
    within = samples.parts_of(images, scan, lambda folder: (masks / folder.relative_to(images)).is_dir())
    return {part: (folder, masks / folder.relative_to(images)) for part, folder in within.items()}


def _holds(folder: Path) -> bool:
    return _pair(folder) is not None


def _pair(folder: Path) -> tuple[Path, Path] | None:
    images, masks = (
        next((folder / name for name in names if (folder / name).is_dir()), None) for names in (IMAGES, MASKS)
    )
    return (images, masks) if images and masks else None


def _find(data: Path, scan: Scan) -> Found:
    folders = _parts(data, scan)
    if not folders:
        raise DataError([f"{data} has no masks: put images in {data / IMAGES[0]} and their masks in {MASKS[0]}/"])
    names = _class_names(data)
    found = Found({}, list(names) if names else None)
    for part, (images, masks) in folders.items():
        found.parts[part] = [(image, (mask, names)) for image, mask in _pairs(images, masks, scan)]
        if not found.parts[part]:
            found.faults.append(f"no image in {images} has a mask of its name in {masks}")
    return found


def _pairs(images: Path, masks: Path, scan: Scan) -> list[tuple[str, str]]:
    """Images with the masks of the same name below the other folder; what has none or no image is left out."""
    by_stem = {
        Path(mask).relative_to(masks).with_suffix(""): mask
        for mask in scan.images(masks)
        if mask.lower().endswith(MASK_SUFFIXES)
    }
    pairs: list[tuple[str, str]] = []
    for image in scan.images(images):
        stem = Path(image).relative_to(images).with_suffix("")
        if (mask := by_stem.pop(stem, None)) is None:
            scan.note(image, f"has no mask of its name in {masks}: left out")
        else:
            pairs.append((image, mask))
    for mask in by_stem.values():
        scan.note(mask, f"has no image of its name in {images}: left out")
    return pairs


def _class_names(data: Path) -> Names:
    """The lines of `classes.txt`, None where there is no such file."""
    file = data / CLASSES_FILE
    if not file.is_file():
        return None
    names = [same_form(line) for line in read_text(file).splitlines() if line.strip()]
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError([f"{file} names {listed(duplicates)} twice"])
    return tuple(names)


def _labels(marked: Sequence[tuple[str, tuple[str, Names], Size]], scan: Scan) -> Iterator[Labels | list[str]]:
    with ThreadPoolExecutor(cpu_count() or 1, "masks") as pool:
        yield from pool.map(_labels_of_one, marked)


def _labels_of_one(marked: tuple[str, tuple[str, Names], Size]) -> Labels | list[str]:
    """The classes in a mask, each once, in the order of their values; or what is wrong with it."""
    _, (path, names), size = marked
    try:
        mask = read_mask(path)
    except (ValueError, OSError) as error:
        return [" ".join(str(error).split())]
    if mask.shape != size:
        return [
            f"{path} has {mask.shape[0]}x{mask.shape[1]} pixels (height x width), "
            f"its image {size[0]}x{size[1]}: they must be equal"
        ]
    values = [int(value) for value in np.unique(mask) if value != IGNORED]
    if names is not None and (unknown := [str(value) for value in values if value >= len(names)]):
        return [
            f"{path} has the value{'s' if len(unknown) > 1 else ''} {listed(unknown)}, "
            f"but {CLASSES_FILE} has {len(names)} lines, from 0 to {len(names) - 1} ({IGNORED} is ignored)"
        ]
    return Labels([names[value] if names else str(value) for value in values], (path, values))


def _target(labels: Labels, numbers: Mapping[str, int]) -> MaskTarget:
    path, values = labels.value
    pairs = tuple(zip(values, (numbers[name] for name in labels.names), strict=True))
    return path if all(value == number for value, number in pairs) else (path, pairs)


def _all_values(names: set[str]) -> list[str]:
    """Every value up to the highest, so that the numbers of the classes are the values."""
    return [str(value) for value in range(max(map(int, names), default=-1) + 1)]


read = partial(samples.read, form=Format(_find, _labels, _target, in_order=_all_values, stratified=False))


def targets(sample: Sample, processor: Aimv2Processor, place: dense.Placement | None = None) -> Arrays:
    """`mask` (H, W) uint8, unchanged or where `place` puts it; what lies outside the image is `IGNORED`."""
    from PIL import Image

    place = place or dense.plain(sample.size, canvas_size(processor))
    mask = Image.fromarray(read_mask(sample.target))
    return {"mask": np.asarray(place.draw(mask, fill=IGNORED, resample=Image.Resampling.NEAREST))}


example = partial(dense.example, targets)
