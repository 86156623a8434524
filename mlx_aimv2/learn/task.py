"""What a task is: a folder with its data, its head and loss, and its results, and the object that ties them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from mlx_aimv2.learn.samples import DataError, Dataset, Sample
from mlx_aimv2.train.batches import Arrays

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_aimv2.images.processor import Aimv2Processor

Labelled: TypeAlias = "tuple[np.ndarray[Any, Any], Sequence[Sample]]"
"""Features of samples, `(n, …)`, and the samples."""

Solve: TypeAlias = "Callable[[str, Labelled, Labelled, int, Callable[[str], None]], nn.Module]"
"""Finds a head without the training loop: `kind, training and validation features, number of classes, say -> head`."""

TASKS = ("detect", "segment", "classify")
"""Folders beside this file, in the order in which DATA is tried."""


@dataclass(frozen=True)
class Type:
    """A fine-tune type: how a head or an encoder is trained where no flag says otherwise.

    `features` is what is kept of an image, `mean` or `tokens`, where the encoder stays as it is; None where it is
    trained too. On a frozen encoder several learning rates and weight decays are tried side by side, and the best on
    `val` is kept; without learning rates the head is solved for.
    """

    features: str | None = None
    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = (0.05,)
    epochs: int = 0
    batch_size: int = 0
    warm_up_epochs: int = 1
    layer_decay: float = 1.0
    drop_path: float = 0.0


class Data(Protocol):
    """A task's data: `data.py` of its folder."""

    def recognise(self, data: Path) -> str | None:
        """Why DATA is for this task, a phrase; None where it is not."""

    def read(self, data: Path, *, classes: Sequence[str] | None = None, decode: bool = True) -> Dataset:
        """DATA read and checked by `samples.read`; DataError with everything that is wrong."""

    def example(
        self, sample: Sample, processor: Aimv2Processor, *, rng: np.random.Generator | None, flip: bool = False
    ) -> Arrays:
        """`pixels` (H, W, 3) and the targets of a sample, changed at random by `rng` if there is one."""

    def targets(self, sample: Sample, processor: Aimv2Processor) -> Arrays:
        """The targets alone, unchanged."""


class Head(Protocol):
    """A task's head and loss: `head.py` of its folder."""

    def make_head(
        self, kind: str, *, classes: int, width: int, heads: int, patch_size: int, options: dict[str, Any]
    ) -> nn.Module:
        """A head, `head(tokens (B, N, D), grid) -> {name: (B, …)}`."""

    def loss(self, outputs: dict[str, mx.array], targets: dict[str, mx.array]) -> mx.array:
        """One loss per image: `{name: (B, …)}, {name: (B, …)} -> (B,)`."""


class Results(Protocol):
    """What a task says of images, how right that is, and what is shown of it: `results.py` of its folder."""

    def decode(self, outputs: Arrays, size: tuple[int, int]) -> Any:
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


@dataclass(frozen=True, eq=False)
class Task:
    """A task. The first of its `types` is the default; `metric` is the score that the best state goes by.

    `whole_images` are brought to the encoder's size without cutting anything off; `takes_mask` says whether the heads
    can do without some of the patches. `solve` finds the heads of types without learning rates.
    """

    name: str
    title: str
    pipeline_tag: str
    types: Mapping[str, Type]
    metric: str
    whole_images: bool
    takes_mask: bool
    data: Data
    head: Head
    results: Results
    solve: Solve | None = None

    @property
    def default_type(self) -> str:
        """The type that is taken where no flag says which."""
        return next(iter(self.types))

    def solved(self, kind: str) -> bool:
        """Whether the head of this type is found without the training loop."""
        return not self.types[kind].learning_rates


def find_task(name: str) -> Task:
    """The task of this name. Raises ValueError with the names there are."""
    if name not in TASKS:
        raise ValueError(f"--task must be {', '.join(TASKS)}, got {name}")
    task: Task = import_module(f"mlx_aimv2.learn.{name}").TASK
    return task


def guess_task(data: Path) -> tuple[Task, str]:
    """The task that DATA is for and why. Raises DataError where it is like none."""
    for name in TASKS:
        task = find_task(name)
        if (reason := task.data.recognise(data)) is not None:
            return task, reason
    raise DataError(
        [f"{data} holds no labelled images: make a folder for each label in it, or a metadata.csv; or say --task"]
    )
