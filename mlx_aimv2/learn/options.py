"""What `fit` is asked for: every option with its default, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mlx_aimv2.learn.task import Task, Type
from mlx_aimv2.train.settings import MAX_SEED, flag, setting
from mlx_aimv2.train.settings import check as check_ranges

RECIPES = {
    "paper": Type(
        "tokens", (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3), (0.05, 0.1), epochs=100, batch_size=1024, warm_up_epochs=5
    )
}
"""Name -> settings: `paper` is the attentive probe of AIMv2 (arXiv 2411.14402, table A2)."""

ADAPTERS = "adapters, of lora and dora"

MAX_RANK = 8192
"""The width of the widest layer of an AIMv2 encoder (3B): wider adapters would hold more than the layer itself."""

MAX_SIDE = 1 << 14
"""Of an image in pixels: more than a million patches, of which attention compares each with each."""


@dataclass(frozen=True)
class Options:
    """How to train; None takes the task's default for the fine-tune type."""

    image_size: int | None = setting(
        None, "data", "side of the images in pixels (default: the checkpoint's)", "at least 1", maximum=MAX_SIDE
    )
    recipe: str | None = setting(
        None, "what is trained", "paper: the attentive probe as AIMv2's authors trained it", choices=tuple(RECIPES)
    )
    num_layers: int | None = setting(
        None,
        "what is trained",
        "train the last N blocks alone; -1 for all (default)",
        "a number of blocks, or -1 for all",
    )
    batch_size: int | None = setting(None, "optimisation", "images of a batch, on all ranks", "at least 1")
    iters: int | None = setting(None, "optimisation", "steps", "at least 1")
    epochs: int | None = setting(None, "optimisation", "passes through the images, instead of --iters", "at least 1")
    learning_rate: float | None = setting(
        None, "optimisation", "highest rate (default: a sweep, or the type's)", "above 0"
    )
    weight_decay: float | None = setting(None, "optimisation", "of AdamW (default: the type's)", "at least 0")
    layer_decay: float | None = setting(
        None, "optimisation", "full: each block learns X times as fast as the next one", "above 0, at most 1"
    )
    grad_checkpoint: bool = setting(False, "optimisation", "less memory: compute each block again for its gradient")
    grad_accumulation_steps: int = setting(1, "optimisation", "batches of a step", "at least 1")
    augment: bool = setting(True, "augmentation", "train on the images as they are")
    flip: bool = setting(False, "augmentation", "mirror half of the images in training")
    mixup: float = setting(0.0, "augmentation", "mix images by Beta(X, X) (default: 0, off)", "at least 0")
    mask_ratio: float = setting(0.0, "augmentation", "share of patches hidden in training", "at least 0, below 1")
    drop_path: float | None = setting(
        None, "augmentation", "share of images that skip the last block, less before it", "at least 0, below 1"
    )
    lora_rank: int | None = setting(
        None, ADAPTERS, "width of the adapters (default: 8)", "at least 1", maximum=MAX_RANK
    )
    lora_scale: float | None = setting(None, ADAPTERS, "weight of the adapters (default: 20)")
    lora_dropout: float | None = setting(
        None, ADAPTERS, "dropout before the adapters (default: 0)", "at least 0, below 1"
    )
    adapter_path: str | None = setting(None, ADAPTERS, "begin with the adapters in this folder", metavar="HEAD")
    steps_per_eval: int | None = setting(
        None, "run", "steps between evaluations (default: a twentieth of all)", "at least 1"
    )
    patience: int | None = setting(None, "run", "stop after N evaluations without a better one; 0: never", "at least 0")
    seed: int = setting(0, "run", "of everything random", "at least 0", maximum=MAX_SEED)

    def __post_init__(self) -> None:
        check_ranges(self)

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
ADAPTER = {"lora_rank", "lora_scale", "lora_dropout", "adapter_path"}
"""Options that mean something for heads alone that a loop trains, for an encoder, and for its adapters."""


def check(options: Options, task: Task, kind: str) -> None:
    """Raises ValueError for options that contradict each other, and for one that would change nothing in silence."""
    if kind not in task.types:
        raise ValueError(f"--fine-tune-type of {task.name} must be {', '.join(task.types)}, got {kind}")
    if options.iters is not None and options.epochs is not None:
        raise ValueError("choose either --iters or --epochs, not both")
    if options.recipe is not None and kind != "attentive":
        raise ValueError(f"--recipe {options.recipe} is for --fine-tune-type attentive, not for {kind}")
    means, given, beside = _meaningful(task, kind), options.given(), f"--fine-tune-type {kind}"
    if "adapter_path" in given and "adapter_path" in means:  # that folder holds the others
        means, beside = means - ADAPTER - {"num_layers"} | {"adapter_path"}, f"{beside} and --adapter-path"
    if idle := [flag(field) for field in fields(options) if field.name in given and field.name not in means]:
        raise ValueError(f"{', '.join(idle)} would change nothing with {beside}: leave it out")
    if options.mask_ratio and not task.takes_mask:
        raise ValueError(f"--mask-ratio does not go with {task.name}, whose heads need every patch: leave it out")


def _meaningful(task: Task, kind: str) -> set[str]:
    if task.solved(kind):
        return COMMON
    if task.types[kind].features is not None:
        return IN_LOOP
    return ON_ENCODER | ({"layer_decay"} if kind == "full" else ADAPTER)
