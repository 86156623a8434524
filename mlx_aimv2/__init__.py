"""Apple's AIMv2 vision encoders on MLX: a photograph in, features out."""

from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.loading import load
from mlx_aimv2.model import Aimv2Model, Aimv2TextModel, Aimv2VisionModel
from mlx_aimv2.processor import Aimv2Processor

__version__ = "0.1.0"

__all__ = [
    "Aimv2Config",
    "Aimv2Model",
    "Aimv2Processor",
    "Aimv2TextConfig",
    "Aimv2TextModel",
    "Aimv2VisionConfig",
    "Aimv2VisionModel",
    "load",
]
