"""The paper's own pre-training objective (arXiv 2411.14402) and LiT tuning.

Read in this order: `objective`, `data`, then `pretraining`; `lit_tuning` tunes what it leaves, and `generate` draws and
writes with it.
"""

from mlx_aimv2.pretrain.data import open_data
from mlx_aimv2.pretrain.generate import Generated, generate
from mlx_aimv2.pretrain.lit_tuning import LitSettings, lit
from mlx_aimv2.pretrain.pretraining import Settings, pretrain

__all__ = ["Generated", "LitSettings", "Settings", "generate", "lit", "open_data", "pretrain"]
