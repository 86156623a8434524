"""Keeps vectors on disk and finds the nearest ones."""

from mlx_aimv2.index.reader import Embedding, Index, Match

__all__ = ["Embedding", "Index", "Match"]
