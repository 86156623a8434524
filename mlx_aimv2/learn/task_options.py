"""What a task is, how it is trained by default, and what `fit` may be asked for instead.

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
"""Task -> its folder beside this file, in the order in which DATA is tried."""

NUMBERS = {"r2", "rmse", "mae"}
"""Scores that are no shares, and told as they are; all others are told in percent."""


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
    min_rate: float = 0.0
    layer_decay: float = 1.0
    drop_path: float = 0.0
    augmentation: Augmentation | None = None
    """How images are changed for a head on a frozen encoder; its features are then computed anew each time."""


_PAPER = Type(
    "tokens",
    (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3),
    (0.05, 0.1),
    epochs=100,
    batch_size=1024,
    warm_up_epochs=5,
    min_rate=1e-5,
    # timm's rand-m9-mstd0.5-inc1, in whose ten steps 9 is 0.9; its operations are each done half of the time.
    augmentation=Augmentation(min_area=0.08, jitter=0.3, operations=2, probability=0.5, strength=(0.9, 0.05)),
)
RECIPES = {"paper": _PAPER, "paper-others": replace(_PAPER, batch_size=512, warm_up_epochs=0)}
"""Name -> settings of AIMv2's attentive probe (arXiv 2411.14402, table A2), on ImageNet and on the paper's others."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task. The first of its `types` is the default, and so is that of its `metrics`, which the best state goes by.

    `dense` tasks answer for every place of an image: images are brought to the encoder's size without cutting anything
    off, and the heads need every patch. For the others `head.solve` finds a head without the training loop.

    The files of a task's folder have the same functions in each: `data` what DATA has of it, its samples and what
    training compares with (`recognise`, `read`, `example`, `targets`); `head` the network on an encoder's tokens
    (`make_head`) and one `loss` per image; `results` what outputs mean, how right that is and what is shown of it
    (`decode`, `score`, `as_json`, `as_text`, `save_prediction`, `save_all`, `card`, and `at_least` where --min-score
    means something).
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
        """The score that counts where no flag says another."""
        return self.metrics[0]


def find_task(name: str) -> Task:
    """The task of this name. Raises ValueError with the names there are."""
    if name not in TASKS:
        raise ValueError(f"--task must be {', '.join(TASKS)}, got {name}")
    module = import_module(f"mlx_aimv2.learn.{TASKS[name]}")
    task: Task = module.TASKS[name] if hasattr(module, "TASKS") else module.TASK
    return task


def score_text(name: str, score: float) -> str:
    """A score as it is told: `71.25 %`, `0.8312`."""
    return f"{score:.4g}" if name in NUMBERS else f"{100 * score:.2f} %"


def guess_task(data: Path) -> tuple[Task, Recognised]:
    """The task that DATA is for and what it has of it. Raises DataError where it is like none."""
    for name in TASKS:
        task = find_task(name)
        if (recognised := task.data.recognise(data)) is not None:
            return task, recognised
    form = f" in a form that fit reads: {'; '.join(others)};" if (others := not_read(data)) else ":"
    raise DataError(
        [f"{data} holds no labelled images{form} make a folder for each label in it, or a metadata.csv; or say --task"]
    )


WEIGHTS = ("balanced",)

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
    holdout: float | None = setting(
        None,
        "data",
        "share of the images for val, and for test, of DATA without parts (default: 0.15; probes of a small set are "
        "cross-validated)",
        "above 0, below 0.5",
    )
    recipe: str | None = setting(
        None, "what is trained", "as AIMv2's attentive probe: paper on ImageNet, paper-others", choices=tuple(RECIPES)
    )
    metric: str | None = setting(
        None, "what is trained", "score to choose by (top1, mean_class, miou, pixel_accuracy, ap, ap50, ap75)"
    )
    class_weights: str | None = setting(
        None, "what is trained", "balanced: all classes count alike, however many images they have", choices=WEIGHTS
    )
    refit: bool = setting(
        False, "what is trained", "linear, knn: when all is chosen fit on all images, val and test too"
    )
    num_layers: int | None = setting(
        None, "what is trained", "the last N blocks alone; -1 for all (default)", "a number of blocks, or -1 for all"
    )
    batch_size: int | None = setting(None, "optimisation", "images of a batch, on all ranks", "at least 1")
    iters: int | None = setting(None, "optimisation", "steps", "at least 1")
    epochs: int | None = setting(None, "optimisation", "passes through the images, instead of --iters", "at least 1")
    learning_rate: float | None = setting(
        None, "optimisation", "highest rate (default: a sweep, or the type's)", "above 0"
    )
    weight_decay: float | None = setting(None, "optimisation", "of AdamW (default: the type's)", "at least 0")
    layer_decay: float | None = setting(
        None, "optimisation", "full: layer-wise decay, a block learns X times as fast as the next", "above 0, at most 1"
    )
    grad_checkpoint: bool = setting(False, "optimisation", "less memory: compute each block again for its gradient")
    grad_accumulation_steps: int = setting(1, "optimisation", "batches of a step", "at least 1")
    augment: bool = setting(True, "augmentation", "train on the images as they are")
    flip: bool = setting(False, "augmentation", "mirror half of the images in training")
    mixup: float = setting(0.0, "augmentation", "mix images by Beta(X, X) (default: 0, off)", "at least 0")
    mask_ratio: float = setting(0.0, "augmentation", "share of patches hidden in training", "at least 0, below 1")
    mask_shape: str = setting(
        "random", "augmentation", "of hidden patches: random, each alone, or block", choices=("random", "block")
    )
    drop_path: float | None = setting(
        None, "augmentation", "share of images that skip the last block, less before it", "at least 0, below 1"
    )
    lora_rank: int | None = setting(None, ADAPTERS, "their width (default: 8)", "at least 1", maximum=MAX_RANK)
    lora_scale: float | None = setting(None, ADAPTERS, "their weight (default: 20)")
    lora_dropout: float | None = setting(None, ADAPTERS, "dropout before them (default: 0)", "at least 0, below 1")
    adapter_path: str | None = setting(None, ADAPTERS, "begin with the adapters in this folder", metavar="HEAD")
    steps_per_eval: int | None = setting(None, "run", "steps between evaluations (default: 1/20 of all)", "at least 1")
    patience: int | None = setting(
        None,
        "run",
        "early stopping, after the warm-up: when of N evaluations none has a better score or a val loss as low as the "
        "lowest; 0 never (default: 8 for lora, dora and full, else 0)",
        "at least 0",
    )
    seed: int = setting(0, "run", "of everything random", "at least 0", maximum=MAX_SEED)

    def __post_init__(self) -> None:
        check_ranges(self)

    def over(self, own: Type) -> Type:
        """A type with what is asked for instead of its own."""
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
"""Options that mean something for heads alone that a loop trains, for an encoder, and for its adapters."""


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
        raise ValueError(f"--class-weights is for one label an image, not for {task.name}: leave it out")
    given, beside = options.given(), f"--fine-tune-type {kind}"
    if not task.types[kind].learning_rates:
        means = COMMON | {"refit"}
    elif task.types[kind].features is not None:
        means = IN_LOOP
    else:
        means = ON_ENCODER | ({"layer_decay"} if kind == "full" else ADAPTER)
    if options.recipe is not None:
        means = means | {"augment"}
    if "adapter_path" in given and "adapter_path" in means:  # that folder holds the others
        means, beside = means - ADAPTER - {"num_layers"} | {"adapter_path"}, f"{beside} and --adapter-path"
    if idle := [flag(field) for field in fields(options) if field.name in given and field.name not in means]:
        raise ValueError(f"{', '.join(idle)} would have no effect with {beside}: leave it out")
    if "mask_shape" in given and not options.mask_ratio:
        raise ValueError(f"--mask-shape {options.mask_shape} would have no effect without --mask-ratio: give one")
