"""Batches of training examples, made ahead by threads: batch i is a function of the seed and of i alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_aimv2.learn.data import Sample

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]

Make: TypeAlias = Callable[[Sample, np.random.Generator], Arrays]
"""One sample's arrays, changed at random by the generator."""


class Batches:
    """`batches(i) -> {name: (B, …)}`: the share of one rank of batch i.

    The samples are shuffled for every epoch; those that fill no batch at its end are left out. Each image has a random
    generator of its own, so that the number of ranks changes nothing.
    """

    def __init__(
        self, samples: Sequence[Sample], make: Make, *, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if batch_size % ranks:
            raise ValueError(f"--batch-size {batch_size} does not divide by {ranks} ranks: choose a multiple of it")
        self.samples = samples
        self.make = make
        self.batch_size = batch_size
        self.seed = seed
        share = batch_size // ranks
        self.mine = slice(rank * share, (rank + 1) * share)
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1, "examples")
        self.coming: dict[int, list[Future[Arrays]]] = {}

    @property
    def per_epoch(self) -> int:
        """Batches of one pass through the samples."""
        return len(self.samples) // self.batch_size

    def __call__(self, number: int) -> dict[str, mx.array]:
        """Batch `number`; the next one is made meanwhile."""
        for wanted in (number, number + 1):
            if wanted not in self.coming:
                self.coming[wanted] = self._submitted(wanted)
        examples = [future.result() for future in self.coming.pop(number)]
        return {name: mx.array(np.stack([example[name] for example in examples])) for name in examples[0]}

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _submitted(self, number: int) -> list[Future[Arrays]]:
        epoch, place = divmod(number, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        numbered = list(enumerate(chosen))[self.mine]
        return [
            self.pool.submit(self.make, self.samples[index], np.random.default_rng([self.seed, number, position]))
            for position, index in numbered
        ]
