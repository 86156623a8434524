"""The file that keeps a training run: parameters, optimizer, best parameters and progress, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

Arrays = dict[str, mx.array]

PARTS = ("parameters", "first", "second", "best")


@dataclass(frozen=True)
class State:
    """What `StateFile.save` was given."""

    parameters: Arrays
    first: Arrays
    second: Arrays
    best: Arrays
    progress: dict[str, Any]


class StateFile:
    """`state.safetensors` in a folder, for one set of settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "state.safetensors"
        self.settings = dict(settings)

    def save(
        self, parameters: Arrays, first: Arrays, second: Arrays, best: Arrays, progress: Mapping[str, Any]
    ) -> None:
        """Writes beside the file and takes its name when everything is on disk."""
        arrays = {
            f"{part}/{name}": array
            for part, group in zip(PARTS, (parameters, first, second, best), strict=True)
            for name, array in group.items()
        }
        beside = self.folder / "state.unfinished.safetensors"
        metadata = {"settings": json.dumps(self.settings), "progress": json.dumps(dict(progress))}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(beside), arrays, metadata=metadata)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(self.path)
        except (OSError, RuntimeError) as error:  # MLX reports a full disk as a RuntimeError
            beside.unlink(missing_ok=True)
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            raise OSError(
                f"the state of the training cannot be written to {self.folder}: {why}"
                f"{'; free some space and go on with --resume' if full else ''}"
            ) from None

    def load(self, wanted: Arrays) -> State | None:
        """What is there; None where there is nothing. ValueError where it is for another model or other settings."""
        if not self.path.is_file():
            return None
        try:
            loaded: Any = mx.load(str(self.path), return_metadata=True)
            arrays, metadata = loaded
            settings, progress = json.loads(metadata["settings"]), json.loads(metadata["progress"])
        except (RuntimeError, KeyError, ValueError):
            raise ValueError(f"{self.path} is damaged: remove {self.folder} and begin anew") from None
        if other := [key for key, value in self.settings.items() if settings.get(key) != value]:
            key = other[0]
            raise ValueError(
                f"{self.folder} was begun with {key.replace('_', '-')} {settings.get(key)}, now it is "
                f"{self.settings[key]}: resume with the same settings, or remove that folder"
            )
        groups: dict[str, Arrays] = {part: {} for part in PARTS}
        for name, array in arrays.items():
            part, _, path = name.partition("/")
            groups[part][path] = array
        shapes = {name: tuple(array.shape) for name, array in wanted.items()}
        if {name: tuple(array.shape) for name, array in groups["parameters"].items()} != shapes:
            raise ValueError(f"{self.folder} is of another model: remove it and begin anew")
        mx.eval(groups)
        return State(**groups, progress=progress)
