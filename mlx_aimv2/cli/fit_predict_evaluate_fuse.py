"""`mlx-aimv2 fit` learns your labels; `predict`, `evaluate` and `fuse` use the folder that it writes, HEAD."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_aimv2.cli.flags import MODEL, Add, add_dtype, add_resume, add_revision, add_settings, add_skip_broken, groups
from mlx_aimv2.cli.output import Failures, begin, note, progress, say, show, show_json
from mlx_aimv2.files import check_target, expand_user

OWN = {"verb", "data", "model", "output", "json", "labels"}
"""Arguments of `fit` that are not passed to `learn.fit` unchanged."""

HEAD, OF_HEAD = "folder written by fit", "the one HEAD names"


def add_fit(parser: argparse.ArgumentParser) -> None:
    from mlx_aimv2.learn.task_options import ADAPTERS, Options

    add = groups(parser, "data", "model", "what is trained", "optimisation", "augmentation", ADAPTERS, "run", "output")
    add["data"]("data", metavar="DATA", help="folder of images with labels, masks or boxes")
    add_skip_broken(add["data"])
    add["data"]("--labels", metavar="A,B,…", help="allowed labels; any other label in DATA is an error")
    add["model"]("-m", "--model", required=True, metavar="MODEL", help=f"encoder: {MODEL}")
    add_revision(add["model"])
    add_dtype(add["model"])
    tasks = "classify, segment or detect (default: guessed from DATA); multilabel, regression"
    types = "linear, attentive, knn, decoder, lora, dora, full (default: by task)"
    add["what is trained"]("--task", metavar="NAME", help=tasks)
    add["what is trained"]("--fine-tune-type", metavar="NAME", help=types)
    add_settings(add, Options)
    add_resume(add["run"])
    add["run"]("--cache", metavar="DIR", help="folder for cached features (default: in ~/.cache/mlx-aimv2)")
    add["output"]("-o", "--output", required=True, metavar="HEAD", help="folder to write")
    add["output"]("--json", action="store_true", help="print the scores as JSON")


def run_fit(arguments: argparse.Namespace) -> int:
    """Trains and prints the result."""
    from mlx_aimv2.learn import fit

    keywords = {name: value for name, value in vars(arguments).items() if name not in OWN}
    labels = None if arguments.labels is None else [label.strip() for label in arguments.labels.split(",")]
    begin("scanning")
    with progress() as on_progress, faults_as_json(arguments):
        fitted = fit(
            arguments.data,
            arguments.model,
            arguments.output,
            labels=labels,
            say=say,
            on_progress=on_progress,
            **keywords,
        )
    if not fitted.line:  # another rank prints
        return 0
    if arguments.json:
        found = {"head": str(fitted.folder), "metrics": fitted.scores, "images": fitted.images}
        show_json(found | {"left_out": fitted.left_out})
    else:
        show(fitted.line)
        show(str(fitted.folder))
    return 0


def add_predict(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "input", "model", "output")
    add["input"]("head", metavar="HEAD", help=HEAD)
    add["input"]("images", nargs="+", metavar="IMAGE", help="image file, folder or pattern")
    _add_encoder(add["model"])
    words = "also write the predictions as files, into a new folder"
    add["output"]("-o", "--output", type=expand_user, metavar="DIR", help=words)
    words = "leave out labels and boxes less probable than X, from 0 to 1 (none left: none of these)"
    add["output"]("--min-score", type=float, metavar="X", help=words)
    add["output"]("--json", action="store_true", help="print a JSON object per image, one per line")


def run_predict(arguments: argparse.Namespace) -> int:
    """Prints a prediction for each image; returns 1 if some could not be read."""
    from mlx_aimv2.learn import predict
    from mlx_aimv2.learn.head_folder import load_head

    fail = Failures()
    if (output := arguments.output) is not None:
        check_target(output)  # before the model is loaded, which takes longer
    head = load_head(arguments.head, model=arguments.model, dtype=arguments.dtype)
    for path, found in predict(head, arguments.images, output=output, min_score=arguments.min_score, on_failure=fail):
        if arguments.json:
            show_json({"path": path, **head.task.results.as_json(found, head.classes)})
        else:
            for line in (path, *head.task.results.as_text(found, head.classes).split("\n")):
                show(line)
    return 1 if fail else 0


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "input", "model", "output")
    add["input"]("head", metavar="HEAD", help=HEAD)
    add["input"]("data", metavar="DATA", help="labelled images, as for fit; if it has parts, test is scored, else val")
    add_skip_broken(add["input"])
    _add_encoder(add["model"])
    add["output"]("--card", metavar="DIR", help="write the model card's pictures for this data here")
    add["output"]("--json", action="store_true", help="print the scores as JSON")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Prints the scores and the table by class."""
    from mlx_aimv2.learn import evaluate
    from mlx_aimv2.learn.task_options import score_text

    keywords = {name: getattr(arguments, name) for name in ("model", "dtype", "card", "skip_broken")}
    with faults_as_json(arguments):
        found = evaluate(arguments.head, arguments.data, **keywords)
    for line in found.notes:
        note(line)
    if arguments.json:
        show_json({"part": found.part, "images": found.images, **found.scores, "left_out": found.left_out})
        return 0
    widths = [max(map(len, column)) for column in zip(*found.table, strict=True)]
    for first, *rest in found.table:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        show("  ".join([first.ljust(widths[0]), *cells]))
    scores = ", ".join(f"{name} {score_text(name, score)}" for name, score in found.scores.items())
    show(f"{scores} on {found.images:,} images")
    return 0


@contextmanager
def faults_as_json(arguments: argparse.Namespace) -> Iterator[None]:
    """Inside this context --json prints everything wrong with DATA before the error, which names the first fault."""
    from mlx_aimv2.learn.samples import DataError

    try:
        yield
    except DataError as error:
        if arguments.json:
            show_json({"faults": error.lines})
        raise


def add_fuse(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "input", "output")
    words = f"{HEAD}, or adapters alone"
    add["input"]("--adapter-path", required=True, metavar="HEAD", help=words)
    _add_model(add["input"])
    add_revision(add["input"], OF_HEAD)
    words = "folder to write (default: %(default)s)"
    add["output"]("--save-path", default="fused_model", metavar="DIR", help=words)


def run_fuse(arguments: argparse.Namespace) -> int:
    """Fuses and prints the path of the result."""
    from mlx_aimv2.learn import fuse

    show(str(fuse(arguments.adapter_path, arguments.save_path, model=arguments.model, revision=arguments.revision)))
    return 0


def _add_model(add: Add) -> None:
    add("-m", "--model", metavar="MODEL", help=f"encoder: {MODEL} (default: {OF_HEAD})")


def _add_encoder(add: Add) -> None:
    _add_model(add)
    add_dtype(add, OF_HEAD)
