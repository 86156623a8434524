"""Learns from labelled images: probes on a frozen encoder, fine-tuning, and using the results.

The public names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_aimv2 import lazily

if TYPE_CHECKING:
    from mlx_aimv2.learn.fit_head import fit
    from mlx_aimv2.learn.head_folder import fuse
    from mlx_aimv2.learn.lora import add_adapters
    from mlx_aimv2.learn.predict_evaluate import evaluate, predict

__all__ = ["add_adapters", "evaluate", "fit", "fuse", "predict"]

__getattr__, __dir__ = lazily(
    globals(),
    {
        "add_adapters": "lora",
        "evaluate": "predict_evaluate",
        "fit": "fit_head",
        "fuse": "head_folder",
        "predict": "predict_evaluate",
    },
)
