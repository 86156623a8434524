"""The paper's own pre-training objective (arXiv 2411.14402) and LiT tuning.

Read in this order: `objective`, `examples`, then `pretraining`; `lit_tuning` tunes what it leaves. The public names are
loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_aimv2.pretrain.captioned import open_data
    from mlx_aimv2.pretrain.lit_tuning import lit
    from mlx_aimv2.pretrain.pretraining import pretrain
    from mlx_aimv2.pretrain.settings import LitSettings, Schedule, Settings

__all__ = ["LitSettings", "Schedule", "Settings", "lit", "open_data", "pretrain"]

_HOME = {
    "LitSettings": "settings",
    "Schedule": "settings",
    "Settings": "settings",
    "lit": "lit_tuning",
    "open_data": "captioned",
    "pretrain": "pretraining",
}
"""Public name -> the file that it is defined in."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # from now on found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
