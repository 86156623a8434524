"""Learns from labelled images: probes on a frozen encoder, fine-tuning, and what comes out of it.

The public names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_aimv2.learn.evaluation import evaluate, predict
    from mlx_aimv2.learn.fit_head import fit
    from mlx_aimv2.learn.head_folder import fuse

__all__ = ["evaluate", "fit", "fuse", "predict"]

_HOME = {"evaluate": "evaluation", "fit": "fit_head", "fuse": "head_folder", "predict": "evaluation"}
"""Public name -> the file that it is defined in."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # from now on found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
