"""What a task is, how it is trained by default, and the options of `fit`.

A task is a folder with its data, its head and loss, and its results, and the object that ties them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_aimv2.learn.samples import DataError, Recognised
from mlx_aimv2.learn.tables import not_read
from mlx_aimv2.train.augment import Augmentation
from mlx_aimv2.train.settings import MAX_SEED, flag, setting
from mlx_aimv2.train.settings import check as check_ranges

TASKS = {
    "segment": "segment", "detect": "detect",
    "classify": "classify", "multilabel": "classify", "regression": "classify",
}  # fmt: skip
"""Task -> its folder next to this file, in the order in which they are tried on DATA."""

NUMBERS = {"r2", "rmse", "mae"}
"""Scores that are not shares and are printed as numbers; all others are printed in percent."""


@dataclass(frozen=True)
class Type:
    """A fine-tune type: how a head or an encoder is trained unless a flag says otherwise.

    `features` is what is kept of an image, `mean` or `tokens`, if the encoder is frozen; None if it is trained too. On
    a frozen encoder several learning rates and weight decays are tried side by side, and the best on `val` is kept;
    without learning rates the head is solved directly.
    """

    features: str | None = None
    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = (0.05,)
    epochs: int = 0
    batch_size: int = 0
    warm_up_epochs: int = 1
    min_rate: float = 0.0
    layer_decay: float = 1.0
    drop_path: float = 0.0
    augmentation: Augmentation | None = None
    """Augmentation for a head on a frozen encoder; its features are then recomputed every time."""


_PAPER = Type(
    "tokens",
    (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3),
    (0.05, 0.1),
    epochs=100,
    batch_size=1024,
    warm_up_epochs=5,
    min_rate=1e-5,
    # timm's rand-m9-mstd0.5-inc1, where 9 of ten is 0.9; each operation is applied half of the time.
    augmentation=Augmentation(min_area=0.08, jitter=0.3, operations=2, probability=0.5, strength=(0.9, 0.05)),
)
RECIPES = {"paper": _PAPER, "paper-others": replace(_PAPER, batch_size=512, warm_up_epochs=0)}
"""Name -> settings of AIMv2's attentive probe (arXiv 2411.14402, table A2), on ImageNet and the other datasets."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task. The first of its `types` is the default, as is the first of its `metrics`, which picks the best state.

    `dense` tasks predict for every position of an image: images are resized to the encoder's size without cropping,
    and the heads need every patch. For the others `head.solve` finds a head without the training loop.

    Every task's folder has the same functions: in `data` how DATA is recognised and read, and what training compares
    with (`recognise`, `read`, `example`, `targets`); in `head` the network on an encoder's tokens (`make_head`) and one
    `loss` per image; in `results` how outputs are decoded, scored and shown (`decode`, `score`, `as_json`, `as_text`,
    `save_prediction`, `save_all`, `card`, and `at_least` if --min-score applies).
    """

    name: str
    pipeline_tag: str
    types: Mapping[str, Type]
    metrics: tuple[str, ...]
    dense: bool
    data: ModuleType
    head: ModuleType
    results: ModuleType

    @property
    def metric(self) -> str:
        """The score that counts by default."""
        return self.metrics[0]


def find_task(name: str) -> Task:
    """The task with this name. Raises ValueError with the valid names."""
    if name not in TASKS:
        raise ValueError(f"--task must be {', '.join(TASKS)}, got {name}")
    module = import_module(f"mlx_aimv2.learn.{TASKS[name]}")
    task: Task = module.TASKS[name] if hasattr(module, "TASKS") else module.TASK
    return task


def score_text(name: str, score: float) -> str:
    """A score as printed: `71.25 %`, `0.8312`."""
    return f"{score:.4g}" if name in NUMBERS else f"{100 * score:.2f} %"


def guess_task(data: Path) -> tuple[Task, Recognised]:
    """The task that DATA is for, and what was recognised in it. Raises DataError if it fits none."""
    for name in TASKS:
        task = find_task(name)
        if (recognised := task.data.recognise(data)) is not None:
            return task, recognised
    form = f" in a form that fit reads: {'; '.join(others)};" if (others := not_read(data)) else ":"
    raise DataError(
        [f"{data} has no labelled images{form} make a folder for each label, or a metadata.csv; or give --task"]
    )


WEIGHTS = ("balanced",)

ADAPTERS = "adapters (lora, dora)"

MAX_RANK = 8192
"""Width of the widest layer of an AIMv2 encoder (3B): wider adapters would be larger than the layer itself."""

MAX_SIDE = 1 << 14
"""Image side in pixels: over a million patches, and attention compares each with each."""


@dataclass(frozen=True)
class Options:
    """Training options; None takes the task's default for the fine-tune type."""

    image_size: int | None = setting(
        None, "data", "image side in pixels (default: the checkpoint's)", "at least 1", maximum=MAX_SIDE
    )
    holdout: float | None = setting(
        None,
        "data",
        "share of images for val, and the same for test, if DATA has no parts (default: 0.15; probes on a small set "
        "are cross-validated)",
        "above 0, below 0.5",
    )
    recipe: str | None = setting(
        None,
        "what is trained",
        "AIMv2's attentive probe: paper (ImageNet), paper-others",
        choices=tuple(RECIPES),
    )
    metric: str | None = setting(
        None, "what is trained", "score that picks the best (top1, mean_class, miou, pixel_accuracy, ap, ap50, ap75)"
    )
    class_weights: str | None = setting(
        None, "what is trained", "balanced: every class counts the same, whatever its size", choices=WEIGHTS
    )
    refit: bool = setting(
        False, "what is trained", "linear, knn: once settings are chosen, fit on all images, val and test too"
    )
    num_layers: int | None = setting(
        None, "what is trained", "only the last N blocks; -1 for all (default)", "a number of blocks, or -1 for all"
    )
    batch_size: int | None = setting(None, "optimisation", "images per batch, across all ranks", "at least 1")
    iters: int | None = setting(None, "optimisation", "steps", "at least 1")
    epochs: int | None = setting(None, "optimisation", "passes through the images, instead of --iters", "at least 1")
    learning_rate: float | None = setting(
        None, "optimisation", "peak learning rate (default: a sweep, or the type's)", "above 0"
    )
    weight_decay: float | None = setting(
        None, "optimisation", "weight decay of AdamW (default: the type's)", "at least 0"
    )
    layer_decay: float | None = setting(
        None, "optimisation", "full: layer-wise decay, a block learns X times as fast as the next", "above 0, at most 1"
    )
    grad_checkpoint: bool = setting(False, "optimisation", "save memory: recompute each block for its gradient")
    grad_accumulation_steps: int = setting(1, "optimisation", "batches per step", "at least 1")
    augment: bool = setting(True, "augmentation", "train on the images as they are")
    flip: bool = setting(False, "augmentation", "mirror half of the images in training")
    mixup: float = setting(0.0, "augmentation", "mixup with Beta(X, X) (default: 0, off)", "at least 0")
    mask_ratio: float = setting(0.0, "augmentation", "share of patches hidden in training", "at least 0, below 1")
    mask_shape: str = setting(
        "random", "augmentation", "hidden patches: random (one by one) or block", choices=("random", "block")
    )
    drop_path: float | None = setting(
        None, "augmentation", "share of images that skip the last block, fewer in earlier ones", "at least 0, below 1"
    )
    lora_rank: int | None = setting(None, ADAPTERS, "rank of adapters (default: 8)", "at least 1", maximum=MAX_RANK)
    lora_scale: float | None = setting(None, ADAPTERS, "scale of adapters (default: 20)")
    lora_dropout: float | None = setting(None, ADAPTERS, "dropout before adapters (default: 0)", "at least 0, below 1")
    adapter_path: str | None = setting(None, ADAPTERS, "start from the adapters in this folder", metavar="HEAD")
    steps_per_eval: int | None = setting(None, "run", "steps between evaluations (default: 1/20 of all)", "at least 1")
    patience: int | None = setting(
        None,
        "run",
        "early stopping, after the warm-up: if N evaluations bring no better score and no val loss as low as the "
        "lowest; 0: never (default: 8 for lora, dora and full, else 0)",
        "at least 0",
    )
    seed: int = setting(0, "run", "random seed", "at least 0", maximum=MAX_SEED)

    def __post_init__(self) -> None:
        check_ranges(self)

    def over(self, own: Type) -> Type:
        """A type with the options that replace its own."""
        asked: dict[str, Any] = {
            name: getattr(self, name) for name in ("epochs", "batch_size", "layer_decay", "drop_path")
        }
        one = {"learning_rates": self.learning_rate, "weight_decays": self.weight_decay}
        asked |= {name: None if value is None else (value,) for name, value in one.items()}
        return replace(own, **{name: value for name, value in asked.items() if value is not None})

    def given(self) -> list[str]:
        """The names of the options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


COMMON = {"image_size", "seed", "holdout", "metric", "class_weights"}
IN_LOOP = COMMON | {
    "batch_size", "iters", "epochs", "learning_rate", "weight_decay", "grad_accumulation_steps", "steps_per_eval",
    "patience", "recipe",
}  # fmt: skip
ON_ENCODER = (IN_LOOP - {"recipe"}) | {
    "num_layers", "grad_checkpoint", "drop_path", "mask_ratio", "mask_shape", "mixup", "augment", "flip",
}  # fmt: skip
ADAPTER = {"lora_rank", "lora_scale", "lora_dropout", "adapter_path"}
"""Options for heads trained by the loop, for an encoder, and for its adapters."""


def check_options(options: Options, task: Task, kind: str) -> None:
    """Raises ValueError for options that contradict each other or would silently have no effect."""
    if kind not in task.types:
        raise ValueError(f"--fine-tune-type of {task.name} must be {', '.join(task.types)}, got {kind}")
    if options.iters is not None and options.epochs is not None:
        raise ValueError("choose either --iters or --epochs, not both")
    if options.recipe is not None and kind != "attentive":
        raise ValueError(f"--recipe {options.recipe} is for --fine-tune-type attentive, not for {kind}")
    if options.metric not in (None, *task.metrics):
        raise ValueError(f"--metric of {task.name} must be {', '.join(task.metrics)}, got {options.metric}")
    if options.class_weights is not None and task.name != "classify":
        raise ValueError(f"--class-weights is for one label per image, not for {task.name}: leave it out")
    given, beside = options.given(), f"--fine-tune-type {kind}"
    if not task.types[kind].learning_rates:
        means = COMMON | {"refit"}
    elif task.types[kind].features is not None:
        means = IN_LOOP
    else:
        means = ON_ENCODER | ({"layer_decay"} if kind == "full" else ADAPTER)
    if options.recipe is not None:
        means = means | {"augment"}
    if "adapter_path" in given and "adapter_path" in means:  # that folder has the others
        means, beside = means - ADAPTER - {"num_layers"} | {"adapter_path"}, f"{beside} and --adapter-path"
    if idle := [flag(field) for field in fields(options) if field.name in given and field.name not in means]:
        raise ValueError(f"{', '.join(idle)} would have no effect with {beside}: leave it out")
    if "mask_shape" in given and not options.mask_ratio:
        raise ValueError(f"--mask-shape {options.mask_shape} would have no effect without --mask-ratio: give one")
