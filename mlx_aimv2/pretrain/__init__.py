"""The paper's own pre-training objective (arXiv 2411.14402) and LiT tuning.

Read in this order: `objective`, `data`, then `pretraining`; `lit_tuning` tunes what it leaves. The public names are
loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_aimv2 import lazily

if TYPE_CHECKING:
    from mlx_aimv2.pretrain.data import open_data
    from mlx_aimv2.pretrain.lit_tuning import LitSettings, lit
    from mlx_aimv2.pretrain.pretraining import Settings, pretrain

__all__ = ["LitSettings", "Settings", "lit", "open_data", "pretrain"]

__getattr__, __dir__ = lazily(
    globals(),
    {
        "LitSettings": "lit_tuning",
        "Settings": "pretraining",
        "lit": "lit_tuning",
        "open_data": "data",
        "pretrain": "pretraining",
    },
)
