"""What a detection says of images: boxes with scores, average precision, and what is shown of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_aimv2 import plot
from mlx_aimv2.images import to_rgb
from mlx_aimv2.learn import dense
from mlx_aimv2.learn.detect.boxes_average_precision import Detections, areas, summary, suppress
from mlx_aimv2.learn.samples import Sample, Scored
from mlx_aimv2.train.batches import Arrays

MIN_SCORE, CANDIDATES, MAX_BOXES = 0.05, 1000, 100
"""What is kept of an image: boxes from this score on, so many before duplicates are taken out, and so many after."""

SURE = 0.3
"""Score from which a box is drawn and printed; the JSON file and the scores take all."""


def decode(outputs: Arrays, size: tuple[int, int]) -> Detections:
    """One image's outputs as boxes in its own pixels: best scores, duplicates taken out, what is outside cut off."""
    place = dense.plain(size, (int(outputs["canvas"][0]), int(outputs["canvas"][1])))
    # The sigmoid, by a tanh that cannot overflow.
    likely, central = (0.5 * (1 + np.tanh(0.5 * outputs[name].astype(np.float64))) for name in ("classes", "centre"))
    scores = np.sqrt(likely * central[:, None])  # (P, K)
    position, label = np.nonzero(scores > MIN_SCORE)
    score = scores[position, label]
    order = np.argsort(-score, kind="stable")[:CANDIDATES]
    position, label, score = position[order], label[order], score[order]
    where, sides = (outputs[name][position].astype(np.float64) for name in ("points", "distances"))
    found = place.back(np.concatenate([where[:, :2] - sides[:, :2], where[:, :2] + sides[:, 2:]], axis=1))
    seen = areas(found) > 0
    found, label, score = found[seen], label[seen], score[seen]
    keep = suppress(found, score, label)[:MAX_BOXES]
    return Detections(found[keep], label[keep], score[keep], size)


def at_least(prediction: Detections, min_score: float) -> Detections:
    """The boxes whose score is high enough."""
    keep = prediction.scores >= min_score
    return replace(prediction, **{name: getattr(prediction, name)[keep] for name in ("boxes", "labels", "scores")})


def score(samples: Sequence[Sample], predictions: Sequence[Detections], classes: Sequence[str]) -> Scored:
    """COCO's six average precisions, each from 0 to 1; those of sizes that no object has are left out.

    Of each class: objects, AP, AP50.
    """
    truths = [sample.target for sample in samples]
    scores, precisions = summary(truths, predictions, len(classes))
    objects = np.bincount(np.concatenate([truth.labels for truth in truths]), minlength=len(classes))
    rows = []
    for i, name in enumerate(classes):
        own = [precisions[i].mean(), precisions[i, 0]]
        rows.append([name, f"{objects[i]:,}", *("-" if np.isnan(score) else f"{score:.3f}" for score in own)])
    known = {name: value for name, value in scores.items() if not np.isnan(value)}
    return {"ap": 0.0} | known, [["class", "objects", "AP", "AP50"], *rows]


def as_json(prediction: Detections, classes: Sequence[str]) -> dict[str, Any]:
    """All boxes, best first: `{"height", "width", "objects": [{"label", "score", "box": [l, t, r, b]}, …]}`."""
    objects = [
        {"label": classes[label], "score": round(float(score), 5), "box": [round(float(n), 2) for n in box]}
        for box, label, score in zip(prediction.boxes, prediction.labels, prediction.scores, strict=True)
    ]
    return {"height": prediction.size[0], "width": prediction.size[1], "objects": objects}


def as_text(prediction: Detections, classes: Sequence[str]) -> str:
    """A line for each box from `SURE` on: score in percent, class, left, top, right, bottom."""
    found = zip(prediction.boxes, prediction.labels, prediction.scores, strict=True)
    lines = [
        f"{100 * score:7.2f} %  {classes[label]}  {' '.join(f'{n:.0f}' for n in box)}"
        for box, label, score in found
        if score >= SURE
    ]
    return "\n".join(lines) or f"no object with a score of {100 * SURE:.0f} % or more"


def save_prediction(path: str, prediction: Detections, classes: Sequence[str], stem: Path) -> tuple[str, Detections]:
    """`STEM-overlay.jpg`: the image with the boxes from `SURE` on."""
    _drawn(to_rgb(path), prediction, classes).save(f"{stem}-overlay.jpg", quality=92)
    return path, prediction


def save_all(records: Sequence[tuple[str, Detections]], classes: Sequence[str], folder: Path) -> None:
    """`predictions.coco.json`: all boxes of all images with their scores; category ids start at 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, found) in enumerate(records, 1):
        images.append({"id": number, "file_name": path, "width": found.size[1], "height": found.size[0]})
        for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True):
            left, top, right, bottom = (round(float(n), 2) for n in box)
            shape = [left, top, round(right - left, 2), round(bottom - top, 2)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": int(label) + 1, "bbox": shape}
                | {"area": round(shape[2] * shape[3], 2), "iscrowd": 0, "score": round(float(score), 5)}
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "predictions.coco.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def card(
    samples: Sequence[Sample], predictions: Sequence[Detections], classes: Sequence[str], folder: Path
) -> list[tuple[str, str]]:
    """`overlays.jpg`: images with the ground truth above and the prediction below, the worst first."""

    def draw(image: Image.Image, sample: Sample, prediction: Detections) -> list[Image.Image]:
        labelled = plot.with_boxes(image, sample.target.boxes, sample.target.labels, classes)
        return [labelled, _drawn(image, prediction, classes)]

    def quality(sample: Sample, prediction: Detections) -> float:
        scores, _ = summary([sample.target], [prediction], len(classes))
        return 1.0 if np.isnan(scores["ap"]) else scores["ap"]

    dense.worst(samples, predictions, quality, draw).save(folder / "overlays.jpg", quality=92)
    return [("The images with the lowest precision: labelled above, predicted below", "overlays.jpg")]


def _drawn(image: Image.Image, found: Detections, classes: Sequence[str]) -> Image.Image:
    sure = found.scores >= SURE
    return plot.with_boxes(image, found.boxes[sure], found.labels[sure], classes, scores=found.scores[sure])
