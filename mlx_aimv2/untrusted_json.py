"""Reads JSON from untrusted sources: bounded, so no later code meets a value it cannot hold, and typed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

MAX_DEPTH = 100
"""Nesting of objects and lists; config.json has four levels. Python itself gives up at about a thousand."""

MAX_DIGITS = 300
"""Digits of a number: more do not fit into a float."""

_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Fields: TypeAlias = "Mapping[str, type | tuple[type, ...]]"
"""Names that an object must have, and the types of their values."""


def parse(content: str | bytes, name: object, *, but: Collection[str] = ()) -> Any:
    """The value of a JSON text, called `name` in errors. ValueError with one line if it is not JSON or out of bounds.

    Every whole number fits into a float, every string is valid text except under the names in `but`, and nothing is
    nested deeper than `MAX_DEPTH`. NaN and infinity, which Python's json writes, are read: `misfit` refuses them.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        if _LONG_NUMBER.search(text):
            raise ValueError(f"a number of more than {MAX_DIGITS} digits")
        value = json.loads(text)
        if _is_deeper(value, MAX_DEPTH):
            raise RecursionError
        if _SURROGATE.search(text):  # half of a pair is not text; names may hold what os makes of bytes
            own = value.items() if isinstance(value, dict) and but else ()
            checked = {key: one for key, one in own if key.strip().lower() not in but} if own else value
            json.dumps(checked, ensure_ascii=False).encode(errors="surrogateescape")
    except RecursionError:
        raise ValueError(f"{name}: not readable JSON (nested more than {MAX_DEPTH} deep)") from None
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    return value


def misfit(value: Any, fields: Fields) -> str | None:
    """The first of the fields that is missing from `value` or has the wrong type; None if all are fine.

    A bool is not a number, and a number is finite.
    """
    has = value if isinstance(value, dict) else {}
    return next((name for name, kind in fields.items() if name not in has or not _is(has[name], kind)), None)


def are_numbers(value: Any) -> bool:
    """Whether a value is a list of finite numbers."""
    return isinstance(value, list) and all(_is(one, (int, float)) for one in value)


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) and (not isinstance(value, float) or math.isfinite(value))


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether objects and lists are nested deeper than this."""
    level: list[Any] = [[value]]
    for _ in range(depth + 1):
        inside = (part for one in level for part in (one.values() if isinstance(one, dict) else one))
        level = [part for part in inside if isinstance(part, (dict, list))]
    return bool(level)
