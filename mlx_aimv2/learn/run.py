"""One run of `fit` as its steps see it, and what the training of a head or an encoder gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_aimv2.learn.optimizer import Groups
from mlx_aimv2.learn.train import LossError, Progressed, Settings, train

if TYPE_CHECKING:
    from mlx_aimv2.embed.distributed import Ranks
    from mlx_aimv2.learn.batches import Batches
    from mlx_aimv2.learn.data import Dataset, Sample
    from mlx_aimv2.learn.options import Options
    from mlx_aimv2.learn.state import StateFile
    from mlx_aimv2.learn.task import Defaults, Task
    from mlx_aimv2.learn.train import Forward
    from mlx_aimv2.model import Aimv2VisionModel
    from mlx_aimv2.processor import Aimv2Processor

EVALUATIONS = 20
"""Evaluations of a run where no flag says how often."""

PATIENCE = 8
"""Of them, those without a better score before the fine-tuning of an encoder stops."""


@dataclass(frozen=True)
class Run:
    """Everything that training needs; `state` is None where no loop runs."""

    task: Task
    kind: str
    dataset: Dataset
    encoder: Aimv2VisionModel
    processor: Aimv2Processor
    options: Options
    defaults: Defaults
    state: StateFile | None
    ranks: Ranks
    cache: Path | None
    say: Callable[[str], None]
    progress: Callable[[int, str], Callable[[int], None]]

    def head(self, **head_options: Any) -> nn.Module:
        """A new head for this run's classes."""
        config = self.encoder.config
        return self.task.make_head(
            self.kind,
            classes=len(self.dataset.classes),
            width=config.hidden_size,
            heads=config.num_attention_heads,
            patch_size=config.patch_size,
            options=head_options,
        )

    def batch_size(self) -> int:
        """Images of a batch over all ranks, no more than there are for training."""
        wanted = self.options.batch_size or self.defaults.batch_size
        size = min(wanted, len(self.dataset.splits["train"]))
        return max(self.ranks.size, size - size % self.ranks.size)

    def _patience(self) -> int:
        """Evaluations without a better one before training stops: heads alone are trained to the end in seconds."""
        if self.options.patience is not None:
            return self.options.patience
        return 0 if self.kind in self.task.FROZEN else PATIENCE

    def train(
        self,
        model: nn.Module,
        forward: Forward,
        batches: Batches,
        *,
        evaluate: Callable[[nn.Module], float],
        groups: Groups,
        learning_rate: float,
        weight_decay: float,
    ) -> Progressed:
        """The loop with this run's settings."""
        options, defaults = self.options, self.defaults
        accumulate = options.grad_accumulation_steps
        per_epoch = max(1, batches.per_epoch // accumulate)
        steps = options.iters or (options.epochs or defaults.epochs) * per_epoch
        settings = Settings(
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warm_up=min(defaults.warm_up_epochs * per_epoch, max(1, steps // 5)),
            accumulate=accumulate,
            eval_every=options.steps_per_eval or max(1, -(-steps // EVALUATIONS)),
            patience=self._patience(),
            seed=options.seed,
        )
        advance = self.progress(steps, "steps")
        try:
            return train(
                model,
                forward,
                batches,
                settings=settings,
                evaluate=evaluate,
                groups=groups,
                state=self.state,
                ranks=self.ranks,
                say=self.say,
                advance=advance,
            )
        except LossError as error:
            kept = self.state is not None and self.state.path.is_file()
            raise LossError(
                f"{error}: stopped; "
                + (
                    f"the state of the last evaluation is kept, go on with --resume and less than --learning-rate "
                    f"{learning_rate:g}"
                    if kept
                    else f"try less than --learning-rate {learning_rate:g}"
                )
            ) from None
        except KeyboardInterrupt:
            if self.state is not None and self.state.path.is_file():
                self.say("stopped; the state of the last evaluation is kept, go on with --resume")
            raise
        finally:
            batches.close()


@dataclass(frozen=True)
class Trained:
    """A head, how to get its outputs on samples, and what the head folder keeps of the training."""

    head: nn.Module
    outputs: Callable[[Sequence[Sample]], Iterator[Any]]
    head_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    adapters: dict[str, Any] | None = None
