"""Turns folders of images into vectors."""

from mlx_aimv2.embed.encode import embed

__all__ = ["embed"]
