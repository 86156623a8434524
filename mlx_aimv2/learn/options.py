"""What `fit` is asked for: every option with its default, checked before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from mlx_aimv2.learn import lora
from mlx_aimv2.learn.task import Defaults, Task

RECIPES = {
    "paper": Defaults(
        (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3), (0.05, 0.1), epochs=100, batch_size=1024, warm_up_epochs=5
    )
}
"""Name -> settings: `paper` is the attentive probe of AIMv2 (arXiv 2411.14402, table A2)."""


@dataclass(frozen=True)
class Options:
    """How to train; None takes the task's default for the fine-tune type."""

    batch_size: int | None = None
    iters: int | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    num_layers: int | None = None
    grad_checkpoint: bool = False
    grad_accumulation_steps: int = 1
    layer_decay: float | None = None
    drop_path: float | None = None
    mask_ratio: float = 0.0
    mixup: float = 0.0
    augment: bool = True
    flip: bool = False
    lora_rank: int | None = None
    lora_scale: float | None = None
    lora_dropout: float | None = None
    adapter_path: str | None = None
    image_size: int | None = None
    recipe: str | None = None
    steps_per_eval: int | None = None
    patience: int | None = None
    seed: int = 0

    def given(self) -> list[str]:
        """The names of the options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


COMMON = {"image_size", "seed"}
IN_LOOP = COMMON | {
    "batch_size", "iters", "epochs", "learning_rate", "weight_decay", "grad_accumulation_steps", "steps_per_eval",
    "patience", "recipe",
}  # fmt: skip
ON_ENCODER = (IN_LOOP - {"recipe"}) | {
    "num_layers", "grad_checkpoint", "drop_path", "mask_ratio", "mixup", "augment", "flip",
}  # fmt: skip
"""Options that mean something for heads alone that a loop trains, and for an encoder."""

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "iters": (lambda value: value >= 1, "at least 1"),
    "epochs": (lambda value: value >= 1, "at least 1"),
    "learning_rate": (lambda value: value > 0, "above 0"),
    "weight_decay": (lambda value: value >= 0, "at least 0"),
    "num_layers": (lambda value: value == -1 or value >= 1, "a number of blocks, or -1 for all"),
    "grad_accumulation_steps": (lambda value: value >= 1, "at least 1"),
    "layer_decay": (lambda value: 0 < value <= 1, "above 0, at most 1"),
    "drop_path": (lambda value: 0 <= value < 1, "at least 0, below 1"),
    "mask_ratio": (lambda value: 0 <= value < 1, "at least 0, below 1"),
    "mixup": (lambda value: value >= 0, "at least 0"),
    "lora_rank": (lambda value: value >= 1, "at least 1"),
    "lora_dropout": (lambda value: 0 <= value < 1, "at least 0, below 1"),
    "steps_per_eval": (lambda value: value >= 1, "at least 1"),
    "patience": (lambda value: value >= 0, "at least 0"),
    "seed": (lambda value: value >= 0, "at least 0"),
    "image_size": (lambda value: value >= 1, "at least 1"),
}
"""Option -> what holds for it, and in words."""


def check(options: Options, task: Task, kind: str) -> None:
    """Raises ValueError for a value out of range, and for an option that would change nothing in silence."""
    if kind not in task.TYPES:
        raise ValueError(f"--fine-tune-type of {task.NAME} must be {', '.join(task.TYPES)}, got {kind}")
    for name, (holds, words) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not holds(value):
            raise ValueError(f"{flag(name)} must be {words}, got {value}")
    if options.iters is not None and options.epochs is not None:
        raise ValueError("choose either --iters or --epochs, not both")
    if options.recipe is not None and options.recipe not in RECIPES:
        raise ValueError(f"--recipe must be {', '.join(RECIPES)}, got {options.recipe}")
    if options.recipe is not None and kind != "attentive":
        raise ValueError(f"--recipe {options.recipe} is for --fine-tune-type attentive, not for {kind}")
    means = _meaningful(task, kind)
    if idle := [flag(name) for name in options.given() if name not in means]:
        raise ValueError(f"{', '.join(idle)} would change nothing with --fine-tune-type {kind}: leave it out")
    if options.mask_ratio and not task.TAKES_MASK:
        raise ValueError(f"--mask-ratio does not go with {task.NAME}, whose heads need every patch: leave it out")


def _meaningful(task: Task, kind: str) -> set[str]:
    if not task.DEFAULTS[kind].learning_rates:
        return COMMON
    if kind in task.FROZEN:
        return IN_LOOP
    adapter = {"lora_rank", "lora_scale", "lora_dropout", "adapter_path"}
    return ON_ENCODER | (adapter if kind in lora.KINDS else {"layer_decay"})


def flag(name: str) -> str:
    """The flag of an option."""
    return {"augment": "--no-augment"}.get(name, f"--{name.replace('_', '-')}")
