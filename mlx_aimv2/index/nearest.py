"""Finds the vectors nearest to one among a million, exactly and about as fast as memory can be read.

A GPU keeps float16 and multiplies it there; its rounded scores only choose the finalists. A CPU multiplies float32 with
NumPy's BLAS, so there the vectors are widened once while they are read. Either way the scores returned are computed
again in float64, so they do not depend on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

TILE = 1024
"""Rows whose best score is taken together when the finalists are chosen."""

WIDENED = 256
"""Rows widened at a time: half a megabyte stays in a core's cache."""

ON_GPU = 1 << 16
"""Rows of one array on the GPU."""

READ_AHEAD = 8

HALF_INFINITE = 65536.0
"""Beyond every float16 and, in float32, beyond every value of a unit vector."""

NOT_FINITE = "vectors that are not finite"

CANCELLED = 2.0**-11
"""A combined query that is shorter, for all its weights, is what rounding to float16 left of parts that are equal."""

LARGEST_WEIGHT = 1e6
"""Of a part of a query."""

SLACK = 2.0**-9
"""More than any score can be off: rounding to float16 of vectors (2^-11), query (2^-11) and product (2^-11)."""


@dataclass(frozen=True)
class Vectors:
    """Unit vectors with the ids of their images, in memory: (P,) and (P, D) of float32, on a GPU several of float16."""

    identities: NDArray[Any]
    rows: NDArray[Any] | list[mx.array]

    @classmethod
    def read(
        cls, blocks: Iterable[tuple[bytes, bytes]], count: int, *, width: int, dtype: str, on_gpu: bool | None = None
    ) -> Vectors:
        """Takes `count` vectors from blocks of `(ids as int64, vectors in dtype)`."""
        if on_gpu is None:  # some GPUs round float32 products more than SLACK allows, so float32 stays with NumPy
            on_gpu = dtype == "float16" and mx.default_device().type == mx.DeviceType.gpu
        return (cls._read_gpu if on_gpu else cls._read_cpu)(blocks, count, width, dtype)

    @classmethod
    def _read_cpu(cls, blocks: Iterable[tuple[bytes, bytes]], count: int, width: int, dtype: str) -> Vectors:
        identities, rows = np.empty(count, np.int64), np.empty((count, width), np.float32)
        pending: list[Future[None]] = []
        done = 0
        with ThreadPoolExecutor(2) as pool:
            for members, raw in blocks:
                ids = np.frombuffer(members, "<i8")
                part = rows[done : done + len(ids)]
                identities[done : done + len(ids)] = ids
                pending.append(pool.submit(_widen, np.frombuffer(raw, dtype).reshape(len(ids), width), part))
                if len(pending) > READ_AHEAD:
                    pending.pop(0).result()
                done += len(ids)
            for task in pending:
                task.result()
        return cls(identities, rows)

    @classmethod
    def _read_gpu(cls, blocks: Iterable[tuple[bytes, bytes]], count: int, width: int, dtype: str) -> Vectors:
        identities: list[NDArray[Any]] = [np.empty(0, np.int64)]
        rows: list[mx.array] = []
        parts: list[NDArray[Any]] = []
        for members, raw in blocks:
            identities.append(np.frombuffer(members, "<i8"))
            parts.append(np.frombuffer(raw, dtype).reshape(-1, width))
            if sum(map(len, parts)) >= ON_GPU:
                rows.append(mx.array(np.concatenate(parts)))
                parts = []
        if parts:
            rows.append(mx.array(np.concatenate(parts)))
        if not all(mx.isfinite(part).all().item() for part in rows):
            raise FloatingPointError(NOT_FINITE)
        return cls(np.concatenate(identities), rows)

    def __len__(self) -> int:
        return len(self.identities)

    def scores(self, query: NDArray[Any]) -> NDArray[Any]:
        """Cosines with a unit vector (D,), each within SLACK / 2 of the truth, `-> (P,)` float32."""
        if isinstance(self.rows, np.ndarray):
            return self.rows @ query.astype(np.float32)
        if not self.rows:
            return np.empty(0, np.float32)
        wanted = mx.array(query.astype(np.float32)).astype(self.rows[0].dtype)
        return np.array(mx.concatenate([rows @ wanted for rows in self.rows]).astype(mx.float32))

    def of(self, identities: NDArray[Any]) -> NDArray[Any]:
        """The vectors of these ids in their order, (P,) -> (P, D) float32."""
        order = np.argsort(self.identities)
        indices = order[np.searchsorted(self.identities, identities, sorter=order)]
        back = np.argsort(indices, kind="stable")
        taken = self._taken(indices[back])
        result = np.empty_like(taken)
        result[back] = taken
        return result

    def nearest(
        self, query: NDArray[Any], k: int, *, among: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids and exact cosines of the k nearest to a unit vector (D,), and of all that equal the last of them.

        With `among`, ids, only those images are compared.
        """
        scores = self.scores(query)
        if among is None:
            indices = _finalists(scores, k)
        else:
            wanted = np.flatnonzero(np.isin(self.identities, among))
            indices = wanted[_finalists(scores[wanted], k)]
        exact = np.concatenate(
            [np.empty(0), *(self._exact(indices[i : i + TILE], query) for i in range(0, len(indices), TILE))]
        )
        if len(exact) > k:
            kept = exact >= np.partition(exact, -k)[-k]
            indices, exact = indices[kept], exact[kept]
        return self.identities[indices], exact

    def _exact(self, indices: NDArray[Any], query: NDArray[Any]) -> NDArray[Any]:
        rows = self._taken(indices).astype(np.float64)
        lengths = np.sqrt((rows * rows).sum(axis=1))
        # Row by row in one fixed order, unlike a BLAS product: equal vectors get equal scores.
        return (rows * query).sum(axis=1) / np.where(lengths == 0, 1.0, lengths)

    def _taken(self, indices: NDArray[Any]) -> NDArray[Any]:
        """The rows at ascending indices."""
        if isinstance(self.rows, np.ndarray):
            return self.rows[indices]
        parts, start = [], 0
        for rows in self.rows:
            here = indices[(indices >= start) & (indices < start + len(rows))] - start
            parts.append(np.array(rows[mx.array(here)].astype(mx.float32)))
            start += len(rows)
        return np.concatenate(parts)


def combined(parts: Iterable[tuple[float, Any]], width: int) -> NDArray[Any]:
    """Several queries as one: the weighted sum of unit vectors, `(weight, (D,)) … -> (D,)` float64.

    A vector may come from any library, and have one row, as from a model for one image. Raises ValueError for another
    shape, for a vector that is not finite or all zero, and for parts that cancel out.
    """
    total, weights = np.zeros(width), 0.0
    for weight, vector in parts:
        one = np.array(vector.astype(mx.float32) if isinstance(vector, mx.array) else vector, np.float64)
        one = one[0] if one.ndim == 2 and len(one) == 1 else one
        if one.shape != (width,):
            raise ValueError(f"a query must be one vector of {width:,} values, got shape {tuple(one.shape)}")
        if not np.isfinite(one).all() or not one.any():
            raise ValueError("a query must be finite and not all zero")
        if not abs(weight) <= LARGEST_WEIGHT:
            raise ValueError(f"a weight must be a number up to {LARGEST_WEIGHT:g}, got {weight}")
        one = one / np.abs(one).max()  # or squares of small numbers would be 0
        total += weight * (one / np.linalg.norm(one))
        weights += abs(weight)
    length = np.linalg.norm(total)
    if length <= CANCELLED * weights:
        raise ValueError("the parts of the query cancel out: nothing is left to search for")
    unit: NDArray[Any] = total / length
    return unit


def _finalists(scores: NDArray[Any], k: int) -> NDArray[Any]:
    """Indices that can be among the k best: the k-th best of the tiles' maxima is below at least k scores."""
    if len(scores) <= k:
        return np.arange(len(scores))
    whole = len(scores) // TILE * TILE
    best = scores[:whole].reshape(-1, TILE).max(axis=1) if whole // TILE >= k else scores
    return np.flatnonzero(scores >= np.partition(best, -k)[-k] - np.float32(SLACK))


def _widen(raw: NDArray[Any], out: NDArray[Any]) -> None:
    """float16 -> float32 by moving bits, which is several times faster than NumPy's own cast."""
    for start in range(0, len(raw), WIDENED):
        part, wide = raw[start : start + WIDENED], out[start : start + WIDENED]
        if raw.dtype == np.float16:
            bits = wide.view(np.int32)
            bits[...] = part.view(np.int16)
            bits <<= 13
            bits &= np.int32(-0x70002000)  # the sign, and exponent and mantissa 13 indices up
            wide *= np.float32(2.0**112)  # the two formats count exponents from 15 and from 127
        else:
            wide[...] = part
        # No vector that was stored has Inf or NaN, which as float16 become the numbers from here on.
        if not -HALF_INFINITE < wide.min() <= wide.max() < HALF_INFINITE:
            raise FloatingPointError(NOT_FINITE)
