"""Runs `mlx-aimv2 fit`: learns your labels from a folder of images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack

from mlx_aimv2 import cli
from mlx_aimv2.config import DTYPES

HELP = "learn your labels from a folder of images"
EXAMPLE = "mlx-aimv2 fit photos -m apple/aimv2-large-patch14-224 -o my-labels"

OWN = {"verb", "data", "model", "output", "json", "labels"}
"""Arguments that are no keyword of `learn.fit` of the same kind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb, which are the keywords of `learn.fit`."""
    add = parser.add_argument
    add("data", metavar="DATA", help="folder of images with labels, masks or boxes")
    add("-m", "--model", required=True, metavar="MODEL", help="encoder: Hub name, folder or weight file")
    add("-o", "--output", required=True, metavar="HEAD", help="folder to write")
    add = parser.add_argument_group("what is learned").add_argument
    add("--task", metavar="T", help="classify, segment or detect (default: guessed from DATA)")
    add("--fine-tune-type", metavar="F", help="linear, attentive, knn, decoder, lora, dora or full (default: by task)")
    add("--recipe", metavar="R", help="paper: the attentive probe as AIMv2's authors trained it")
    add("--labels", metavar="A,B,…", help="the list that every label of DATA must be in")
    add("--image-size", type=int, metavar="N", help="pixels of a side (default: the checkpoint's own)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, metavar="N", help="images of a step, over all ranks")
    add("--iters", type=int, metavar="N", help="steps")
    add("--epochs", type=int, metavar="N", help="passes through the images, instead of --iters")
    add("--learning-rate", type=float, metavar="X", help="highest learning rate (default: a sweep, or the type's)")
    add("--weight-decay", type=float, metavar="X", help="weight decay of AdamW")
    add("--num-layers", type=int, metavar="N", help="train the last N blocks alone; -1 for all (default)")
    add("--layer-decay", type=float, metavar="X", help="full: each block learns X times as fast as the next one")
    add("--drop-path", type=float, metavar="X", help="share of images that skip the last block, less before it")
    add("--grad-checkpoint", action="store_true", help="less memory: compute each block again for its gradient")
    add("--grad-accumulation-steps", type=int, default=1, metavar="N", help="batches of a step (default: 1)")
    add("--steps-per-eval", type=int, metavar="N", help="steps between evaluations (default: a twentieth of all)")
    add("--patience", type=int, metavar="N", help="stop after N evaluations without a better one; 0: never")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    add = parser.add_argument_group("augmentation").add_argument
    add("--mask-ratio", type=float, default=0.0, metavar="X", help="share of patches hidden in training (default: 0)")
    add("--mixup", type=float, default=0.0, metavar="A", help="mix images by Beta(A, A) (default: 0, off)")
    add("--no-augment", dest="augment", action="store_false", help="train on the images as they are")
    add("--flip", action="store_true", help="mirror half of the images in training")
    add = parser.add_argument_group("adapters (lora, dora)").add_argument
    add("--lora-rank", type=int, metavar="N", help="width of the adapters (default: 8)")
    add("--lora-scale", type=float, metavar="X", help="weight of the adapters (default: 20)")
    add("--lora-dropout", type=float, metavar="X", help="dropout before the adapters (default: 0)")
    add("--adapter-path", metavar="DIR", help="begin with the adapters in this folder")
    add = parser.add_argument_group("run").add_argument
    add("--resume", action="store_true", help="go on with a run that was stopped")
    add("--revision", metavar="R", help="branch, tag or commit (default: Apple's release, pinned)")
    add("--dtype", choices=(*DTYPES, "auto"), help="dtype to compute in (default: the checkpoint's)")
    add("--cache", metavar="DIR", help="where features are kept (default: in ~/.cache/mlx-aimv2)")
    add("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Trains and prints the result."""
    from mlx_aimv2.learn import fit

    settings = {name: value for name, value in vars(arguments).items() if name not in OWN}
    labels = None if arguments.labels is None else [label.strip() for label in arguments.labels.split(",")]
    with ExitStack() as stack:
        running: list[ExitStack] = []

        def progress(total: int, unit: str) -> Callable[[int], None]:
            """Ends the bar before and begins the next one."""
            if running:
                running.pop().close()
            running.append(stack.enter_context(ExitStack()))
            advance, done = running[-1].enter_context(cli.progress(unit)), 0

            def count(more: int = 1) -> None:
                nonlocal done
                done += more
                advance(done, total)

            return count

        fitted = fit(
            arguments.data, arguments.model, arguments.output, labels=labels, say=cli.say, progress=progress, **settings
        )
    if not fitted.line:  # another rank prints
        return 0
    if arguments.json:
        result = {"head": str(fitted.folder), "metrics": fitted.scores, "images": fitted.images}
        print(json.dumps(result))
    else:
        cli.show(fitted.line)
        cli.show(str(fitted.folder))
    return 0
