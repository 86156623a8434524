"""The model card of a head folder: the result, the table by class, images of the worst, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_aimv2.conversion.model_card import front_matter
from mlx_aimv2.learn.samples import Sample

if TYPE_CHECKING:
    from mlx_aimv2.learn.task import Task


def write(
    folder: Path,
    info: Mapping[str, Any],
    task: Task,
    samples: Sequence[Sample],
    predictions: Sequence[Any],
    *,
    part: str,
    name: str,
) -> None:
    """Writes README.md and its images into the folder."""
    images = task.results.card(samples, predictions, info["classes"], folder)
    encoder = info["encoder"]
    commit = f" at commit `{encoder['commit']}`" if encoder.get("commit") else ""
    counts = ", ".join(f"{count:,} {which}" for which, count in info["images"].items())
    lines = [
        front_matter({"library_name": "mlx", "pipeline_tag": task.pipeline_tag, "tags": ["mlx", "aimv2"]}),
        "",
        f"# {name}",
        "",
        f"A head for {task.title} on `{_name(encoder)}`{commit}, trained with "
        f"mlx-aimv2 {info['versions']['mlx-aimv2']} (`--fine-tune-type {info['fine_tune_type']}`) on images: {counts}.",
        "The encoder's licence holds for what is made with it; its weights are not in this folder"
        + (", but the changed ones are." if info["fine_tune_type"] == "full" else "."),
        "",
        "## Result",
        "",
        *markdown_table(_score_rows(info["metrics"], info["images"])),
        "",
        "`val` chose the settings and the best step, so its numbers flatter a little; `test` chose nothing."
        if "test" in info["metrics"]
        else "`val` chose the settings and the best step, so its numbers flatter a little.",
        "",
        f"## By class, on {part}",
        "",
        *markdown_table(task.results.table(samples, predictions, info["classes"])),
        "",
    ]
    for title, file in images:
        lines += [f"## {title}", "", f"![{title}]({file})", ""]
    lines += ["## Use", "", "```sh", f"mlx-aimv2 predict {name} IMAGE", f"mlx-aimv2 evaluate {name} DATA", "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8", errors="replace")


def _name(encoder: Mapping[str, Any]) -> str:
    """A Hub name as it is, of a path the last part alone."""
    return str(encoder["checkpoint"] if encoder.get("commit") else Path(encoder["checkpoint"]).name)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is the header; numbers stand at the right."""
    header, *rest = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rest)]


def _score_rows(metrics: Mapping[str, Mapping[str, float]], images: Mapping[str, int]) -> list[list[str]]:
    names = list(dict.fromkeys(name for scores in metrics.values() for name in scores))
    rows = [["part", "images", *names]]
    for part, scores in metrics.items():
        values = (f"{100 * scores[name]:.2f} %" if name in scores else "none" for name in names)
        rows.append([part, f"{images[part]:,}", *values])
    return rows
