"""Reads the list of checkpoints, published.toml, and completes it with the sizes and commits of `config.RELEASED`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # the extra `test` brings it
    import tomli as tomllib

from mlx_aimv2.config import RELEASED

FILE = Path(__file__).parent / "published.toml"


@dataclass(frozen=True)
class Row:
    """One checkpoint. `expected` are published values of its features on the list's image, None where there are none.

    `repo`, `commit` and `parameters` of a released checkpoint come from `config.RELEASED`; `commit` is None for a
    folder on disk.
    """

    name: str
    repo: str
    parameters: int
    commit: str | None = None
    imagenet: float | None = None
    expected_shape: tuple[int, ...] | None = None
    expected: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class ReferenceImage:
    """The image on which values were published: (width, height) tells a copy of another size apart."""

    name: str
    url: str
    size: tuple[int, int]


def read(file: Path = FILE) -> tuple[list[Row], ReferenceImage]:
    """The rows and the image of a list: `file -> (rows, image)`."""
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    return [Row(**_released(row["name"]) | _frozen(row)) for row in content["checkpoint"]], ReferenceImage(
        **_frozen(content["image"])
    )


def choose(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The rows of these names, with or without `apple/`; all of them where no name is given. Raises ValueError."""
    by_name = {row.name: row for row in rows} | {row.repo: row for row in rows}
    if unknown := [name for name in names if name not in by_name]:
        known = ", ".join(dict.fromkeys(row.name for row in by_name.values()))
        raise ValueError(f"no such checkpoint: {', '.join(unknown)}; there are {known}")
    return [by_name[name] for name in names] or list(dict.fromkeys(by_name.values()))


def _released(name: str) -> dict[str, Any]:
    known = RELEASED.get(name)
    return {} if known is None else {"repo": f"apple/{name}", "commit": known.commit, "parameters": known.parameters}


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return {key: freeze(value) for key, value in table.items()}
