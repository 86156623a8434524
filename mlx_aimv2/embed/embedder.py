"""Loads a model with everything that decides its embeddings: dtype, pooling, layer and limit of patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_aimv2.embed import provenance
from mlx_aimv2.embed.pipeline import embed_chunks
from mlx_aimv2.embed.pooling import Pooling
from mlx_aimv2.embed.prefetch import MAX_PATCHES
from mlx_aimv2.loading import Loaded, read_source


@dataclass(frozen=True)
class Settings:
    """What decides the embeddings of a checkpoint; None stands for the default."""

    model: str
    revision: str | None = None
    dtype: str | None = None
    pool: str | None = None
    layer: int | None = None
    norm: bool = False
    max_patches: int | None = None


@dataclass(frozen=True)
class Embedder:
    """A model with its settings; `description` says of them what JSON holds and `provenance.differences` compares."""

    loaded: Loaded
    pooling: Pooling
    max_patches: int
    description: dict[str, Any]

    @classmethod
    def load(cls, settings: Settings, *, decode: str = "fast") -> Embedder:
        """Loads the checkpoint and records `decode`. Raises ValueError for settings that it cannot meet."""
        loaded = read_source(settings.model, revision=settings.revision).load(dtype=settings.dtype)
        pooling = Pooling.of(loaded.model, settings.pool, layer=settings.layer, norm=settings.norm)
        max_patches = settings.max_patches or MAX_PATCHES
        description = provenance.describe(loaded, pooling, max_patches=max_patches, decode=decode)
        return cls(loaded, pooling, max_patches, description)

    def __call__(self, chunks: Sequence[Sequence[str]], **options: Any) -> Iterator[list[Any]]:
        """Embeddings of each chunk's images; `options` are those of `embed_chunks`."""
        loaded = self.loaded
        return embed_chunks(
            chunks, loaded.model, loaded.processor, pooling=self.pooling, max_patches=self.max_patches, **options
        )
