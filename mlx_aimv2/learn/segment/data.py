"""Images with masks: a folder of images beside one of masks, the field's other names for them, or one folder for both.

Every image needs a mask of its name, or with an ending such as `_mask`, and of its size. Parts are folders around
`images` and `masks` or within both, or VOC's ImageSets. Without `classes.txt`, Roboflow's `_classes.csv` or CVAT's
`labelmap.txt` the values are their own names. The target of a sample is what `read_mask` takes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_aimv2.images import open_image
from mlx_aimv2.images.find import Scan
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import dense, samples
from mlx_aimv2.learn.samples import DataError, Format, Found, Labels, Recognised, Sample, Size, listed, same_form
from mlx_aimv2.learn.tables import not_read
from mlx_aimv2.plot import IGNORED
from mlx_aimv2.train.batches import Arrays

MASKS = ("masks", "ann_dir", "SegmentationClass", "SegmentationClassPNG", "gtFine", "annotations", "labels", "mask")
"""Names of the folder of masks; the first is ours, the others mmsegmentation's, VOC's, Cityscapes' and ADE20K's."""

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")

CLASSES_FILE, CLASSES_TABLE, COLOURS_FILE = "classes.txt", "_classes.csv", "labelmap.txt"
"""Our list of the classes' names, a line each from the value 0 on, Roboflow's table of values and names, and CVAT's of
names and colours."""

COLOUR = 1 << 24
"""Added to a colour, 0xRRGGBB, where it stands for a class: so that black is not the value 0."""

MAX_UNNAMED = 32
"""Values without names in a mask that has 255 too: images of many classes, as ADE20K's or COCO-Stuff's, have fewer."""

MODES = ("1", "L", "P", "I", "I;16")
"""Pillow's modes in which a pixel is one number."""

Names: TypeAlias = "dict[int, str] | None"
"""The class of each value; None where the values are their own names."""

MaskTarget: TypeAlias = "str | tuple[str, tuple[tuple[int, int], ...]]"
"""The file of a mask whose values are the numbers of the classes; or the file, and pairs of a value and its class."""


def recognise(data: Path) -> Recognised | None:
    """`masks/ beside images/` where DATA has masks, else None."""
    folders = _folders(data, scan := Scan())
    for images, masks in folders.values():
        beside = f" beside {images.name}/" if images != masks else ""
        return Recognised(f"masks in {masks.name}/{beside}", scan, folders)
    return None


def read_mask(mask: MaskTarget) -> NDArray[Any]:
    """The classes of a mask's pixels, `-> (H, W) uint8`; raises ValueError or OSError with one line.

    DataError, a ValueError too, means that the mask can be read and holds something else. Grey and palette images hold
    class numbers; white of a black and white image is class 1.
    """
    path, numbers = (mask, ()) if isinstance(mask, str) else mask
    values = _values(path, in_colours=any(value >= COLOUR for value, _ in numbers))
    classes: NDArray[Any] = values.astype(np.uint8)
    for value, number in numbers:
        classes[values == value] = number
    return classes


def _values(path: str, *, in_colours: bool) -> NDArray[Any]:
    """A mask's pixels as they are, `-> (H, W)`, or each `COLOUR` + its colour; errors as `read_mask`."""
    image = open_image(path).image
    if not in_colours and image.mode not in MODES:
        fault = f"{path} has the colour mode {image.mode}; a mask holds one class number per pixel"
        raise DataError([f"{fault}, as a grey or palette PNG does: save it so, not in colours"])
    try:
        values = np.asarray(image.convert("RGB") if in_colours else image)
    except Exception as error:  # decoders raise whatever they meet
        raise ValueError(f"{path} cannot be read as a mask: {error}") from None
    if in_colours:
        return COLOUR + values.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    if odd := [value for value in (values.min(), values.max()) if not 0 <= value <= IGNORED]:
        raise DataError([f"{path} has the value {odd[0]}: classes go from 0 to {IGNORED - 1}, {IGNORED} is ignored"])
    return values


def _folders(data: Path, scan: Scan) -> dict[str, tuple[Path, Path]]:
    """Folders of images and masks by part."""

    def holds(folder: Path, beside: bool) -> bool:
        if not beside:
            return bool(scan.images(folder))
        names = {Path(path).stem for path in scan.loose(folder)}
        return any((short := dense.ENDINGS.sub("", name)) != name and short in names for name in names)

    return dense.folders_beside(data, scan, MASKS, holds)


def _find(data: Path, folders: Mapping[str, tuple[Path, Path]], scan: Scan) -> Found:
    if not folders:
        advice = f"put images in {data / dense.IMAGES[0]} and their masks in {MASKS[0]}/"
        raise DataError([f"{data} has no masks: {advice}", *not_read(data)])
    names = _class_names([data, *(masks for _, masks in folders.values())], scan)
    chosen: dict[str, dense.Pairs] = {}
    for part, (images, masks) in folders.items():
        files = _masks_in(images, masks, scan)
        pairs = dense.by_name((images, masks), files, "mask", scan)
        chosen |= dense.by_lists(part, data / "ImageSets" / "Segmentation", pairs, images, scan)
    every = [mask for pairs in chosen.values() for _, mask in pairs]
    if (names is None or len(names) == 2) and not scan.faults and _are_binary(every):
        black, white = names.values() if names else ("0", "1")
        scan.note(str(data), f"has masks of only 0 and {IGNORED}: {IGNORED} is taken for class {white}")
        names = {0: black, IGNORED: white}
    parts = {part: [(image, (mask, names)) for image, mask in pairs] for part, pairs in chosen.items()}
    return Found(parts, list(names.values()) if names else None)


def _masks_in(images: Path, masks: Path, scan: Scan) -> list[str]:
    """The files of masks; a fault where they are JPEGs, which have no exact values."""
    files = scan.images(masks)
    if images == masks:
        stems = {Path(file).stem for file in files}
        files = [file for file in files if dense.ENDINGS.sub("", Path(file).stem) in stems - {Path(file).stem}]
    exact = [file for file in files if file.lower().endswith(MASK_SUFFIXES)]
    known = {Path(file).with_suffix("") for file in exact}
    if lossy := [file for file in files if Path(file).with_suffix("") not in known]:
        scan.faults.append(
            f"{listed(lossy, shown=1)} cannot be a mask: compression changes the numbers of its classes, "
            "save it as PNG from where it was drawn"
        )
    return exact


def _are_binary(masks: Sequence[str]) -> bool:
    """Whether no mask has another value than 0 and 255, and at least one has 255: not what VOC means by it."""
    seen: set[int] = set()
    for path in masks:
        with suppress(ValueError, OSError):  # which is told as the masks are checked
            seen |= set(np.unique(read_mask(path)).tolist())
        if not seen <= {0, IGNORED}:
            return False
    return seen == {0, IGNORED}


def _class_names(folders: Sequence[Path], scan: Scan) -> Names:
    """The names that a file in the first of the folders gives the values, or Roboflow's in any; None without."""
    named = (folder / name for folder in folders[:1] for name in (CLASSES_FILE, COLOURS_FILE))
    lists = [file for file in named if file.is_file()][:1]
    files = lists or [file for folder in folders if (file := folder / CLASSES_TABLE).is_file()]
    found = [_names_in(file, scan) for file in files]
    for file, names in zip(files, found, strict=True):
        if names != found[0]:
            scan.faults.append(f"{files[0]} and {file} give different names to the values: make them agree")
    return found[0] if found and (not scan.faults or files[0].name == COLOURS_FILE) else None


def _names_in(file: Path, scan: Scan) -> dict[int, str]:
    """The class of each value; faults are duplicates and values that a mask cannot hold."""
    lines = [line for line in scan.text(file).splitlines() if line.strip()]
    if file.name == CLASSES_TABLE:
        rows = [line.partition(",") for line in lines]
        names = {int(value): same_form(name) for value, _, name in rows if re.fullmatch(r"\s*\d{1,9}\s*", value)}
    elif file.name == COLOURS_FILE:
        return _named_colours(file, lines, scan)
    else:
        names = dict(enumerate(map(same_form, lines)))
    if duplicates := [name for name, count in Counter(names.values()).items() if count > 1]:
        scan.faults.append(f"{file} names {listed(duplicates)} twice")
    if any(value >= IGNORED for value in names):
        scan.faults.append(f"{file} names a class {max(names)}: they go from 0 to {IGNORED - 1}, {IGNORED} is ignored")
    return names


def _named_colours(file: Path, lines: Sequence[str], scan: Scan) -> dict[int, str]:
    """CVAT's lines `label:red,green,blue:parts:actions`; a fault where one is none or a colour stands twice."""
    names: dict[int, str] = {}
    for line in (line for line in lines if not line.startswith("#")):
        found = re.match(r"(.*?):(\d{1,3}),(\d{1,3}),(\d{1,3})(:|$)", line)
        levels = [int(level) for level in found.groups()[1:4]] if found else [256]
        value = COLOUR + sum(level << shift for level, shift in zip(levels, (16, 8, 0), strict=False))
        if found is None or max(levels) > 255 or value in names or same_form(found[1]) in names.values():
            scan.faults.append(f"{file}: {line!r:.80} is no label:red,green,blue, or its label or colour stands twice")
        else:
            names[value] = same_form(found[1])
    return names


def _labels(marked: Sequence[tuple[str, tuple[str, Names], Size]], scan: Scan) -> Iterator[Labels | list[str] | str]:
    with ThreadPoolExecutor(cpu_count() or 1, "masks") as pool:
        yield from pool.map(_labels_of_one, marked)


def _labels_of_one(marked: tuple[str, tuple[str, Names], Size]) -> Labels | list[str] | str:
    """The classes in a mask, each once, in the order of their values; or what is wrong with it, as `Format` says."""
    image, (path, names), size = marked
    in_colours = names is not None and min(names, default=0) >= COLOUR
    try:
        mask = _values(path, in_colours=in_colours)
    except DataError as error:
        return list(error.lines)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    if fault := dense.size_fault(image, size, mask.shape, f"its mask {path}"):
        return [fault]
    seen = np.unique(mask).tolist()
    if names is None and len(seen) > MAX_UNNAMED and seen[-1] == IGNORED:
        soft = f"has {len(seen)} values from {seen[0]} to {IGNORED}, as smoothed edges do"
        return [f"{path} {soft}: draw it without smoothing, or name the values in {CLASSES_FILE}"]
    values = [value for value in seen if value != IGNORED or IGNORED in (names or ())]
    unknown = [value for value in values if value not in names] if names is not None else []
    if unknown and in_colours:
        colours = ["#" + f"{value - COLOUR:06x}" for value in unknown]
        return [f"{path} has the colours {listed(colours)}, which {COLOURS_FILE} gives to no label"]
    if unknown:
        return [
            f"{path} has the value{'s' if len(unknown) > 1 else ''} {listed(map(str, unknown))}, "
            f"but only {listed(map(str, names or ()))} have names ({IGNORED} is ignored)"
        ]
    return Labels([names[value] if names else str(value) for value in values], (path, values))


def _target(labels: Labels, numbers: Mapping[str, int]) -> MaskTarget:
    path, values = labels.value
    pairs = tuple(zip(values, (numbers[name] for name in labels.names), strict=True))
    return path if all(value == number for value, number in pairs) else (path, pairs)


def _all_values(names: set[str]) -> list[str]:
    """Every value up to the highest, so that the numbers of the classes are the values; if most occur, else these."""
    count = max(map(int, names), default=-1) + 1
    return [str(value) for value in range(count)] if count <= 2 * len(names) else samples.in_order(names)


read = partial(samples.read, form=Format(_folders, _find, _labels, _target, in_order=_all_values, stratified=False))


def targets(sample: Sample, processor: Aimv2Processor, place: dense.Placement | None = None) -> Arrays:
    """`mask` (H, W) uint8, unchanged or where `place` puts it; what lies outside the image is `IGNORED`."""
    place = place or dense.plain(sample.size, processor.canvas)
    mask = Image.fromarray(read_mask(sample.target))
    if mask.size != sample.size[::-1]:
        raise ValueError(f"{sample.path} or its mask was changed while it was read: run it again")
    return {"mask": np.asarray(place.draw(mask, fill=IGNORED, resample=Image.Resampling.NEAREST))}


example = partial(dense.example, targets)
