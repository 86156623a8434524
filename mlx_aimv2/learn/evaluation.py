"""Scores a head on labelled images, lets it predict for new ones, and writes the model card of a head folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_aimv2.conversion.model_card import front_matter
from mlx_aimv2.embed.encode import OnFailure, listed_files, raise_failure
from mlx_aimv2.files import atomic_folder, check_target, expand_user, stems_below
from mlx_aimv2.learn.head_folder import Head, load_head
from mlx_aimv2.learn.learner import decoded, outputs_of_files, outputs_of_learner
from mlx_aimv2.learn.samples import seen
from mlx_aimv2.learn.task import Task

MARKUP = re.compile(r"[\\`*\[\]<>!|&:]")
"""What makes images, links, code and HTML of text in Markdown, and what ends a cell."""


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, of how many images, the part of DATA that they are from, a table by class, and notes on DATA.

    `left_out` has a line for each thing in DATA that was left out.
    """

    scores: dict[str, float]
    images: int
    part: str
    table: list[list[str]]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def evaluate(
    head: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    model: str | None = None,
    dtype: str | None = None,
    card: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
) -> Evaluation:
    """Scores a head folder on labelled images: `HEAD, DATA -> Evaluation`.

    Of DATA with parts `test` counts, else `val`, else `train`; without parts all images. `card` is a folder for the
    card's images, which must not exist yet. DataError, a ValueError, lists everything that is wrong with DATA, labels
    that the head does not know among it; with `skip_broken` images that cannot be read are left out.
    """
    target = None if card is None else expand_user(card)
    if target is not None:
        check_target(target)
    loaded = load_head(head, model=model, dtype=dtype)
    classes, results = loaded.classes, loaded.task.results
    dataset = loaded.task.data.read(expand_user(data), classes=classes, skip_broken=skip_broken)
    part, samples = dataset.to_score()
    predictions = decoded(loaded.task, samples, outputs_of_learner(loaded.learner, samples, loaded.processor))
    if target is not None:
        with atomic_folder(target) as folder:
            results.card(samples, predictions, classes, folder)
    scores, table = results.score(samples, predictions, classes)
    notes = (*dataset.notes, *seen(samples, loaded.trained_on))
    return Evaluation(scores, len(samples), part, table, notes, dataset.left_out)


def predict(
    head: str | os.PathLike[str] | Head,
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    model: str | None = None,
    dtype: str | None = None,
    on_failure: OnFailure | None = None,
) -> Iterator[tuple[str, Any]]:
    """Predictions for files, folders and patterns: `HEAD, images -> (path, prediction) …`, sorted by name.

    The prediction is the task's own; for `classify` it has `probabilities` (classes,). An image that cannot be read
    raises ValueError, or is passed to `on_failure(path, reason)`, as `embed` does it, and left out.
    """
    fail = on_failure or raise_failure
    loaded = head if isinstance(head, Head) else load_head(head, model=model, dtype=dtype)
    for image, outputs in outputs_of_files(loaded.learner, listed_files(images, fail), loaded.processor, fail):
        yield image.path, loaded.task.results.decode(outputs, image.upright)


@contextmanager
def saving(
    head: Head, given: Iterable[str | os.PathLike[str]], files: Sequence[str], output: Path
) -> Iterator[Callable[[str, Any], None]]:
    """A function that writes a file's prediction, `(path, prediction)`, into the folder `output`.

    A file below a folder that was `given` keeps its path in there. The folder must not exist yet, and appears when all
    is written.
    """
    stems = stems_below(given, files)
    records: list[Any] = []
    with atomic_folder(output) as folder:

        def save(path: str, prediction: Any) -> None:
            stem = folder / stems[path]
            stem.parent.mkdir(parents=True, exist_ok=True)
            records.append(head.task.results.save_prediction(path, prediction, head.classes, stem))

        yield save
        head.task.results.save_all(records, head.classes, folder)


def write_card(
    folder: Path,
    info: Mapping[str, Any],
    task: Task,
    table: Sequence[Sequence[str]],
    shown: Sequence[tuple[str, str]],
    *,
    name: str,
) -> None:
    """Writes README.md into a head folder: the scores, the table of the last part, images by title and file name."""
    encoder, metrics = info["encoder"], info["metrics"]
    at = f"`{Path(encoder['checkpoint']).name}`"  # of a path the last part alone
    if encoder.get("commit"):
        at = f"`{encoder['checkpoint']}` at commit `{encoder['commit']}`"
    names = list(dict.fromkeys(name for scores in metrics.values() for name in scores))
    rows = [["part", "images", *names]]
    for part, scores in metrics.items():
        values = (f"{100 * scores[name]:.2f} %" if name in scores else "none" for name in names)
        rows.append([part, f"{info['images'][part]:,}", *values])
    images = "".join(f"## {title}\n\n![{title}]({file})\n\n" for title, file in shown)
    text = f"""\
{front_matter({"library_name": "mlx", "pipeline_tag": task.pipeline_tag, "tags": ["mlx", "aimv2"]})}

# {_as_text(name)}

A head for {task.pipeline_tag.split("-")[1]} on {at}, trained with mlx-aimv2 {info["versions"]["mlx-aimv2"]} \
(`--fine-tune-type {info["fine_tune_type"]}`) on images: \
{", ".join(f"{count:,} {which}" for which, count in info["images"].items())}.
The encoder's licence holds for what is made with it; its weights are not in this folder\
{", but the changed ones are" if info["fine_tune_type"] == "full" else ""}.

## Result

{_markdown(rows)}

`val` chose the settings and the best step, so its numbers flatter a little\
{"; `test` chose nothing" if "test" in metrics else ""}.

## By class, on {part}

{_markdown(table)}

{images}## Use

```sh
mlx-aimv2 predict {name} IMAGE
mlx-aimv2 evaluate {name} DATA
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header; numbers stand at the right, and labels as they are written."""
    header, *rest = ([_as_text(cell) for cell in row] for row in rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rest))


def _as_text(label: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return MARKUP.sub(r"\\\g<0>", " ".join(label.split()))
