"""What a run keeps to go on with: OUTPUT.training, its state file, and what must be the same when it is resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_aimv2.checkpoint.read import read_safetensors
from mlx_aimv2.conversion.folder import write_safetensors
from mlx_aimv2.files import UNFINISHED, check_target, locked, one_line
from mlx_aimv2.train.optimizer import Arrays
from mlx_aimv2.train.settings import MAX_COUNT
from mlx_aimv2.untrusted_json import are_numbers, misfit, parse

STATE_FILE = "state.safetensors"

LEFT = (STATE_FILE, f".{STATE_FILE}{UNFINISHED}", "tokenizer*.json", "log.jsonl", "patches-*.png")
"""What runs write to OUTPUT.training."""

PARTS = ("model", "optimizer", "kept")
"""Beginnings of the names of its tensors: parameters, moments, and the parameters that the run will end with."""

SAMPLE = 1 << 12
SAMPLES = 256
"""Bytes of a block, and about how many blocks stand for a file which is larger than all of them, as shards are."""

KEPT = "keeps the state, continue with --resume"


def training_folder(output: Path) -> Path:
    """The folder beside a result in which the state of its run lies."""
    return output.with_name(f"{output.name}.training")


@contextmanager
def training_run(output: Path, *, resume: bool, rank: int = 0) -> Iterator[Path]:
    """OUTPUT.training, in a block that one run at a time is in; of several ranks the first one sees to it.

    A run that ends by an error leaves a state, or nothing. Raises FileExistsError where something stands at OUTPUT,
    another run is writing, or one was stopped, and FileNotFoundError where there is nothing to resume.
    """
    folder = training_folder(output)
    state = folder / STATE_FILE
    with locked(folder, patience=0) if rank == 0 else nullcontext():
        check_target(output)  # a run that has just ended may have made it
        if state.is_file() and not resume:
            raise FileExistsError(f"{folder} has a stopped run: continue with --resume, or remove that folder")
        if resume and not state.is_file():
            raise FileNotFoundError(f"nothing to resume: {folder} has no {STATE_FILE}; leave --resume out")
        try:
            yield folder
        except BaseException as error:
            if rank == 0 and not state.is_file():
                discard(folder)
            if not isinstance(error, OSError) or KEPT in str(error):
                raise
            advice = f"; {folder} {KEPT}" if state.is_file() else ""
            raise type(error)(f"{one_line(error, error.filename or folder)}{advice}") from None


def discard(folder: Path) -> None:
    """Removes what a run has written to OUTPUT.training, and the folder unless somebody else keeps something there."""
    for file in (file for pattern in LEFT for file in folder.glob(pattern)):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@dataclass
class Progress:
    """How far training is: steps, best score and its step, best val loss, evaluations since, every one, and so on."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    best_loss: float = math.inf
    stale: int = 0
    losses: float = 0.0
    first_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


class StateFile:
    """`state.safetensors` in a folder, for one `identity`: all that must be the same when the run goes on."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Raises ValueError where the folder holds the state of another run, and says in what it differs."""
        self.folder, self.path = folder, folder / STATE_FILE
        self.identity = json.loads(json.dumps(identity))
        self.progress: Progress | None = None
        if not self.path.is_file():
            return
        _, before, self.progress = self._read()
        then, now = dict(tree_flatten(before)), dict(tree_flatten(self.identity))
        if differences := [
            f"{name.replace('_', '-').replace('.', ' ')} {then.get(name)}, now {now.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]:
            raise ValueError(
                f"{folder} was started with {'; '.join(differences)}: resume with the same, or remove that folder"
            )

    def save(self, parts: Mapping[str, Arrays], progress: Progress) -> None:
        """Writes beside the file and takes its name when everything is on disk; a full disk leaves the one before."""
        tensors = {f"{part}.{name}": array for part in PARTS for name, array in parts.get(part, {}).items()}
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(asdict(progress))}
        beside = self.folder / f".{STATE_FILE}{UNFINISHED}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(beside, tensors, metadata=metadata)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OSError(f"{self.path} cannot be written ({error.strerror or error}): make room") from None

    def load(self, wanted: Arrays) -> dict[str, Arrays]:
        """The arrays by part and name. Raises ValueError where they are not those of a model with these parameters."""
        parts, (tensors, _, _) = {part: Arrays() for part in PARTS}, self._read()
        for name, array in tensors.items():
            part, _, path = name.partition(".")
            parts[part][path] = array
        shapes = {name: array.shape for name, array in wanted.items()}
        moments = {f"{name}.{moment}": shape for name, shape in shapes.items() for moment in ("m", "v")}
        expected = {"model": shapes, "optimizer": moments, "kept": shapes if parts["kept"] else {}}
        found = {part: {name: array.shape for name, array in arrays.items()} for part, arrays in parts.items()}
        if found != expected or not all(mx.issubdtype(array.dtype, mx.floating) for array in tensors.values()):
            raise ValueError(f"{self.folder} is from another model: remove it and start again")
        mx.eval(parts)
        return parts

    def _read(self) -> tuple[Arrays, dict[str, Any], Progress]:
        """The tensors of the file, and identity and progress of the run that wrote it."""
        try:
            tensors, about = read_safetensors(self.path)
            identity, saved = (parse(about[name], name) for name in ("identity", "progress"))
            is_whole = isinstance(identity, dict) and {name.partition(".")[0] for name in tensors} <= set(PARTS)
            if not is_whole or not isinstance(saved, dict) or not _is_progress(saved):
                raise ValueError("not what `save` writes")
            return tensors, identity, Progress(**saved)
        except (KeyError, ValueError):
            message = f"{self.path} is damaged, or from another version: remove {self.folder} and start again"
            raise ValueError(message) from None


def _is_progress(saved: dict[str, Any]) -> bool:
    """Whether the fields of a `Progress` have their types and values that it may have."""
    found, wanted = ({name: type(value) for name, value in one.items()} for one in (saved, vars(Progress())))
    if found != wanted or not 0 <= saved["step"] <= MAX_COUNT or not are_numbers(saved["positions"]):
        return False
    return not any(misfit(one, {"step": int}) or not are_numbers([*one.values()]) for one in saved["history"])


def digest_of(values: Iterable[Any]) -> str:
    """A short name of numbers, texts, arrays, files (`Path`) and what holds them: of their content alone."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(_plain(value)).encode() + b"\n")
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Tuples of numbers and texts, equal for equal content; bytes are their digest."""
    if isinstance(value, np.ndarray):
        value = (str(value.dtype), value.shape, value.tobytes())
    elif is_dataclass(value):
        value = tuple(vars(value).values())
    elif isinstance(value, Path):
        value = tuple(_blocks(value))
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _blocks(file: Path) -> Iterator[int | bytes]:
    """The size of a file and its content, of a large one blocks that lie evenly in it; nothing if it is unreadable."""
    with suppress(OSError), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        yield size
        for start in range(0, size, max(SAMPLE, size // SAMPLES)):
            stream.seek(start)
            yield stream.read(SAMPLE)
