"""Breaks bytes and JSON in the ways in which files are broken, by a dice whose seed brings every case back."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    1.5,
    -0.0,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    10**9,
    10**30,
    "",
    "x",
    "0",
    "224",
    "\u0000",
    "\ud800",
    "\x1b]0;title\x07",
    "../../../etc/passwd",
    "x" * 10_000,
    [],
    {},
    [[]],
    [1],
    [1, 2, 3],
    [0.5] * 3,
    {"a": 1},
    {"height": 0, "width": 10**9},
    {"shortest_edge": -1},
)
"""What stands in place of what was expected."""


def broken_bytes(data: bytes, dice: random.Random) -> bytes:
    """One to eight edits: bits, bytes, numbers, parts cut out, doubled, moved, and the end cut off."""
    content = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        if not content:
            return b""
        dice.choice(_EDITS)(content, dice)
    return bytes(content)


def broken_json(value: Any, dice: random.Random) -> Any:
    """One to three values somewhere in a JSON document replaced, removed, doubled or exchanged."""
    value = json.loads(json.dumps(value))
    for _ in range(dice.randint(1, 3)):
        holder, key = dice.choice(list(places(value)) or [(None, None)])
        if holder is None:
            return copy.deepcopy(dice.choice(VALUES))
        what = dice.random()
        if what < 0.65:
            holder[key] = copy.deepcopy(dice.choice(VALUES))
        elif what < 0.8:
            del holder[key]
        elif what < 0.9:
            holder[key] = _near(holder[key], dice)
        elif isinstance(holder, dict):
            holder[dice.choice(("x", "", str(key) * 2, "\x1b[2J", "a" * 5000))] = copy.deepcopy(holder[key])
        else:
            holder.append(copy.deepcopy(holder[key]))
    return value


def broken_text(value: Any, dice: random.Random) -> bytes:
    """A JSON document, broken as JSON three times in four and as bytes else."""
    if dice.random() < 0.75:
        return json.dumps(broken_json(value, dice)).encode()
    return broken_bytes(json.dumps(value, indent=2).encode(), dice)


def broken_tensors(data: bytes, dice: random.Random) -> bytes:
    """A file of safetensors whose header says something else, whose bytes are broken, or whose numbers are none."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    what = dice.random()
    if what < 0.5:
        text = json.dumps(broken_json(json.loads(header), dice)).encode()
    elif what < 0.65:
        content = json.loads(header)
        about = content.get("__metadata__") or {}
        name = dice.choice(sorted(about) or ["x"])
        odd = ("[" * 50_000, "{}", "[]", "null", "7", '{"step": 1e999}', "1" * 400, "NaN")
        inner = about.get(name, "")
        if inner.startswith("{") and dice.random() < 0.7:
            inner = json.dumps(broken_json(json.loads(inner), dice))
        else:
            inner = dice.choice(odd)
        text = json.dumps(content | {"__metadata__": {**about, name: inner}}).encode()
    elif what < 0.75:
        at = dice.randrange(max(1, len(rest) - 8)) // 4 * 4
        return (
            data[: 8 + size] + rest[:at] + dice.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 8)) + rest[at + 4 :]
        )
    elif what < 0.9:
        return broken_bytes(data[: 8 + size], dice) + rest
    else:
        return broken_bytes(data, dice)
    return len(text).to_bytes(8, "little") + text + rest


def places(value: Any) -> Any:
    """Pairs of what holds a value of a JSON document, and its name or number there."""
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from places(value[key])
    elif isinstance(value, list):
        for place in range(len(value)):
            yield value, place
            yield from places(value[place])


def _near(value: Any, dice: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + dice.choice((-2, -1, 1, 2, value, 10**6))
    if isinstance(value, float):
        return value * dice.choice((-1, 0, 1e30, 1e-30))
    if isinstance(value, str):
        return value + dice.choice(("x", "\n", "/", "\x00"))
    return [value]


def _bit(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def _byte(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] = dice.choice((0, 1, 127, 128, 254, 255, dice.randrange(256)))


def _number(content: bytearray, dice: random.Random) -> None:
    size = dice.choice((2, 4, 8))
    at = dice.randrange(len(content))
    number = dice.choice(NUMBERS) % (1 << 8 * size)
    content[at : at + size] = number.to_bytes(size, dice.choice(("little", "big")))


def _cut(content: bytearray, dice: random.Random) -> None:
    at, size = _piece(content, dice)
    del content[at : at + size]


def _doubled(content: bytearray, dice: random.Random) -> None:
    at, size = _piece(content, dice)
    content[at:at] = content[at : at + size] * dice.choice((1, 1, 2, 30))


def _moved(content: bytearray, dice: random.Random) -> None:
    at, size = _piece(content, dice)
    part = content[at : at + size]
    del content[at : at + size]
    to = dice.randrange(len(content) + 1)
    content[to:to] = part


def _ended(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


def _noise(content: bytearray, dice: random.Random) -> None:
    at, size = _piece(content, dice)
    content[at : at + size] = dice.randbytes(size)


def _piece(content: bytearray, dice: random.Random) -> tuple[int, int]:
    return dice.randrange(len(content)), dice.choice((1, 2, 4, 16, 64, dice.randint(1, max(1, len(content) // 4))))


_EDITS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _bit,
    _bit,
    _byte,
    _byte,
    _number,
    _number,
    _cut,
    _doubled,
    _moved,
    _ended,
    _noise,
)
