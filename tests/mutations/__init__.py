"""Faults that the tests must notice, one table per part of the package, and the script that tries them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A fault: `old`, which stands once in all of the package, becomes `new`, and one of `tests` must fail.

    `tests` are files or node ids. Where the code moves to another file the fault goes with it.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]
