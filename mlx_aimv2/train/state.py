"""The state of a run in OUTPUT.training: what it needs to go on to the bit, in one file, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

from mlx_aimv2.conversion.folder import write_safetensors
from mlx_aimv2.files import UNFINISHED

Arrays: TypeAlias = dict[str, mx.array]

STATE_FILE = "state.safetensors"

PARTS = ("model", "optimizer", "kept")
"""Beginnings of the tensors' names: parameters, moments, and the parameters that the run will end with."""


def training_folder(output: Path) -> Path:
    """The folder beside a result in which the state of its run lies."""
    return output.with_name(f"{output.name}.training")


def check_training_folder(output: Path, *, resume: bool) -> Path:
    """OUTPUT.training. Raises FileExistsError where a run was stopped, FileNotFoundError where none can be resumed."""
    folder = training_folder(output)
    there = (folder / STATE_FILE).is_file()
    if there and not resume:
        raise FileExistsError(f"{folder} holds a run that was stopped: go on with --resume, or remove that folder")
    if resume and not there:
        raise FileNotFoundError(f"nothing to resume: {folder} has no {STATE_FILE}; leave --resume out")
    return folder


class StateFile:
    """`state.safetensors` in a folder, for one `identity`: all that must be the same when the run goes on."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Raises ValueError where the folder holds the state of another run, and says in what it differs."""
        self.folder = folder
        self.path = folder / STATE_FILE
        self.identity = json.loads(json.dumps(identity))
        self.progress: dict[str, Any] | None = None
        if not self.path.is_file():
            return
        metadata = self._read()[1]
        try:
            before, self.progress = json.loads(metadata["identity"]), json.loads(metadata["progress"])
        except (KeyError, ValueError):
            raise ValueError(f"{self.path} is damaged, or of another version: remove {folder} and begin anew") from None
        if differences := [
            f"{name.replace('_', '-')} {before.get(name)}, now {self.identity.get(name)}"
            for name in sorted(before.keys() | self.identity.keys())
            if before.get(name) != self.identity.get(name)
        ]:
            raise ValueError(
                f"{folder} was begun with {'; '.join(differences)}: resume with the same, or remove that folder"
            )

    def save(self, parts: Mapping[str, Arrays], progress: Mapping[str, Any]) -> None:
        """Writes beside the file and takes its name when everything is on disk; a full disk leaves the one before."""
        tensors = {f"{part}.{name}": array for part in PARTS for name, array in parts.get(part, {}).items()}
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(dict(progress))}
        beside = self.folder / f".{STATE_FILE}{UNFINISHED}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(beside, tensors, metadata=metadata)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            kept = "the one before is kept: make room and go on with --resume" if self.path.is_file() else "make room"
            raise OSError(f"{self.path} cannot be written ({error.strerror or error}); {kept}") from None

    def load(self, wanted: Arrays) -> dict[str, Arrays]:
        """The arrays by part and name. Raises ValueError where they are not those of a model with these parameters."""
        parts: dict[str, Arrays] = {part: {} for part in PARTS}
        for name, array in self._read()[0].items():
            part, _, path = name.partition(".")
            parts[part][path] = array
        shapes = {name: tuple(array.shape) for name, array in wanted.items()}
        if {name: tuple(array.shape) for name, array in parts["model"].items()} != shapes:
            raise ValueError(f"{self.folder} is of another model: remove it and begin anew")
        mx.eval(parts)
        return parts

    def _read(self) -> tuple[Arrays, dict[str, str]]:
        try:
            loaded: Any = mx.load(str(self.path), return_metadata=True)
        except RuntimeError:
            raise ValueError(f"{self.path} is damaged: remove {self.folder} and begin anew") from None
        arrays, metadata = loaded
        return arrays, metadata


def saved_weights(output: Path, *, prefix: str) -> Arrays:
    """The parameters in OUTPUT.training whose paths begin so; none where there is no state."""
    file = training_folder(output) / STATE_FILE
    tensors: Any = mx.load(str(file)) if file.is_file() else {}
    name = f"{PARTS[0]}."
    return {key[len(name) :]: array for key, array in tensors.items() if key.startswith(name + prefix)}
