"""Runs `mlx-aimv2 fit`: learns your labels from a folder of images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack

from mlx_aimv2 import cli
from mlx_aimv2.commands.flags import MODEL, RESUME, add_dtype, add_revision, add_seed

HELP = "learn your labels from a folder of images"

EXAMPLE = "photos/ -m apple/aimv2-large-patch14-224 -o my-labels"

OWN = {"verb", "data", "model", "output", "json", "labels"}
"""Arguments that are no keyword of `learn.fit` of the same kind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb, which are the keywords of `learn.fit`."""
    add = parser.add_argument_group("data").add_argument
    add("data", metavar="DATA", help="folder of images with labels, masks or boxes")
    add("--labels", metavar="A,B,…", help="the list that every label of DATA must be in")
    add("--image-size", type=int, metavar="N", help="side of the images in pixels (default: the checkpoint's)")

    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", required=True, metavar="MODEL", help=f"encoder: {MODEL}")
    add_revision(add)
    add_dtype(add, "the checkpoint's, for full float32")

    add = parser.add_argument_group("what is trained").add_argument
    add("--task", metavar="NAME", help="classify, segment or detect (default: guessed from DATA)")
    add(
        "--fine-tune-type",
        metavar="NAME",
        help="linear, attentive, knn, decoder, lora, dora, full (default: by task)",
    )
    add("--recipe", metavar="NAME", help="paper: the attentive probe as AIMv2's authors trained it")
    add("--num-layers", type=int, metavar="N", help="train the last N blocks alone; -1 for all (default)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, metavar="N", help="images of a step, on all ranks")
    add("--iters", type=int, metavar="N", help="steps")
    add("--epochs", type=int, metavar="N", help="passes through the images, instead of --iters")
    add("--learning-rate", type=float, metavar="X", help="highest rate (default: a sweep, or the type's)")
    add("--weight-decay", type=float, metavar="X", help="of AdamW (default: the type's)")
    add("--layer-decay", type=float, metavar="X", help="full: each block learns X times as fast as the next one")
    add("--grad-checkpoint", action="store_true", help="less memory: compute each block again for its gradient")
    add("--grad-accumulation-steps", type=int, default=1, metavar="N", help="batches of a step (default: 1)")

    add = parser.add_argument_group("augmentation").add_argument
    add("--no-augment", dest="augment", action="store_false", help="train on the images as they are")
    add("--flip", action="store_true", help="mirror half of the images in training")
    add("--mixup", type=float, default=0.0, metavar="X", help="mix images by Beta(X, X) (default: 0, off)")
    add("--mask-ratio", type=float, default=0.0, metavar="X", help="share of patches hidden in training (default: 0)")
    add("--drop-path", type=float, metavar="X", help="share of images that skip the last block, less before it")

    add = parser.add_argument_group("adapters, of lora and dora").add_argument
    add("--lora-rank", type=int, metavar="N", help="width of the adapters (default: 8)")
    add("--lora-scale", type=float, metavar="X", help="weight of the adapters (default: 20)")
    add("--lora-dropout", type=float, metavar="X", help="dropout before the adapters (default: 0)")
    add("--adapter-path", metavar="HEAD", help="begin with the adapters in this folder")

    add = parser.add_argument_group("run").add_argument
    add("--steps-per-eval", type=int, metavar="N", help="steps between evaluations (default: a twentieth of all)")
    add("--patience", type=int, metavar="N", help="stop after N evaluations without a better one; 0: never")
    add_seed(add)
    add("--resume", action="store_true", help=RESUME)
    add("--cache", metavar="DIR", help="where features are kept (default: in ~/.cache/mlx-aimv2)")

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", required=True, metavar="HEAD", help="folder to write")
    add("--json", action="store_true", help="print the scores as JSON")


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
