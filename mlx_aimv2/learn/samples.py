"""Reads labelled images: one set of rules for labels, masks and boxes.

DATA -> a format's own reader -> Found: images by part, with what is said of each -> checks, classes, parts -> Dataset

A format (`data.py` of a task) says where its images are and how they are labelled. Decided here, for all formats:
which folder is which part, what happens to copies and to classes unknown in training, what is left out with a note,
what is refused, and how DATA without parts is split. All faults are reported at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mlx_aimv2.images.find import Scan
from mlx_aimv2.learn.check_images import check_images

PARTS = {
    "train": {"train", "training"},
    "val": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Part -> the words in a folder's name that mean it, as at Hugging Face."""

HELD_OUT = 0.15
"""Share of the images for `val`, and the same for `test`, if DATA has no parts."""

FOLDS, MIN_TEST = 5, 30
"""Folds of a cross-validation, which replaces a test on fewer images."""

MAX_BYTES = 1 << 32
"""Bytes of a list of labels or captions: COCO's own annotations have 450 MB."""

MAX_LINES, MAX_SHOWN = 20, 300
"""Of what is wrong the lines that a message shows, the rest is counted; and the characters of a name or such a line."""

Scored: TypeAlias = "tuple[dict[str, float], list[list[str]]]"
"""How good a head is on samples: scores by name, and rows of a table by class, the header first."""

Size: TypeAlias = "tuple[int, int]"
"""(height, width) of an image in pixels, upright."""


class DataError(ValueError):
    """Everything that is wrong with the data, a line each; the message holds the first of them, and advice."""

    def __init__(self, lines: Sequence[str], advice: str = "") -> None:
        self.lines = tuple(lines)
        more = f"; and {len(lines) - MAX_LINES:,} more" if len(lines) > MAX_LINES else ""
        counted = f"{len(lines):,} things are wrong with the data: " if len(lines) > 1 else ""
        super().__init__(f"{counted}{'; '.join(lines[:MAX_LINES])}{more}{advice}")


def refusal(lines: Sequence[str], *, broken: int) -> DataError:
    """The error that says what is wrong, and what to type if images are `broken` or not everything is shown."""
    more = "; --json lists everything" if len(lines) > MAX_LINES else ""
    skip = f"; --skip-broken leaves out {one_image(broken)} that cannot be read" if broken else ""
    return DataError(lines, more + skip)


@dataclass(frozen=True)
class Sample:
    """One image with what is known about it.

    `size` is its (height, width), upright; `target` the task's own: the number of the class, the mask's file, boxes.
    """

    path: str
    sha256: bytes
    size: Size
    target: Any


@dataclass(frozen=True)
class Dataset:
    """Checked samples of each part (`train`, `val`, `test`; some may be empty), and notes for the user.

    `left_out` has a line for each thing counted in the notes. If it `is_crossed`, `test` are training images that
    `folds` hold out in turn.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    is_crossed: bool = False

    def to_score(self) -> tuple[str, list[Sample]]:
        """The part that a head is scored on, and its samples; for a Dataset read with the head's classes."""
        return next((part, self.splits[part]) for part in ("test", "val", "train") if self.splits[part])


class Labels(NamedTuple):
    """The labels of an image: `names` of classes, each as often as it occurs, and a value defined by the format."""

    names: Sequence[str]
    value: Any


@dataclass
class Found:
    """What a format found in DATA: by part, or under "" if DATA names none, an image's path and its mark.

    `classes` are the names in order, if the format lists them.
    """

    parts: dict[str, list[tuple[str, Any]]]
    classes: list[str] | None = None


class Recognised(NamedTuple):
    """What a task's format recognised in DATA: why DATA is for it, a phrase, and the result of its `locate`."""

    reason: str
    scan: Scan
    located: Any


def in_order(names: Iterable[str]) -> list[str]:
    """Labels sorted by name, or by number if all are whole numbers."""
    names = list(names)
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))  # of any length
    return sorted(names)


@dataclass(frozen=True)
class Format:
    """How labelled images of one kind are read.

    `locate(data, scan)` finds what describes DATA, nothing if it is not in this format; `find(data, located, scan)`
    lists the images without opening them. Both add errors to `scan.faults`. `labels(marked, scan)` returns the labels
    of each, or lines that say what is wrong with it, or one line that says why they cannot be read; `marked` are its
    path, mark and size. `target(labels, numbers)` is what training compares with; `numbers` are those of the classes.

    At least `min_classes` must occur in training. `in_order` gives the names of the classes, from those that occur in
    training, if the format lists none. If DATA is split and `stratified`, every class is split in the same proportion.
    `others` says which other files in DATA may describe it and are not read.
    """

    locate: Callable[[Path, Scan], Any]
    find: Callable[[Path, Any, Scan], Found]
    labels: Callable[[Sequence[tuple[str, Any, Size]], Scan], Iterable[Labels | list[str] | str]]
    target: Callable[[Labels, Mapping[str, int]], Any]
    in_order: Callable[[set[str]], list[str]] = in_order
    min_classes: int = 2
    stratified: bool = True
    others: Callable[[Path], list[str]] = lambda data: []


def read(
    data: Path,
    form: Format,
    *,
    classes: Sequence[str] | None = None,
    decode: bool = True,
    skip_broken: bool = False,
    recognised: Recognised | None = None,
    holdout: float | None = HELD_OUT,
) -> Dataset:
    """DATA read and checked: `folder -> Dataset`. Raises DataError with everything that is wrong, OSError.

    Without `classes` they are the ones the format lists, else those of the training images, and DATA without parts is
    split. With the `classes` of a head, whose names are looked up, only the part that is scored is read: `test`, else
    `val`, else images outside any part, as `test`, else `train`, with a note.

    Without `decode` only the headers of images are read: for a caller that decodes all of them before relying on them.
    Unreadable images and masks are refused, all at once, or with `skip_broken` left out with a note. `recognised` is
    the result of the task's `recognise`, to avoid searching twice. `holdout` is the share for `val`, and for `test`,
    when DATA is split; with None a small set is only for training and cross-validation.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"{data} is not a folder: give the folder with the labelled images")
    scan = recognised.scan if recognised else Scan()
    found = form.find(data, recognised.located if recognised else form.locate(data, scan), scan)
    scored = next((part for part in ("test", "val", "", "train") if found.parts.get(part)), "")
    if classes is not None:
        found.parts = {scored: found.parts.get(scored, [])}
    paths = [path for pairs in found.parts.values() for path, _ in pairs]
    images, unreadable = check_images(paths, decode=decode)
    broken = [*scan.broken, *unreadable]
    faults = scan.faults
    labelled: dict[str, dict[str, Labels]] = {}
    for part, pairs in found.parts.items():
        marked = [(path, mark, images[path].size) for path, mark in pairs if path in images]
        labelled[part] = {}
        for (path, _, _), labels in zip(marked, form.labels(marked, scan), strict=True):
            if isinstance(labels, Labels):
                labelled[part][path] = labels
            elif isinstance(labels, str):
                broken.append(labels)
            else:
                faults += labels
    faults = [*([] if skip_broken else broken), *faults]
    training = labelled.get("train", labelled.get("", {}))
    occurring = {name for labels in training.values() for name in labels.names}
    names = tuple(classes or found.classes or form.in_order(occurring))
    numbers = {same_form(name): number for number, name in enumerate(names)}
    every = {path: labels.names for pairs in labelled.values() for path, labels in pairs.items()}
    faults += _wrong_names(names, Counter(name for own in every.values() for name in {*own} - {*numbers}), scan)
    if classes is None and (training or not faults):
        faults += _too_few(training, data, form)
    if classes is None and labelled and not labelled.keys() & {"train", ""}:
        faults.append(f"{data} has {' and '.join(labelled)} but no train folder: add it, or give one folder")
    if not faults and not any(every.values()):
        faults.append(f"{data} has no labelled images in it")
    if faults:
        raise refusal(faults, broken=0 if skip_broken else len(broken))
    notes = [f"{one_image(len(broken))} left out that cannot be read: {listed(broken, shown=3)}"] if broken else []
    left_out = (*broken, *scan.all_noted)
    samples = {
        part: [Sample(p, images[p].sha256, images[p].size, form.target(labels, numbers)) for p, labels in pairs.items()]
        for part, pairs in labelled.items()
    }
    if classes is not None:
        splits: dict[str, list[Sample]] = {part: [] for part in PARTS} | {scored or "test": samples[scored]}
        told = f"{data} has only the part train: its images are scored, and the head may have learned them"
        return Dataset(names, splits, (*([told] if scored == "train" else []), *notes, *scan.notes), left_out)

    def stratum(sample: Sample) -> int:
        """The class that occurs most often in an image; one number higher than all if it has none."""
        own = [numbers[name] for name in every[sample.path]] if form.stratified else []
        return int(np.bincount(own).argmax()) if own else len(names)

    splits, divided = _divided(samples, stratum, holdout)
    is_crossed = holdout is None and not splits["val"]
    copies = _copies({part: own for part, own in splits.items() if part != "test" or not is_crossed}, every)
    return Dataset(names, splits, (*divided, *notes, *copies, *scan.notes), left_out, is_crossed)


def _wrong_names(names: Sequence[str], unknown: Mapping[str, int], scan: Scan) -> list[str]:
    """Labels that are not among the `names`, and names that are not text, as folder names may be."""
    cases = Counter(name.casefold() for name in names)
    if alike := [name for name in names if cases[name.casefold()] > 1]:
        scan.note(f"labels {listed(alike)}", "differ only in letter case: they are separate labels")
    faults = [
        f"the label {short(name)} ({one_image(count)}) is not in the list {listed(names)}"
        for name, count in sorted(unknown.items() if names else ())
    ]
    no_text = [name for name in names if name.encode(errors="ignore").decode() != name]
    return faults + [f"the label {name!r} is not UTF-8: rename it" for name in no_text]


def _divided(
    samples: Mapping[str, list[Sample]], stratum: Callable[[Sample], int], holdout: float | None
) -> tuple[dict[str, list[Sample]], list[str]]:
    """The parts that training needs, with missing ones taken from the others, and notes that say so."""
    splits = {part: samples.get(part, []) for part in PARTS}
    if splits["val"]:
        return splits, []
    whole = samples.get("", splits["train"])
    if holdout is None and not splits["test"] and HELD_OUT * len(whole) < MIN_TEST:
        held = [sample for _, out in folds(whole) for sample in out]
        note = (
            f"{one_image(len(whole))} are few: cross-validated in {FOLDS} folds; --holdout X holds images out instead"
        )
        return {"train": whole, "val": [], "test": held}, [note]
    parts = split(whole, [stratum(sample) for sample in whole], holdout or HELD_OUT)
    if not splits["test"]:
        return parts, [f"{one_image(len(whole))}, split by content, the same each time"]
    train = sorted([*parts["train"], *parts["test"]], key=lambda sample: sample.path)
    note = f"{one_image(len(parts['val']))} of train serve as val, chosen by content"
    return {"train": train, "val": parts["val"], "test": splits["test"]}, [note]


def folds(samples: Sequence[Sample]) -> list[tuple[list[Sample], list[Sample]]]:
    """Training and held-out images, `FOLDS` times by content: each is held out once, except the only one of a class.

    No folds if there is none to hold out.
    """
    contents: dict[Any, set[bytes]] = defaultdict(set)
    strata = {sample.sha256: sample.target if isinstance(sample.target, int) else 0 for sample in samples}
    for sha256, stratum in strata.items():
        contents[stratum].add(sha256)
    order = [
        sha256 for stratum in sorted(contents) for sha256 in sorted(contents[stratum]) if len(contents[stratum]) > 1
    ]
    fold_of = {sha256: index % FOLDS for index, sha256 in enumerate(order)}
    numbers = [(fold_of.get(sample.sha256, -1), sample) for sample in samples]
    return [
        ([one for own, one in numbers if own != fold], [one for own, one in numbers if own == fold])
        for fold in range(min(FOLDS, len(order)))
    ]


def split(samples: Sequence[Sample], strata: Sequence[int], share: float = HELD_OUT) -> dict[str, list[Sample]]:
    """Stratified parts, val and test a `share` each, by content hash: `samples, the class of each -> {"train": …}`.

    Images of equal content stay together, and adding an image hardly moves any other. A class with two different
    images has one in training and one in `val`; from three on each part has at least one.
    """
    groups: dict[int, dict[bytes, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    owner: dict[bytes, int] = {}
    for sample, stratum in zip(samples, strata, strict=True):
        groups[owner.setdefault(sample.sha256, stratum)][sample.sha256].append(sample)
    result: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for stratum in sorted(groups):
        order = sorted(groups[stratum])
        held = min(max(1, round(share * len(order))), max(1, (len(order) - 1) // 2)) if len(order) > 1 else 0
        for_test = held if len(order) > 2 else 0
        for index, key in enumerate(order):
            part = "val" if index < held else "test" if index < held + for_test else "train"
            result[part] += groups[stratum][key]
    return {part: sorted(found, key=lambda sample: sample.path) for part, found in result.items()}


def parts_of(data: Path, scan: Scan, holds: Callable[[Path], bool]) -> dict[str, Path]:
    """The folders of DATA that are its parts, `{"train": DATA/train, …}`; `{"": DATA}` if there are none.

    A folder is a part if its name says so and it `holds` what the format wants: a class may have a part's name. If a
    part contains only another folder of its kind, as in `seg_train/seg_train`, the inner one counts. Images next to
    parts are named in a note. Raises DataError if two folders mean the same part.
    """
    found: dict[str, Path] = {}
    others: list[Path] = []
    for folder in scan.folders(data):
        part = part_of(folder.name)
        inner = scan.folders(folder) if part else []
        if len(inner) == 1 and part_of(inner[0].name) == part and holds(inner[0]):
            folder = inner[0]
        if part is None or not holds(folder):
            others.append(folder)
        elif part in found:
            raise DataError([f"{found[part]} and {folder} both mean {part}: keep one of them"])
        else:
            found[part] = folder
    if not found:
        return {"": data}
    for folder, images in [(data, scan.loose(data)), *((folder, scan.images(folder)) for folder in others)]:
        if images:
            where = f"{folder} itself" if folder is data else str(folder)
            scan.note(f"{where}, with {one_image(len(images))},", f"is not a labelled part of {data}: skipped")
    return found


def part_of(name: str) -> str | None:
    """The part that a name means, by one of its words: `seg_train -> train`; None for no part or several."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    found = [part for part, meant in PARTS.items() if words & meant]
    return found[0] if len(found) == 1 else None


def same_form(name: str) -> str:
    """A label in the form used for comparison: without surrounding blanks, in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name.strip())


def _too_few(training: Mapping[str, Labels], data: Path, form: Format) -> list[str]:
    """What is missing for training: classes."""
    names = {name for labels in training.values() for name in labels.names}
    if len(names) >= form.min_classes:
        return []
    one = f"only one label, {short(*names)}" if names else "no labelled images"
    return [f"{data} has {one}: training needs at least {one_image(form.min_classes, 'label')}", *form.others(data)]


def _copies(splits: Mapping[str, Sequence[Sample]], names: Mapping[str, Sequence[str]]) -> list[str]:
    """Notes about images of equal content: in two parts, or with different labels."""
    first: dict[bytes, tuple[str, str]] = {}
    astray: list[str] = []
    contrary: list[str] = []
    for part, samples in splits.items():
        for sample in samples:
            other, path = first.setdefault(sample.sha256, (part, sample.path))
            if other != part:
                astray.append(f"{sample.path} in {part} is the same image as {path} in {other}")
            one, two = (sorted(names[each]) for each in (path, sample.path))
            if one != two:
                called = " and ".join(listed(dict.fromkeys(each), shown=3) or "nothing" for each in (one, two))
                contrary.append(f"{path} and {sample.path} are the same image, called {called}")
    return [
        f"{one_image(len(lines))} {what}: {listed(lines, shown=3)}"
        for lines, what in ((astray, "in two parts, so the result is too optimistic"), (contrary, "with two labels"))
        if lines
    ]


def one_image(count: int, noun: str = "image") -> str:
    """`1 image`, `2 images`, `1,197 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[str], *, shown: int = 8) -> str:
    """`a, b, c`, or the first of them and how many more."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(short, names[:shown])) + more


def short(text: str) -> str:
    """A quoted text, such as a name or a label, with the middle cut out if it is too long."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}…{text[-MAX_SHOWN // 2 :]}"
