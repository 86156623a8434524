"""What an interrupted training needs to go on to the bit: one file, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_aimv2.conversion import safetensors_file
from mlx_aimv2.files import UNFINISHED

STATE_FILE = "state.safetensors"
SETTINGS_KEY, STEP_KEY, POSITIONS_KEY = "settings", "step", "positions"


def save(
    folder: Path,
    model: nn.Module,
    optimizer: optim.Optimizer,
    *,
    settings: dict[str, Any],
    step: int,
    positions: list[int],
) -> None:
    """Replaces the folder's state; a full disk leaves the one before. `positions` are the next examples, by rank."""
    tensors = {f"model.{name}": array for name, array in _flat(model.parameters())}
    tensors |= {f"optimizer.{name}": array for name, array in _flat(optimizer.state)}
    scalars = {name: array for name, array in tensors.items() if array.dtype == mx.uint64}
    tensors |= {name: array.astype(mx.uint32) for name, array in scalars.items()}
    about = {SETTINGS_KEY: settings, STEP_KEY: step, POSITIONS_KEY: positions}
    beside = folder / f".{STATE_FILE}{UNFINISHED}"
    try:
        safetensors_file.write(beside, tensors, metadata={"training": json.dumps(about)})
        beside.replace(folder / STATE_FILE)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(
            f"{folder / STATE_FILE} could not be written ({error.strerror or error}); the one before is kept: make "
            "room and go on with --resume"
        ) from None


def load(folder: Path, model: nn.Module, optimizer: optim.Optimizer, settings: dict[str, Any]) -> tuple[int, list[int]]:
    """Puts the state back and returns the step and the positions. Raises ValueError for other settings, naming them."""
    file = folder / STATE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {STATE_FILE} to resume from; start without --resume")
    loaded: Any = mx.load(str(file), format="safetensors", return_metadata=True)
    tensors, metadata = loaded
    about = json.loads(metadata["training"])
    if others := differences(about[SETTINGS_KEY], json.loads(json.dumps(settings))):
        raise ValueError(f"{folder} was started with other settings: {'; '.join(others)}; resume with those")
    model.load_weights([(name[6:], array) for name, array in tensors.items() if name.startswith("model.")])
    own = [(name[10:], array) for name, array in tensors.items() if name.startswith("optimizer.")]
    state: Any = tree_unflatten(own)
    state["step"] = state["step"].astype(mx.uint64)
    optimizer.state = state
    mx.eval(model.parameters(), optimizer.state)
    return int(about[STEP_KEY]), [int(one) for one in about[POSITIONS_KEY]]


def place_of(output: Path) -> Path:
    """The folder beside a checkpoint that holds its training's state."""
    return output.with_name(output.name + ".training")


def model_weights(folder: Path, *, prefix: str) -> dict[str, mx.array]:
    """The saved weights whose names begin so; none where there is no state."""
    file = folder / STATE_FILE
    tensors: Any = mx.load(str(file), format="safetensors") if file.is_file() else {}
    return {name[6:]: array for name, array in tensors.items() if name.startswith(f"model.{prefix}")}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that are not the same, as `name: before, now`."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name} was {before.get(name)}, now {now.get(name)}" for name in names if before.get(name) != now.get(name)
    ]


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(tree)
    return flat
