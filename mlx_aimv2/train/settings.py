"""Settings of a run: dataclasses whose fields have a default, a condition, and a flag with its help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, field, fields
from typing import Any

RANGES = {
    "any": lambda value: True,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "above 0": lambda value: value > 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0.01 to 1": lambda value: 0.01 <= value <= 1,
    "above 0, at most 1": lambda value: 0 < value <= 1,
    "above 0, below 0.5": lambda value: 0 < value < 0.5,
    "at least 0, below 1": lambda value: 0 <= value < 1,
    "a number of blocks, or -1 for all": lambda value: value == -1 or value >= 1,
    "the fewest, 2 at least, and the most": lambda value: 2 <= value[0] <= value[1],
}
"""The condition on a value, as worded in errors -> its check."""

MAX_COUNT = 2**31 - 1
"""The largest whole number by default: the product of two of them still fits into MLX's 64 bits."""

MAX_SEED = 2**64 - 1
"""The largest seed that MLX takes."""

MAX_FLOAT = 3.4e38
"""The largest number of any field: float32 is infinite above it."""


def setting(
    default: Any,
    group: str,
    words: str,
    must_be: str = "any",
    *,
    maximum: int = MAX_COUNT,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A field with a flag: its default, the flag's group in the help, its help, and what the value must be (`RANGES`).

    A default of None stands for another one, which the help names. `choices` are the allowed texts.
    """
    about = {"group": group, "help": words, "must_be": must_be, "maximum": maximum, "holds": RANGES[must_be]}
    return field(default=default, metadata=about | {"metavar": metavar, "choices": choices})


def flagged(kind: Any) -> list[Field[Any]]:
    """The fields of a dataclass that have a flag."""
    return [one for one in fields(kind) if "help" in one.metadata]


def flag(one: Field[Any]) -> str:
    """The flag of a field: `--batch-size`, and `--no-flip` for one that is on by default."""
    return f"--{'no-' if one.default is True else ''}{one.name.replace('_', '-')}"


def check(settings: Any) -> None:
    """Raises ValueError for the first value its field does not allow, under the name of the flag."""
    for one in flagged(settings):
        value, about = getattr(settings, one.name), one.metadata
        numbers = value if isinstance(value, tuple) else (value,)
        if value is None:
            continue
        if any(isinstance(number, float) and not abs(number) <= MAX_FLOAT for number in numbers):
            wanted = "a finite number"
        elif any(isinstance(number, int) and number > about["maximum"] for number in numbers):
            wanted = f"at most {about['maximum']:,}"
        elif about["choices"] is not None and value not in about["choices"]:
            wanted = ", ".join(about["choices"])
        elif not about["holds"](value):
            wanted = about["must_be"]
        else:
            continue
        raise ValueError(f"{flag(one)} must be {wanted}, got {' '.join(map(str, numbers))}")
