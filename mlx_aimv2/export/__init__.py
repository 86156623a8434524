"""Writes encoders for programs without Python: MLX's functions for Swift and C++, Core ML packages."""

from mlx_aimv2.export.write import export

__all__ = ["export"]
