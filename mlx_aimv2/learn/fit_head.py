"""From labelled images to a head folder: read and check the data, train, score, write.

DATA -> Dataset -> features or pixels -> head -> scores on the parts held out -> HEAD
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_aimv2 import __version__, plot
from mlx_aimv2.backend import prepared
from mlx_aimv2.backend.device import AUTO, slow_here
from mlx_aimv2.conversion.model_card import front_matter
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.embed.loader import MIN_PATCHES
from mlx_aimv2.files import atomic_folder, expand_user
from mlx_aimv2.learn import head_folder
from mlx_aimv2.learn.learner import Learner, decoded
from mlx_aimv2.learn.probes import train_on_features
from mlx_aimv2.learn.samples import (
    FOLDS,
    HELD_OUT,
    DataError,
    Dataset,
    Recognised,
    listed,
    one_image,
    same_form,
    short,
)
from mlx_aimv2.learn.task_options import RECIPES, Options, Task, check_options, find_task, guess_task, score_text
from mlx_aimv2.learn.training import Run, Trained, fine_tune
from mlx_aimv2.loading import at_size, read_source
from mlx_aimv2.train.state import StateFile, digest_of, discard, training_run

UNEQUAL = 10
"""How many times as many images as another a label may have without a note."""

NOTHING = "no image was held out, because no label has two: the head's quality is unknown"


@dataclass(frozen=True)
class Fitted:
    """A finished run: the head folder, its scores by part, how many images each part has, and one line that says so."""

    folder: Path
    scores: dict[str, dict[str, float]]
    images: dict[str, int]
    line: str
    left_out: tuple[str, ...] = ()
    """A line for each thing in DATA that was left out."""


@prepared()
def fit(
    data: str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    task: str | None = None,
    fine_tune_type: str | None = None,
    labels: Sequence[str] | None = None,
    revision: str | None = None,
    dtype: str | None = AUTO,
    cache: str | os.PathLike[str] | None = None,
    resume: bool = False,
    skip_broken: bool = False,
    say: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
    **settings: Any,
) -> Fitted:
    """Trains a head, or an encoder with one, on labelled images: `DATA, MODEL, HEAD -> Fitted`.

    `task` is guessed from DATA and `fine_tune_type` is the task's default where they are None. `settings` are the
    fields of `task_options.Options`: `epochs=5`. `dtype` is `load`'s; in full, auto is float32. `labels` is the list
    of allowed labels. `say` receives a line for each thing worth knowing; `on_progress` takes the images or steps done,
    their total, and the unit. With `resume` a stopped run continues. With `skip_broken` unreadable images are left out;
    HEAD/left_out.txt lists what was.

    Raises DataError (a ValueError) with everything that is wrong with the data, ValueError for options that
    contradict each other or a loss that is not a number, FileExistsError if HEAD exists, OSError for a full disk.
    Nothing is left at HEAD unless the run was complete.
    """
    started = time.monotonic()
    options, source, target, ranks = Options(**settings), expand_user(data), expand_user(output), Ranks()
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: give the folder with the labelled images")
    if ranks.rank > 0:  # only the first one reports
        say, on_progress = (lambda line: None), (lambda done, total, unit: None)
    with training_run(target, resume=resume, rank=ranks.rank) as training:
        found, kind, recognised = _task(source, task, fine_tune_type, say)
        check_options(options, found, kind)
        how: dict[str, Any] = {"decode": skip_broken or found.types[kind].features is None, "skip_broken": skip_broken}
        is_solved = not found.types[kind].learning_rates
        how["holdout"] = options.holdout or (None if is_solved else HELD_OUT)
        dataset = _dataset(found, source, labels, say, recognised=recognised, **how)
        if not is_solved and not dataset.splits["val"] and not dataset.splits["test"]:
            needs = "knn and linear need only one image per label, the others need one more to hold out"
            raise DataError([f"{source} has no label with two images: {needs}"])
        loaded = read_source(model, revision=revision).load(dtype=_dtype(kind, dtype))
        if (slow := slow_here(loaded.model.dtype)) is not None:
            say(f"note: {slow}")
        encoder, processor = at_size(loaded.model.vision, loaded.processor, options.image_size, whole=found.dense)
        described = head_folder.describe_encoder(loaded, processor)
        del loaded  # otherwise a pair's text encoder would stay in memory
        rows, columns = processor.grid
        if encoder.config.num_patches is None and rows * columns < MIN_PATCHES:
            say(f"note: images of {rows} x {columns} patches; the checkpoint was trained on {MIN_PATCHES} and more")
        run = Run(
            task=found,
            kind=kind,
            dataset=dataset,
            encoder=encoder,
            processor=processor,
            options=options,
            type=options.over(RECIPES[options.recipe] if options.recipe else found.types[kind]),
            described=described,
            state=StateFile(training, _identity(found, kind, described, dataset, options)),
            ranks=ranks,
            cache=Path(cache) if cache is not None else None,
            say=say,
            on_progress=on_progress,
        )
        mx.random.seed(options.seed)
        trained = train_on_features(run) if run.type.features else fine_tune(run)
        if ranks.rank > 0:
            return Fitted(target, {}, {}, "")
        fitted = _written(target, run, trained, seconds=time.monotonic() - started)
        discard(training)
        return fitted


def _written(target: Path, run: Run, trained: Trained, *, seconds: float) -> Fitted:
    """Scores the head on each held-out part, of which the last one counts, and writes its folder."""
    task, splits, classes = run.task, run.dataset.splits, run.dataset.classes
    scores: dict[str, dict[str, float]] = {}
    held_out = splits["val"] or (splits["test"] if run.dataset.is_crossed else [])
    if held_out and not task.dense:
        task.head.calibrate(trained.head, np.stack([one["logits"] for one in trained.outputs(held_out)]), held_out)
    for part in [name for name, samples in splits.items() if name != "train" and samples]:
        predictions = decoded(task, splits[part], trained.outputs(splits[part]))
        scores[part], table = task.results.score(splits[part], predictions, classes)
    if not scores:
        part, predictions, table = "train", [], []
    if advice := _imbalance(run, trained, part):
        run.say(f"note: {advice.replace('`', '')}")
    learned = splits["train"]
    if run.options.refit and trained.refit is not None and not run.dataset.is_crossed:
        before = trained.head
        learned = [sample for samples in splits.values() for sample in samples]
        head, options = trained.refit(learned)
        trained = replace(trained, head=head, head_options=options)
        if task.name != "regression":  # whose units come from the training images
            trained.head.take(before.options(), len(classes))
    images = {part: len(samples) for part, samples in splits.items()}
    info = {
        "task": task.name,
        "fine_tune_type": run.kind,
        "classes": list(classes),
        "options": trained.head_options | ({} if task.dense else trained.head.options()),
        "encoder": run.described,
        "image_size": run.processor.canvas[0],
        "images": images,
        "metrics": scores,
        "settings": {name: getattr(run.options, name) for name in run.options.given()} | trained.settings,
        "history": trained.history,
        "is_crossed": run.dataset.is_crossed,
        "is_refit": learned is not splits["train"],
        "seconds": round(seconds, 1),
        "versions": {"mlx-aimv2": __version__},
    }
    learner = Learner(run.encoder, trained.head)
    with atomic_folder(target) as place:
        head_folder.save(place, info, learner, adapters=trained.adapters, trained_on=learned)
        shown = task.results.card(splits[part], predictions, classes, place) if scores else []
        shown = [*shown, *_curves(trained.history, place)]
        _write_card(place, info, task, table, shown, name=target.name, advice=advice)
        if left_out := run.dataset.left_out:
            lines = "".join(line.replace("\n", "\\n") + "\n" for line in left_out)
            (place / "left_out.txt").write_text(lines, encoding="utf-8", errors="backslashreplace")
    line = result_line(task, scores[part], part, images[part], is_crossed=run.dataset.is_crossed) if scores else NOTHING
    return Fitted(target, scores, images, line, left_out)


def _imbalance(run: Run, trained: Trained, part: str) -> str:
    """A note on labels with very different numbers of images, "" if they are similar."""
    targets, classes = [sample.target for sample in run.dataset.splits["train"]], run.dataset.classes
    if run.task.name != "classify" or max(counts := Counter(targets).values()) <= UNEQUAL * min(counts):
        return ""
    text = f"Labels have from {min(counts):,} to {one_image(max(counts))} for training"
    if run.is_balanced:
        return f"{text}; classes are weighted to count equally."
    if trained.balanced is None or part == "train":
        return f"{text}: `--class-weights balanced --metric mean_class` would count each equally."
    samples = run.dataset.splits[part]
    scores, _ = run.task.results.score(samples, decoded(run.task, samples, trained.balanced()(samples)), classes)
    would = ", ".join(f"{name} {100 * scores[name]:.2f} %" for name in run.task.metrics)
    return f"{text}. With `--class-weights balanced`, which counts each equally, the scores on {part} would be {would}."


def result_line(task: Task, scores: dict[str, float], part: str, count: int, *, is_crossed: bool = False) -> str:
    """The honest result: the score, the number of images, its uncertainty, and what it was chosen on."""
    value = scores[task.metric]
    of = f"{one_image(count)}, cross-validated in {FOLDS} folds" if is_crossed else one_image(count, f"{part} image")
    text = f"{task.metric} {score_text(task.metric, value)} on {of}"
    if task.metric == "top1":  # the interval in which the true share lies with 95 % confidence (Wilson 1927)
        z = 1.96
        whole, middle = 1 + z * z / count, value + z * z / (2 * count)
        half = z * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
        low, high = max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)
        text += f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    text += "".join(f", {name} {score_text(name, score)}" for name, score in scores.items() if name != task.metric)
    flattered = "; chosen on the same images, so slightly optimistic: a test part would show"
    return text + (flattered if part == "val" else "")


def _curves(history: Sequence[Mapping[str, float]], folder: Path) -> list[tuple[str, str]]:
    """`training.png`: losses, score and learning rate of each evaluation; none for a head without a training loop."""
    charts = []
    for names in (("loss", "val_loss"), ("score",), ("rate",)):
        rows = {name: [one for one in history if name in one and (name != "loss" or one["step"])] for name in names}
        lines = {
            name: (np.array([one["step"] for one in own]), np.array([one[name] for one in own]))
            for name, own in rows.items()
            if own
        }
        if lines:
            charts.append(plot.curves(lines, x="step", y=names[0]))
    if not charts:
        return []
    plot.below(charts).save(folder / "training.png")
    return [("Training: losses, score on val, learning rate", "training.png")]


def _write_card(
    folder: Path,
    info: Mapping[str, Any],
    task: Task,
    table: Sequence[Sequence[str]],
    shown: Sequence[tuple[str, str]],
    *,
    name: str,
    advice: str,
) -> None:
    """Writes README.md into a head folder: the scores, the table of the last part, images by title and file name."""
    encoder, metrics = info["encoder"], info["metrics"]
    at = f"`{Path(encoder['checkpoint']).name}`"  # only the last part of a path
    if encoder.get("commit"):
        at = f"`{encoder['checkpoint']}` at commit `{encoder['commit']}`"
    names = list(dict.fromkeys(name for scores in metrics.values() for name in scores))
    rows = [["part", "images", *names]]
    part = "train"
    for part, scores in metrics.items():
        values = (score_text(name, scores[name]) if name in scores else "none" for name in names)
        rows.append([part, f"{info['images'][part]:,}", *values])
    told = {
        "`val` chose the settings and the best step, so its numbers are slightly optimistic": "val" in metrics,
        "`test` chose nothing": "test" in metrics and "val" in metrics,
        f"each image of `test` was scored by one of {FOLDS} heads that never saw it, and the head is trained on all of "
        "them": info["is_crossed"],
        "then the head was fitted once more on all images, and the numbers are those from before": info["is_refit"],
        NOTHING: not metrics,
    }
    words = "; ".join(sentence for sentence, holds in told.items() if holds)
    settings = ", ".join(f"{name} {value}" for name, value in info["settings"].items() if value is not None)
    by_class = f"## In detail, on {part}\n\n{_markdown(table)}\n\n" if table else ""
    images = "".join(f"## {title}\n\n![{title}]({file})\n\n" for title, file in shown)
    text = f"""\
{front_matter({"library_name": "mlx", "pipeline_tag": task.pipeline_tag, "tags": ["mlx", "aimv2"]})}

# {_as_text(name)}

A head for {task.pipeline_tag.split("-")[1]} on {at}, trained with mlx-aimv2 {info["versions"]["mlx-aimv2"]} \
(`--fine-tune-type {info["fine_tune_type"]}`) on images: \
{", ".join(f"{count:,} {which}" for which, count in info["images"].items())}.
The encoder's licence applies to anything made with it; its weights are not in this folder\
{", but the changed ones are" if info["fine_tune_type"] == "full" else ""}.

## Result

{_markdown(rows)}

{words[:1].upper()}{words[1:]}.{f" {advice}" if advice else ""}
Settings: {_as_text(settings) or "the defaults"}.

{by_class}{images}## Use

```sh
mlx-aimv2 predict {name} IMAGE
mlx-aimv2 evaluate {name} DATA
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header; numbers are right-aligned, labels unchanged."""
    header, *rest = ([_as_text(cell) for cell in row] for row in rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rest))


def _as_text(label: str) -> str:
    """Text that Markdown shows literally, on one line."""
    # What makes images, links, code and HTML of text, and what ends a cell.
    return re.sub(r"[\\`*\[\]<>!|&:]", r"\\\g<0>", " ".join(label.split()))


def _dtype(kind: str, dtype: str | None) -> str | None:
    """The dtype to train in: the steps of full fine-tuning are too small for half precision."""
    if kind != "full":
        return dtype
    if dtype not in (None, AUTO, "float32"):
        raise ValueError(f"--fine-tune-type full needs --dtype float32, got {dtype}; lora and dora do not")
    return "float32"


def _task(
    source: Path, name: str | None, kind: str | None, say: Callable[[str], None]
) -> tuple[Task, str, Recognised | None]:
    task, recognised = guess_task(source) if name is None else (find_task(name), None)
    if recognised is not None:
        say(f"task {task.name}: {source} has {recognised.reason}")
    default, *others = task.types
    if kind is None:
        say(f"fine-tune type {default}, the default of {task.name}; others: {listed(others)}")
    return task, kind or default, recognised


def _dataset(task: Task, source: Path, labels: Sequence[str] | None, say: Callable[[str], None], **how: Any) -> Dataset:
    dataset = task.data.read(source, **how)
    allowed = [same_form(name) for name in labels or dataset.classes]
    if labels is not None and (unknown := [name for name in dataset.classes if name not in allowed]):
        raise DataError([f"the label {short(name)} is not in the list {listed(labels)}" for name in unknown])
    counts = ", ".join(f"{len(samples):,} {part}" for part, samples in dataset.splits.items() if samples)
    say(f"{one_image(len(dataset.classes), 'label')}: {listed(dataset.classes)}; {counts}")
    for note in dataset.notes:
        say(f"note: {note}")
    return dataset


def _identity(task: Task, kind: str, encoder: dict[str, Any], dataset: Dataset, options: Options) -> dict[str, Any]:
    """What must stay the same when a run is resumed; the learning rate may be lowered."""
    about: dict[str, Any] = {"task": task.name, "fine_tune_type": kind, "ranks": Ranks().size}
    about |= {"encoder": encoder["weights"]["digest"][:16], "dtype": encoder["dtype"]}
    about |= {"preprocessing": encoder["preprocessing"]}
    for part, samples in dataset.splits.items():
        about[f"{part}_images"] = digest_of([sample.sha256 for sample in samples])
        about[f"{part}_labels"] = digest_of([dataset.classes, *(_content(sample.target) for sample in samples)])
    if options.adapter_path is not None:
        about["adapters"] = digest_of(sorted(Path(options.adapter_path).glob("adapter*")))
    may_change = ("learning_rate", "patience", "adapter_path")
    return about | {name: value for name, value in asdict(options).items() if name not in may_change}


def _content(target: Any) -> Any:
    """A sample's label; texts are the names of masks, whose content counts."""
    if isinstance(target, tuple):
        return tuple(map(_content, target))
    return Path(target) if isinstance(target, str) else target
