"""Describes which model and settings made embeddings, and says whether two descriptions can be compared.

A description is a plain dictionary that JSON holds. Weights are distinguished by samples: a few values of every tensor
that no recipe packs into bits (norms, patch embedding, positions), which any dtype changes by less than 2^-8, and a
digest of values from all tensors, which is the same only for the same weights in the same dtype and bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_aimv2.index.reader import Index, damaged
from mlx_aimv2.loading import AnyModel
from mlx_aimv2.untrusted_json import Fields, are_numbers, misfit

Description = dict[str, Any]

MUST_AGREE = ("pool", "layer", "norm", "width", "preprocessing", "max_patches")
"""Fields that must be equal, besides the weights, for two embeddings to be comparable."""

SHOULD_AGREE = ("dtype", "quantization")
"""Fields that change the values a little."""

FIELDS: Fields = {
    "checkpoint": str,
    "commit": (str, NoneType),
    "dtype": str,
    "pool": str,
    "layer": (int, NoneType),
    "norm": bool,
    "max_patches": (int, NoneType),
    "weights": dict,
}
"""Fields of a description that are used again, and their types."""

KEPT_DENSE = ("norm", "patch_embed", "pos_embed")
"""Parts of a parameter's path: these are never quantized."""

SAMPLES = 4
"""Numbers taken from each tensor for the fingerprint, spread evenly."""

TOLERANCE = 2.0**-8
"""Twice what rounding to bfloat16 can change."""


def made_by(index: Index) -> Description:
    """What an index says of the model that made it, checked. Raises ValueError if it does not say it."""
    made = index.provenance
    if "weights" not in made:
        raise ValueError(f"{index.path} does not say which model made it: use it from Python, with vectors")
    if made.get("width", index.width) != index.width:
        raise damaged(index.path, f"width {index.width} where the model gives {made['width']}")
    if (name := misfit(made, FIELDS)) is not None:
        raise damaged(index.path, f"it says {name} {made.get(name)!r} of the model that made it")
    if misfit(made["weights"], {"digest": str, "sample": list}):
        raise damaged(index.path, "it says nothing of the weights that made it")
    return made


def fingerprint(model: AnyModel) -> dict[str, Any]:
    """Samples of the weights: `sample` from the vision encoder's dense tensors, `digest` from all tensors."""
    parameters: Any = sorted(tree_flatten(model.parameters()))
    dense: Any = sorted(tree_flatten(model.vision.parameters()))
    sample = _samples([array for path, array in dense if any(part in path for part in KEPT_DENSE)])
    everything = _samples([array for _, array in parameters])
    names = "\n".join(path for path, _ in parameters)
    digest = hashlib.sha256(names.encode() + everything.tobytes()).hexdigest()
    return {"digest": digest, "sample": [float(f"{value:.7g}") for value in sample]}


def _samples(arrays: Sequence[mx.array]) -> NDArray[np.float32]:
    """A few values from each array, one after another, in float32."""
    taken = []
    for array in arrays:
        indices = mx.array(np.linspace(0, array.size - 1, SAMPLES).astype(np.int32))
        taken.append(array.reshape(-1)[indices].astype(mx.float32))
    return np.array(mx.concatenate(taken))


def differences(stored: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What keeps `other` from being compared with `stored`, and what only deserves a note: two lists of sentences."""
    refused = [_differ(name, stored, other) for name in MUST_AGREE if stored.get(name) != other.get(name)]
    notes = [_differ(name, stored, other) for name in SHOULD_AGREE if stored.get(name) != other.get(name)]
    weights, others = stored.get("weights", {}), other.get("weights", {})
    one, another = weights.get("sample", []), others.get("sample", [])
    names = f"{_name(stored)} there, {_name(other)} here"
    if not are_numbers(one) or len(one) != len(another) or not np.allclose(one, another, rtol=TOLERANCE, atol=1e-6):
        refused.insert(0, f"the weights: {names}")
    elif weights.get("digest") != others.get("digest") and not notes:
        refused.insert(0, f"the weights, though not in the norms: {names}")
    return refused, notes


def _name(description: Mapping[str, Any]) -> str:
    commit = description.get("commit")
    return f"{description.get('checkpoint')}{f' at {commit[:12]}' if commit else ''}"


def _differ(name: str, stored: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    there, here = stored.get(name), other.get(name)
    if isinstance(there, Mapping) and isinstance(here, Mapping):  # only the parts that differ
        parts = [part for part in {**there, **here} if there.get(part) != here.get(part)]
        there, here = ({part: side.get(part) for part in parts} for side in (there, here))
    return f"{name.replace('_', ' ')}: {_value(there)} there, {_value(here)} here"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_value(part)}" for key, part in value.items())
    return "none" if value is None else str(value)
