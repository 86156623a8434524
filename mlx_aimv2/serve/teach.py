"""Labels taught by examples: images that are marked, a linear probe on their vectors, what it says of all the others.

Every change is written beside the index at once, and can be undone.
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_aimv2.files import atomic_file, atomic_folder, read_json
from mlx_aimv2.learn.classify.linear import fit_logistic
from mlx_aimv2.learn.samples import same_form
from mlx_aimv2.serve.gallery import Gallery
from mlx_aimv2.untrusted_json import misfit

Array = NDArray[Any]

PENALTY = 0.1
"""Of the probe while one teaches: with a few examples a label nothing can be held out to choose it."""

MAX_LABELS, MAX_LABEL, MAX_STEPS = 200, 100, 500
"""Labels, characters of one, and changes that can be undone."""

FORMAT = 1


class Lessons:
    """The examples of an index: which of its images have which label."""

    def __init__(self, gallery: Gallery) -> None:
        """Takes up what was marked before. Raises ValueError where that file is damaged or somebody else's."""
        self.gallery = gallery
        self.file = beside(gallery.index.path, "labels.json")
        self._lock = threading.RLock()
        self._labels: dict[str, str] = {}
        self._steps: list[dict[str, str | None]] = []
        if self.file.exists():
            content = read_json(self.file)
            if misfit(content, {"format_version": int, "labels": dict, "steps": list}) or not (
                all(isinstance(label, str) for label in content["labels"].values())
                and all(isinstance(step, dict) for step in content["steps"])
            ):
                raise ValueError(f"{self.file} does not contain labels for this index: move it away")
            self._labels, self._steps = content["labels"], content["steps"]

    def mark(self, numbers: Sequence[int], label: str | None) -> None:
        """Gives images a label, or with None takes theirs away."""
        paths = [self.gallery.path(number) for number in numbers]
        if label is not None:
            label = same_form(" ".join(label.split()))
            if not label or len(label) > MAX_LABEL or not label.isprintable():
                raise ValueError(f"a label must be a word or two, of at most {MAX_LABEL} characters")
        with self._lock:
            if label is not None and len({*self._labels.values(), label}) > MAX_LABELS:
                raise ValueError(f"at most {MAX_LABELS} labels can be taught here: use mlx-aimv2 fit")
            before = {path: self._labels.get(path) for path in paths if self._labels.get(path) != label}
            if before:
                self._set(dict.fromkeys(before, label))
                self._steps = [*self._steps, before][-MAX_STEPS:]
                self._write()

    def undo(self) -> None:
        """Takes the last change back. Raises ValueError where there is none."""
        with self._lock:
            if not self._steps:
                raise ValueError("there is nothing to undo")
            self._set(self._steps.pop())
            self._write()

    def _set(self, labels: Mapping[str, str | None]) -> None:
        for path, label in labels.items():
            if label is None:
                self._labels.pop(path, None)
            else:
                self._labels[path] = label

    def _write(self) -> None:
        content = {"format_version": FORMAT, "labels": self._labels, "steps": self._steps}
        with atomic_file(self.file) as stream:
            stream.write(json.dumps(content, indent=1).encode())

    @property
    def examples(self) -> dict[int, str]:
        """The label of each marked image that the index still has, by its number."""
        with self._lock:
            numbers = self.gallery.numbers
            return {numbers[path]: label for path, label in self._labels.items() if path in numbers}

    def state(self, count: int) -> dict[str, Any]:
        """What the page shows: the labels, the examples, and `count` images of each kind that the probe is surest and
        least sure of.
        """
        examples = self.examples
        counts = Counter(examples.values())
        state: dict[str, Any] = {
            "labels": [{"label": label, "examples": counts[label]} for label in sorted(counts)],
            "examples": [self.gallery.described(number) | {"label": label} for number, label in examples.items()],
            "steps": len(self._steps),
            "uncertain": [],
            "certain": {},
        }
        if len(counts) > 1:
            labels, probabilities = self.probabilities(examples)
            best = probabilities.argmax(axis=1)
            two = np.partition(probabilities, -2, axis=1)[:, -2:]
            is_open = np.ones(len(best), bool)
            is_open[list(examples)] = False
            rest = np.flatnonzero(is_open)

            def shown(numbers: Array) -> list[dict[str, Any]]:
                return [
                    self.gallery.described(number)
                    | {"label": labels[best[number]], "probability": round(float(probabilities[number].max()), 4)}
                    for number in numbers[:count].tolist()
                ]

            state["uncertain"] = shown(rest[np.argsort((two[:, 1] - two[:, 0])[rest], kind="stable")])
            for number, label in enumerate(labels):
                own = rest[best[rest] == number]
                state["labels"][number]["images"] = len(own)
                state["certain"][label] = shown(own[np.argsort(-probabilities[own, number], kind="stable")])
        return state

    def probabilities(self, examples: Mapping[int, str]) -> tuple[list[str], Array]:
        """What the probe says of every image: the labels, and `(P, labels)` probabilities."""
        labels = sorted(set(examples.values()))
        vectors, (mean, std) = self.gallery.vectors, self.gallery.spread
        rows = np.array(list(examples), np.int64)
        targets = np.array([labels.index(label) for label in examples.values()])
        weights, _ = fit_logistic((vectors[rows] - mean) / std, targets, len(labels), l2=PENALTY)
        slopes = (weights[:-1] / std[:, None]).astype(np.float32)
        logits = vectors @ slopes + (weights[-1] - mean @ slopes).astype(np.float32)
        logits -= logits.max(axis=1, keepdims=True)
        odds = np.exp(logits)
        return labels, odds / odds.sum(axis=1, keepdims=True)

    def save(self, fit: Callable[[Path, Path], str]) -> dict[str, str]:
        """Writes the examples as a folder that `fit` takes, and what `fit(data, head)` makes of them.

        Both are beside the index and have new names: `photos-labels/` with a metadata.csv that names the images where
        they are, `photos-head/`, the next time `photos-labels-2/`.
        """
        examples = self.examples
        if len(set(examples.values())) < 2:
            raise ValueError("mark images for at least two labels first")
        number = 1
        data, head = self._targets(number)
        while data.exists() or head.exists():
            number += 1
            data, head = self._targets(number)
        rows = [("file_name", "label"), *((self.gallery.path(image), examples[image]) for image in sorted(examples))]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with atomic_folder(data) as place:
            (place / "metadata.csv").write_bytes(os.fsencode(text.getvalue()))
        return {"data": str(data), "head": str(head), "result": fit(data, head)}

    def _targets(self, number: int) -> tuple[Path, Path]:
        again = f"-{number}" if number > 1 else ""
        return beside(self.gallery.index.path, f"labels{again}"), beside(self.gallery.index.path, f"head{again}")


def beside(index: Path, what: str) -> Path:
    """A name beside an index, `photos.db, labels.json -> photos-labels.json`."""
    return index.with_name(f"{index.stem}-{what}")
