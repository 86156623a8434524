"""Turns folders of images into vectors."""

from mlx_aimv2.embed.pipeline import embed

__all__ = ["embed"]
