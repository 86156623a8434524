"""Batches that are made ahead: while the device computes, threads decode and augment the examples of the next one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"

MakeAll: TypeAlias = Callable[[Sequence[Any]], list[Any]]
"""Several examples at a time, in threads; in the place of one that cannot be made stands its ValueError or OSError."""

Order: TypeAlias = Callable[[int, MakeAll], tuple[list[Any], int]]
"""Number of a batch, and what makes examples -> the examples of that batch, and the number of the next example."""


def stacked(examples: Sequence[Arrays]) -> dict[str, mx.array]:
    """Examples of equal shapes as one batch, `{name: (…)} … -> {name: (B, …)}`."""
    return {name: mx.array(np.stack([example[name] for example in examples])) for name in examples[0]}


class Batches:
    """`batches(i) -> (batch, number of the next example)`; batch i + 1 is made meanwhile."""

    def __init__(
        self, order: Order, make: Callable[[Any], Any], *, collate: Callable[[Sequence[Any]], Any] = stacked
    ) -> None:
        """`make` turns what `order` takes into an example; `collate` makes a batch of examples."""
        self._order, self._make, self._collate = order, make, collate
        self._examples = ThreadPoolExecutor(os.cpu_count() or 1, "examples")
        self._batches = ThreadPoolExecutor(1, "batches")
        self._coming: dict[int, Future[tuple[list[Any], int]]] = {}

    def __call__(self, number: int) -> tuple[Any, int]:
        """Batch `number`."""
        for coming in (number, number + 1):
            if coming not in self._coming:
                self._coming[coming] = self._batches.submit(self._order, coming, self._make_all)
        examples, position = self._coming.pop(number).result()
        return self._collate(examples), position

    def close(self) -> None:
        """Ends the threads."""
        self._batches.shutdown(wait=True, cancel_futures=True)
        self._examples.shutdown(wait=True, cancel_futures=True)

    def _make_all(self, items: Sequence[Any]) -> list[Any]:
        return list(self._examples.map(self._attempt, items))

    def _attempt(self, item: Any) -> Any:
        try:
            return self._make(item)
        except (ValueError, OSError) as error:
            return error


class Shuffled:
    """Samples with a random generator each, in a new order for each epoch: batch i is a function of seed and i alone.

    The samples that fill no batch at the end of an epoch are left out. The number of ranks changes nothing.
    """

    def __init__(self, samples: Sequence[Any], *, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        """`batch_size` counts the samples of all ranks, of which this one takes its share."""
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        share = share_of(batch_size, ranks)
        self.mine = slice(rank * share, (rank + 1) * share)

    @property
    def per_epoch(self) -> int:
        """Batches of one pass through the samples."""
        return len(self.samples) // self.batch_size

    def __call__(self, number: int, make_all: MakeAll) -> tuple[list[Any], int]:
        """This rank's share of batch `number`, made of pairs (sample, generator). Raises what an example raised."""
        epoch, index = divmod(number, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        mine = list(enumerate(chosen))[self.mine]
        examples = make_all([(self.samples[i], np.random.default_rng([self.seed, number, j])) for j, i in mine])
        for example in examples:
            if isinstance(example, Exception):
                raise example
        return examples, (number + 1) * self.batch_size


def share_of(batch_size: int, ranks: int) -> int:
    """Examples of a batch on one rank. Raises ValueError for a batch that does not divide."""
    if batch_size % ranks:
        raise ValueError(f"--batch-size {batch_size} does not divide by {ranks} ranks: choose a multiple of it")
    return batch_size // ranks
