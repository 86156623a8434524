"""`mlx-aimv2 classify`: prints which of the given labels fit each image."""

from __future__ import annotations

import argparse
import os

from mlx_aimv2.cli.flags import MODEL, REPEATED, add_dtype, add_policy_arguments, add_revision, add_rules, policy_of
from mlx_aimv2.cli.output import Failures, progress, show, show_json, typed
from mlx_aimv2.config import LIT_CHECKPOINT
from mlx_aimv2.embed.encode import listed_files
from mlx_aimv2.files import expand_user, read_text
from mlx_aimv2.loading import load
from mlx_aimv2.zero_shot_classifier import TEMPLATES, Prediction, ZeroShotClassifier, check_labels, check_templates

MAX_LABEL_BYTES = 1 << 20
"""Of a file of labels: ImageNet's 1,000 take 20 kB, and each label is one pass of the text encoder."""


def add_classify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input").add_argument
    add("images", nargs="+", metavar="IMAGE", help="image file, folder or pattern")
    add_rules(add)
    add("--labels", metavar="A,B,…", help="the labels, separated by commas")
    add("--labels-file", metavar="FILE", help="the labels, one a line; here they may hold commas")
    words = f"sentence with {{}} for the label; {REPEATED} (default: {TEMPLATES[0]!r})"
    add("--template", action="append", metavar="TEXT", help=words)

    add = parser.add_argument_group("model").add_argument
    words = f"{MODEL}, with a text encoder (default: %(default)s)"
    add("-m", "--model", default=LIT_CHECKPOINT, metavar="MODEL", help=words)
    add_revision(add)
    add_dtype(add)

    add_policy_arguments(parser.add_argument_group("reading images").add_argument)

    add = parser.add_argument_group("output").add_argument
    add("-k", "--top", type=int, metavar="N", help="labels shown for each image (default: 5; in JSON all)")
    add("--json", action="store_true", help="print a JSON object for each image, one a line")


def run_classify(arguments: argparse.Namespace) -> int:
    """Prints the best labels of each image; returns 1 when some could not be read."""
    if arguments.top is not None and arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    policy = policy_of(arguments)
    labels = check_labels(_labels(arguments.labels, arguments.labels_file))  # before the model, which takes longer
    templates = check_templates([typed(one) for one in arguments.template or TEMPLATES])
    failures = Failures()
    images = listed_files(arguments.images, failures, exclude=arguments.exclude, include=arguments.include)
    given = [os.path.abspath(expand_user(name)) for name in arguments.images]  # noqa: PTH100 - as the listing's
    images.sort(key=lambda path: given.index(path) if path in given else len(given))  # what has a name: as it was given
    model, processor = load(arguments.model, revision=arguments.revision, dtype=arguments.dtype)
    classifier = ZeroShotClassifier(model, processor, labels, templates=templates)
    with progress() as on_progress:
        for done, result in enumerate(classifier.each(images, policy=policy)):
            on_progress(done + 1, len(images))
            if isinstance(result, Prediction):
                (_show_json if arguments.json else _show_text)(images[done], result, arguments.top)
            else:
                failures(images[done], str(result).removeprefix(f"{images[done]} "))
    return 1 if failures else 0


def _labels(listed: str | None, file: str | None) -> list[str]:
    if listed is None and file is None:
        raise ValueError("no labels: give --labels cat,dog or --labels-file FILE")
    labels = typed(listed).split(",") if listed is not None else []
    if file is not None:
        try:
            labels += read_text(expand_user(file), max_bytes=MAX_LABEL_BYTES).split("\n")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}: --labels-file takes a text file with a label a line") from None
    return [label.strip() for label in labels if label.strip()]


def _show_text(image: str, prediction: Prediction, count: int | None) -> None:
    show(image)
    for label, probability in prediction.top(count or 5):
        show(f"{100 * probability:7.2f} %  {label}")


def _show_json(image: str, prediction: Prediction, count: int | None) -> None:
    logits = dict(zip(prediction.labels, map(float, prediction.logits), strict=True))
    best = prediction.top(count)
    labels = [{"label": label, "probability": probability, "logit": logits[label]} for label, probability in best]
    show_json({"path": image, "labels": labels})
