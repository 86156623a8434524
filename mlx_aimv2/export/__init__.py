"""Writes encoders for programs without Python: MLX's exported functions for Swift and C++."""

from mlx_aimv2.export.write import export

__all__ = ["export"]
