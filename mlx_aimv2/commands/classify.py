"""What does `mlx-aimv2 classify` do: which of the given words fit each image?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mlx_aimv2.commands.image_flags import add_policy_arguments, policy_of
from mlx_aimv2.config import LIT_CHECKPOINT
from mlx_aimv2.device import AUTO
from mlx_aimv2.find_images import shown
from mlx_aimv2.loading import DTYPES, load
from mlx_aimv2.zero_shot_classifier import TEMPLATES, Prediction, ZeroShotClassifier, check_labels, check_templates

HELP = "say which of your words fit each image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "-m",
        "--model",
        default=LIT_CHECKPOINT,
        metavar="X",
        help="checkpoint with a text encoder: Hub name, folder or weight file (default: %(default)s)",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: Apple's release, pinned)")
    parser.add_argument("--labels", metavar="A,B,…", help="the words, separated by commas")
    parser.add_argument("--labels-file", metavar="FILE", help="the words, one a line; here they may hold commas")
    parser.add_argument(
        "--template",
        action="append",
        metavar="T",
        help=f"sentence with {{}} for the label; may be given several times (default: {TEMPLATES[0]!r})",
    )
    parser.add_argument("-k", "--top", type=int, metavar="N", help="labels shown for each (default: 5, JSON: all)")
    parser.add_argument("--dtype", choices=[*DTYPES, AUTO], help="dtype to compute in (default: the checkpoint's)")
    add_policy_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each image")


def run(arguments: argparse.Namespace) -> int:
    """Prints the best labels of each image; returns 1 when some could not be read."""
    if arguments.top is not None and arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    policy = policy_of(arguments)
    labels = check_labels(_labels(arguments.labels, arguments.labels_file))  # before the model, which takes longer
    templates = check_templates(arguments.template or TEMPLATES)
    model, processor = load(arguments.model, revision=arguments.revision, dtype=arguments.dtype)
    classifier = ZeroShotClassifier(model, processor, labels, templates=templates)
    failures = 0
    for image, result in zip(arguments.images, classifier.each(arguments.images, policy=policy), strict=True):
        if isinstance(result, Prediction):
            spell = _as_json if arguments.json else _as_text
            print(spell(image, result, arguments.top), flush=True)
        else:
            failures += 1
            print(f"mlx-aimv2: {' '.join(str(result).split())}", file=sys.stderr)
    return 1 if failures else 0


def _labels(listed: str | None, file: str | None) -> list[str]:
    if listed is None and file is None:
        raise ValueError("no labels: give --labels cat,dog or --labels-file FILE")
    labels = listed.split(",") if listed is not None else []
    if file is not None:
        try:
            labels += Path(file).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{file} does not exist: --labels-file takes a text file with a label a line"
            ) from None
    return [label.strip() for label in labels if label.strip()]


def _as_text(image: str, prediction: Prediction, count: int | None) -> str:
    best = prediction.top(count or 5)
    return "\n".join([shown(image), *(f"{100 * probability:7.2f} %  {label}" for label, probability in best)])


def _as_json(image: str, prediction: Prediction, count: int | None) -> str:
    logits = dict(zip(prediction.labels, prediction.logits.tolist(), strict=True))
    best = prediction.top(count)
    labels = [{"label": label, "probability": probability, "logit": logits[label]} for label, probability in best]
    return json.dumps({"path": shown(image), "labels": labels}, ensure_ascii=False)
