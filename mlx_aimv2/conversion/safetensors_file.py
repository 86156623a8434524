"""Writes a safetensors file one tensor after another, so that its weights are never in memory together.

MLX's own writer takes a whole file's tensors at once, so a shard of 5 GB needs 5 GB. The shapes and dtypes of lazy
arrays are known before they are computed, so the header can be written first and each tensor computed, written and
freed in turn. The format is safetensors': the header's length in eight bytes, the header as JSON, the tensors.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

CODES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}
"""safetensors' names of the dtypes that a checkpoint may hold."""

ALIGNMENT = 8

AHEAD = 4
"""How many tensors are computed while one is written: a quantized layer has three."""

CACHE_BYTES = 1 << 30
"""Freed buffers that MLX may keep meanwhile. A 3B model uses some 0.5 GB of it; with less every tensor's memory is
requested from the system again, which took as long as casting it. Metal sets no limit, so they would pile up."""


def write(path: Path, tensors: dict[str, mx.array], *, metadata: Mapping[str, str]) -> None:
    """Writes lazy arrays as one safetensors file and empties `tensors`; memory holds a few of them at a time.

    Raises OSError when the disk takes no more, or when the file behind a lazy array can no longer be read.
    """
    # A tensor of odd length puts what follows at odd addresses, so those come last, the wider numbers first.
    order = sorted(tensors, key=lambda name: (_padding_order(tensors[name]), name))
    limit = mx.set_cache_limit(CACHE_BYTES)
    try:
        with path.open("wb") as file:
            file.write(_header(order, tensors, metadata))
            for array in _computed(order, tensors):
                file.write(memoryview(cast("Any", array)))
    finally:
        _settle()
        mx.set_cache_limit(limit)
        mx.clear_cache()


def _padding_order(array: mx.array) -> int:
    """0 for a whole number of eight bytes; of the others those of wider numbers come first."""
    return 0 if array.nbytes % ALIGNMENT == 0 else ALIGNMENT - array.dtype.size


def _header(order: list[str], tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    ends = list(itertools.accumulate((tensors[name].nbytes for name in order), initial=0))
    for name, start, end in zip(order, ends, ends[1:], strict=False):
        array = tensors[name]
        entries[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _computed(order: list[str], tensors: dict[str, mx.array]) -> Iterator[mx.array]:
    """Each array in turn, the next ones under way while this one is written."""
    name = ""
    try:
        ahead: deque[mx.array] = deque()
        for name in order:
            ahead.append(mx.contiguous(tensors.pop(name)))
            mx.async_eval(ahead[-1])  # type: ignore[no-untyped-call]
            if len(ahead) > AHEAD:
                mx.eval(ahead[0])
                yield ahead.popleft()
        while ahead:
            mx.eval(ahead[0])
            yield ahead.popleft()
    except RuntimeError as error:
        _settle()
        raise OSError(
            f"the source can no longer be read at {name}: was it truncated or changed meanwhile? ({error})"
        ) from None


def _settle() -> None:
    """Waits for what is under way. Reads that fail after the first would else raise in some later call of MLX."""
    for _ in range(AHEAD + 1):
        try:
            mx.synchronize()
        except RuntimeError:
            continue
        return
