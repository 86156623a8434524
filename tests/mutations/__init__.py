"""Faults that the tests must notice, one table per part of the package, and the script that tries them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A fault: `old`, which stands once in `file`, becomes `new`, and one of `tests` (files or node ids) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
