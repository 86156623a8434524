"""Classification: a label for each image, from folders named after labels or from a list in a metadata file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_aimv2 import plot
from mlx_aimv2.images import to_rgb
from mlx_aimv2.learn import label_files, metrics
from mlx_aimv2.learn.heads import AttentiveHead, MeanHead
from mlx_aimv2.learn.knn import KnnHead
from mlx_aimv2.learn.placement import canvas_size
from mlx_aimv2.learn.probe import fit_linear
from mlx_aimv2.learn.samples import Sample
from mlx_aimv2.learn.task import Defaults, Labelled
from mlx_aimv2.train.augment import Augmentation

if TYPE_CHECKING:
    from mlx_aimv2.learn.task import Arrays
    from mlx_aimv2.processor import Aimv2Processor

NAME = "classify"
TYPES = ("linear", "attentive", "knn", "lora", "dora", "full")
FROZEN = {"linear": "mean", "attentive": "tokens", "knn": "mean"}
DEFAULTS = {
    "linear": Defaults(),
    "knn": Defaults(),
    "attentive": Defaults((1e-3, 3e-3, 1e-2), epochs=30, batch_size=64, warm_up_epochs=2),
    "lora": Defaults((3e-4,), epochs=10, batch_size=16),
    "dora": Defaults((3e-4,), epochs=10, batch_size=16),
    "full": Defaults((1e-4,), epochs=10, batch_size=16, layer_decay=0.75, drop_path=0.1),
}
DEFAULT_TYPE = "linear"
METRIC = "top1"
NEEDS_SIZE = False
TAKES_MASK = True

MIN_AREA = 0.5
"""Smallest random crop, as a share of the image: more than for pre-training, as small objects must not be cut off."""

OPERATIONS = 2
"""Of RandAugment, on each training image."""

SHOWN = 5
"""Labels that a prediction tells."""

MISTAKES = 12
"""Images on the model card that were called what they are not."""


@dataclass(frozen=True)
class Classification:
    """How probable each class is, (classes,), all together 1."""

    probabilities: np.ndarray[Any, Any]

    def best(self, count: int = SHOWN) -> list[int]:
        """The most probable classes, best first."""
        return [int(i) for i in np.argsort(-self.probabilities, kind="stable")[:count]]


recognise = label_files.recognise
read = label_files.read


def make_head(
    kind: str, *, classes: int, width: int, heads: int, patch_size: int, options: dict[str, Any]
) -> nn.Module:
    """The attentive probe, the neighbours' vote, or for the other types one linear layer on the mean token."""
    if kind == "attentive":
        return AttentiveHead(width, heads, classes)
    if kind == "knn":
        return KnnHead(width, classes, options["images"])
    return MeanHead(width, classes)


def example(
    sample: Sample, processor: Aimv2Processor, *, chance: np.random.Generator | None, flip: bool = False
) -> Arrays:
    """`pixels` (H, W, 3) and the class of a sample, its image changed at random by `chance`."""
    image: Any = sample.path
    if chance is not None:
        changed = Augmentation(min_area=MIN_AREA, flip=flip, operations=OPERATIONS)
        image = changed(to_rgb(sample.path), canvas_size(processor), chance)
    return {"pixels": processor.pixels(image), **targets(sample, processor)}


def targets(sample: Sample, processor: Aimv2Processor) -> Arrays:
    """The number of the class, ()."""
    return {"label": np.array(sample.target, np.int32)}


def loss(outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
    """Cross-entropy of each image, `(B, classes), (B,) -> (B,)`."""
    return nn.losses.cross_entropy(outputs["logits"].astype(mx.float32), targets["label"])


def solve(kind: str, train: Labelled, val: Labelled, classes: int, *, say: Callable[[str], None]) -> nn.Module | None:
    """The linear probe by L-BFGS and the neighbours' vote, which no loop trains."""
    (features, labels), held_out = (_with_labels(part) for part in (train, val))
    if kind == "linear":
        head, penalty = fit_linear((features, labels), held_out, classes, say=say)
        say(f"penalty {penalty:g} is the best on val")
        return head
    return KnnHead.of(features, labels, classes) if kind == "knn" else None


def _with_labels(part: Labelled) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    features, samples = part
    return features, np.array([sample.target for sample in samples])


def decode(outputs: Arrays, sample: Sample | None, size: tuple[int, int]) -> Classification:
    """The softmax of one image's logits."""
    logits = outputs["logits"].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return Classification(weights / weights.sum())


def score(samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str]) -> dict[str, float]:
    """`top1` and, from six classes on, `top5`, each from 0 to 1; `mean_class` is the mean recall of the classes."""
    counts = _confusion(samples, predictions, classes)
    scores = {"top1": metrics.accuracy(counts)}
    if len(classes) > 5:
        pairs = zip(samples, predictions, strict=True)
        scores["top5"] = float(np.mean([sample.target in prediction.best(5) for sample, prediction in pairs]))
    scores["mean_class"] = metrics.mean_recall(counts)
    return scores


def as_json(prediction: Classification, classes: Sequence[str]) -> dict[str, Any]:
    """`{"label": the most probable, "labels": [{"label", "probability"}, …]}`, best first."""
    best = prediction.best(len(classes))
    labels = [{"label": classes[i], "probability": float(prediction.probabilities[i])} for i in best]
    return {"label": classes[best[0]], "labels": labels}


def as_text(prediction: Classification, classes: Sequence[str]) -> str:
    """A line for each of the most probable labels."""
    return "\n".join(f"{100 * prediction.probabilities[i]:7.2f} %  {classes[i]}" for i in prediction.best())


def save_prediction(path: str, prediction: Classification, classes: Sequence[str], stem: Path) -> list[str]:
    """A label is nothing to see, so no file: `[path, best label, its probability]`."""
    best = prediction.best(1)[0]
    return [path, classes[best], f"{prediction.probabilities[best]:.6f}"]


def save_all(records: Sequence[list[str]], classes: Sequence[str], folder: Path) -> None:
    """`predictions.csv`: the best label and its probability for each image."""
    with (folder / "predictions.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        csv.writer(stream).writerows([["path", "label", "probability"], *records])


def card(
    samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """`confusion.png` and, if there are any, `mistakes.png`."""
    plot.confusion_image(_confusion(samples, predictions, classes), classes).save(folder / "confusion.png")
    images = [("Confusion matrix", "confusion.png")]
    pairs = zip(samples, predictions, strict=True)
    mistakes = [(sample, found.best(1)[0], found) for sample, found in pairs if found.best(1)[0] != sample.target]
    mistakes.sort(key=lambda mistake: -mistake[2].probabilities[mistake[1]])
    shown = [
        (to_rgb(sample.path), f"{classes[sample.target][:9]}, not {classes[label][:9]}")
        for sample, label, _ in mistakes[:MISTAKES]
    ]
    if shown:
        rows = [shown[start : start + 6] for start in range(0, len(shown), 6)]
        sheet = plot.contact_sheet(
            [[image for image, _ in row] for row in rows],
            captions=[[caption for _, caption in row] for row in rows],
            side=128,
            gap=14,
        )
        sheet.save(folder / "mistakes.png")
        images.append(("Worst mistakes", "mistakes.png"))
    return images


def table(samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str]) -> list[list[str]]:
    """Images, precision, recall and F1 of each class, the header first."""
    counts = _confusion(samples, predictions, classes)
    rows = [["class", "images", "precision", "recall", "F1"]]
    for i, name in enumerate(classes):
        right, called, there = counts[i, i], counts[:, i].sum(), counts[i].sum()
        rows.append([name, f"{there}", _share(right, called), _share(right, there), _share(2 * right, called + there)])
    return rows


def _confusion(
    samples: Sequence[Sample], predictions: Sequence[Classification], classes: Sequence[str]
) -> np.ndarray[Any, Any]:
    labels = np.array([sample.target for sample in samples], np.int64)
    return metrics.confusion(labels, np.array([found.best(1)[0] for found in predictions], np.int64), len(classes))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"
