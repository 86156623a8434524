"""What a task is: a module with these functions, as a command is one; and the table of the tasks there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy as np

from mlx_aimv2.learn.samples import DataError, Dataset, Sample

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_aimv2.processor import Aimv2Processor

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"

Labelled: TypeAlias = "tuple[np.ndarray[Any, Any], Sequence[Sample]]"
"""Features of samples, `(n, …)`, and the samples."""

TASKS = {
    "detect": "mlx_aimv2.learn.detect",
    "segment": "mlx_aimv2.learn.segment",
    "classify": "mlx_aimv2.learn.classify",
}
"""Name of a task -> its module, in the order in which DATA is tried."""


@dataclass(frozen=True)
class Defaults:
    """How a head or an encoder is trained where no flag says otherwise.

    On a frozen encoder several learning rates and weight decays are tried side by side, and the best on `val` is kept.
    """

    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = (0.05,)
    epochs: int = 0
    batch_size: int = 0
    warm_up_epochs: int = 1
    layer_decay: float = 1.0
    drop_path: float = 0.0


class Task(Protocol):
    """The functions and constants of a task's module."""

    NAME: str
    TYPES: tuple[str, ...]
    """Values of --fine-tune-type."""
    FROZEN: dict[str, str]
    """Those of them that leave the encoder as it is -> what is kept of an image, `mean` or `tokens`."""
    DEFAULTS: dict[str, Defaults]
    """How each type is trained."""
    DEFAULT_TYPE: str
    METRIC: str
    """Of the scores, the one that the best state goes by; higher is better."""
    NEEDS_SIZE: bool
    """Whether `decode` needs the size of the original image, which is (0, 0) otherwise."""
    TAKES_MASK: bool
    """Whether the heads can do without some of the patches."""

    def recognise(self, data: Path) -> str | None:
        """Why DATA is for this task, a phrase; None where it is not."""

    def read(self, data: Path, *, classes: Sequence[str] | None = None, decode: bool = True) -> Dataset:
        """DATA read and checked by `samples.read`; DataError with everything that is wrong."""

    def make_head(
        self, kind: str, *, classes: int, width: int, heads: int, patch_size: int, options: dict[str, Any]
    ) -> nn.Module:
        """A head, `head(tokens (B, N, D), grid) -> {name: (B, …)}`."""

    def example(
        self, sample: Sample, processor: Aimv2Processor, *, chance: np.random.Generator | None, flip: bool = False
    ) -> Arrays:
        """`pixels` (H, W, 3) and the targets of a sample, changed at random by `chance` if there is one."""

    def targets(self, sample: Sample, processor: Aimv2Processor) -> Arrays:
        """The targets alone, unchanged."""

    def loss(self, outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
        """One loss per image: `{name: (B, …)}, {name: (B, …)} -> (B,)`."""

    def solve(
        self, kind: str, train: Labelled, val: Labelled, classes: int, *, say: Callable[[str], None]
    ) -> nn.Module | None:
        """A head that is found without the training loop; None where the loop has to train it."""

    def decode(self, outputs: Arrays, sample: Sample | None, size: tuple[int, int]) -> Any:
        """One image's outputs as a prediction in the pixels of the original image of `size` (height, width)."""

    def score(self, samples: Sequence[Sample], predictions: Sequence[Any], classes: Sequence[str]) -> dict[str, float]:
        """All scores by name."""

    def as_json(self, prediction: Any, classes: Sequence[str]) -> dict[str, Any]:
        """A prediction for machines."""

    def as_text(self, prediction: Any, classes: Sequence[str]) -> str:
        """A prediction for people, one or more lines."""

    def save_prediction(self, path: str, prediction: Any, classes: Sequence[str], stem: Path) -> Any:
        """Writes what can be seen of an image's prediction as `STEM-…`; returns what `save_all` wants of it."""

    def save_all(self, records: Sequence[Any], classes: Sequence[str], folder: Path) -> None:
        """Writes what holds all predictions, or tells how to read them."""

    def card(
        self, samples: Sequence[Sample], predictions: Sequence[Any], classes: Sequence[str], folder: Path
    ) -> list[tuple[str, str]]:
        """Images for the model card, written into `folder`: pairs of title and file name."""

    def table(self, samples: Sequence[Sample], predictions: Sequence[Any], classes: Sequence[str]) -> list[list[str]]:
        """Rows of the model card's table by class, the header first."""


def find_task(name: str) -> Task:
    """The task of this name. Raises ValueError with the names there are."""
    if name not in TASKS:
        raise ValueError(f"--task must be {', '.join(TASKS)}, got {name}")
    return cast("Task", import_module(TASKS[name]))


def guess_task(data: Path) -> tuple[Task, str]:
    """The task that DATA is for and why. Raises DataError where it is like none."""
    for name in TASKS:
        task = find_task(name)
        if (reason := task.recognise(data)) is not None:
            return task, reason
    raise DataError(
        [f"{data} holds no labelled images: make a folder for each label in it, or a metadata.csv; or say --task"]
    )
