"""Finds a checkpoint on disk or on the Hub at a pinned commit, and reads its tensors lazily."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_aimv2.checkpoint.detect import listed, recognise
from mlx_aimv2.config import DTYPES, RELEASED, dtype_name
from mlx_aimv2.files import check_link, expand_user, read_json, read_text

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
INDEX_FILES = (INDEX_FILE, "pytorch_model.bin.index.json")
"""Names of the list of shards; a folder that has one is read by it."""

WEIGHT_FILES = ("model.safetensors", "mlx_model.safetensors", "pytorch_model.bin")
"""Names under which a folder may hold its weights whole, the first found is taken."""

PICKLES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLES)
"""How a file of weights ends: PyTorch's pickles besides safetensors."""

SHARD = r"[\w.,+=@-]{1,200}\.(safetensors|bin|pt|pth)"
"""Names that a list of shards may hold: no pattern, which would fetch the whole repository."""

AUXILIARY_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "ACKNOWLEDGEMENTS*",
)
"""Files that belong to a checkpoint beside its weights and are carried along into every folder made from it."""

HUB_FILES = (CONFIG_FILE, "README.md", *INDEX_FILES, *AUXILIARY_FILES)
"""What is fetched from the Hub before the weights, whose files it names."""


@dataclass
class Checkpoint:
    """What was read: the tensors (lazy, under their own names), config.json, and where all of it came from.

    `path` is what was given or downloaded, a folder or a file of weights; `files` are those that hold the weights.
    `repo` and `commit` are None for a checkpoint that was on disk.
    """

    path: Path
    folder: Path
    files: list[Path]
    config: dict[str, Any]
    tensors: dict[str, mx.array]
    repo: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        """The name by which its user knows it: the repository with the commit, or the folder."""
        return f"{self.repo} at {self.commit}" if self.repo else str(self.folder)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor under its own name."""
        return {name: tuple(array.shape) for name, array in self.tensors.items()}

    def check_dtypes(self, names: Iterable[str], packed: Mapping[str, mx.Dtype]) -> None:
        """Raises ValueError that names each of the tensors of a wrong dtype: `packed` has those that are no floats."""
        dtypes = {name: self.tensors[name].dtype for name in names}
        if wrong := [name for name in packed if dtypes[name] != packed[name]]:
            each = [f"{name} is {dtype_name(dtypes[name])} (wanted {dtype_name(packed[name])})" for name in wrong]
            raise ValueError(f"quantized weights are packed integers, got {', '.join(each)}")
        dense = {name: dtype_name(dtype) for name, dtype in dtypes.items() if name not in packed}
        if other := [f"{name} is {dtype}" for name, dtype in dense.items() if dtype not in DTYPES]:
            raise ValueError(f"weights must be {', '.join(DTYPES)}, got {', '.join(other)}")


def read(path_or_hf_repo: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint and reads its header: a folder, a weight file or a Hub name `-> Checkpoint`.

    Nothing of the weights is in memory yet. Raises FileNotFoundError for what is not there, ValueError for what is not
    a checkpoint, ConnectionError for a Hub that cannot be asked; each message names the file or repository.
    """
    path, repo, commit = find(path_or_hf_repo, revision=revision)
    try:
        folder, files = _weight_files(path)
    except FileNotFoundError as error:
        if repo is None:
            raise
        reason = str(error).removeprefix(f"{path}: ")
        raise FileNotFoundError(f"{repo} at {commit}: {reason}; if the Hub has more, connect and run again") from None
    config = read_json(folder / CONFIG_FILE)
    for file in files:
        _check_safetensors(file)
    tensors = read_tensors(files)
    if not path.is_file():
        _check_index(folder, files, tensors)
    return Checkpoint(path, folder, files, config, tensors, repo, commit)


def read_tensors(files: Iterable[Path]) -> dict[str, mx.array]:
    """The tensors of all files, lazy but for pickles: `files -> {source name: array}`."""
    tensors: dict[str, mx.array] = {}
    for file in files:
        more = _read_weights(file)
        if twice := sorted(set(more) & set(tensors)):
            raise ValueError(f"{file}: holds tensors that another shard holds too: {', '.join(twice)}")
        tensors |= more
    return tensors


def find(
    path_or_hf_repo: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[Path, str | None, str | None]:
    """Where a checkpoint lies: `path or Hub name -> (path on disk, repository or None, commit or None)`.

    A path on disk comes first. A released checkpoint without `revision` is taken at its pinned commit.
    """
    path = expand_user(path_or_hf_repo)
    if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"{path}: not a weight file; wanted {', '.join(WEIGHT_SUFFIXES)}, or a checkpoint's folder")
    if path.exists():
        if revision is not None:
            raise ValueError(f"{path} is on disk and has no revision; leave revision out or give a Hub name")
        return _in_cache(path), None, None
    name = str(path_or_hf_repo)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        near = difflib.get_close_matches(f"apple/{name}", [f"apple/{known}" for known in RELEASED], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"{name}: no such file or folder, and no Hub name of the form owner/name{hint}")
    pinned = RELEASED.get(name.removeprefix("apple/")) if name.startswith("apple/") else None
    folder = _download(name, revision or (pinned.commit if pinned else None))
    return folder, name, folder.name


def _in_cache(path: Path) -> Path:
    """The commit's folder where a path is that of a repository in the Hub's cache; any other path as it is."""
    repository = path.parent if path.name == "snapshots" else path
    if not repository.name.startswith("models--") or not (repository / "snapshots").is_dir():
        return path
    commits = sorted(folder.name for folder in (repository / "snapshots").iterdir() if folder.is_dir())
    main = repository / "refs" / "main"
    commit = read_text(main, max_bytes=1000).strip() if main.is_file() else None
    if commit is None and len(commits) == 1:
        commit = commits[0]
    if commit not in commits:
        held = f"it holds {', '.join(commits)}: give the folder of one of them" if commits else "it holds no commit"
        raise FileNotFoundError(f"{path} is a repository in the Hub's cache without what refs/main names; {held}")
    return repository / "snapshots" / commit


def _download(repo: str, revision: str | None) -> Path:
    """Fetches a checkpoint, never the same weights twice, and of a larger model only the encoder."""
    from mlx_aimv2.checkpoint import hub

    folder = hub.download(repo, revision=revision, patterns=HUB_FILES)
    commit = folder.name  # from here on, so that a branch that moves meanwhile is not taken half
    if (index := _index(folder)) is not None:
        return hub.download(repo, revision=commit, patterns=(CONFIG_FILE, *_shards_of_encoder(index)))
    for name in WEIGHT_FILES:
        hub.download(repo, revision=commit, patterns=(CONFIG_FILE, name))
        if (folder / name).is_file():
            break
    return folder


def _weight_files(path: Path) -> tuple[Path, list[Path]]:
    """The folder and the files that hold the weights."""
    if path.is_file():
        return path.parent, [path]
    if (index := _index(path)) is not None:
        needed = _shards_of_encoder(index)
        for name in needed:
            check_link(path / name)
        if missing := [name for name in needed if not (path / name).is_file()]:
            raise FileNotFoundError(f"{path}: {index.name} names shards that are not there: {', '.join(missing)}")
        return path, [path / name for name in needed]
    for name in WEIGHT_FILES:
        check_link(path / name)
        if (path / name).is_file():
            return path, [path / name]
    if any(path.glob("model-*-of-*.safetensors")):
        raise FileNotFoundError(f"{path}: has shards but no {INDEX_FILE} that lists them")
    raise FileNotFoundError(f"{path}: no weights; looked for {', '.join((*INDEX_FILES, *WEIGHT_FILES))}")


def _index(folder: Path) -> Path | None:
    for name in INDEX_FILES:
        check_link(folder / name)
    return next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)


def _shards_of_encoder(index: Path) -> list[str]:
    """The shards that hold the encoder, which may be a small part of a large model; all if no encoder is recognised."""
    weight_map = _weight_map(index)
    try:
        prefix = recognise(dict.fromkeys(weight_map, ())).prefix
    except ValueError:  # said better once the shapes are known
        prefix = ""
    return sorted({file for name, file in weight_map.items() if name.startswith(prefix)})


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: no weight_map of tensor names to file names")
    if outside := [name for name in weight_map.values() if Path(name).name != name]:
        raise ValueError(f"{index}: names a file outside its folder: {outside[0]!r:.200}")
    if other := [name for name in weight_map.values() if not re.fullmatch(SHARD, name)]:  # it is asked of the Hub
        raise ValueError(f"{index}: names {other[0]!r:.200}, which is no file of weights")
    return weight_map


def _check_index(folder: Path, files: list[Path], tensors: Mapping[str, mx.array]) -> None:
    if (index := _index(folder)) is None:
        return
    read = {file.name for file in files}
    if absent := {name for name, file in _weight_map(index).items() if file in read} - set(tensors):
        raise ValueError(f"{index}: lists tensors that no shard holds: {listed(absent)}")


def _check_safetensors(file: Path) -> None:
    """Checks path, header and size before MLX reads the file, which would fail later and less clearly."""
    from safetensors import SafetensorError, safe_open

    if file.suffix in PICKLES:
        return
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{file}: the path is not UTF-8, which MLX cannot open: rename it") from None
    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or not a safetensors file ({_short(error)}); fetch it again") from None


def _read_weights(file: Path) -> dict[str, mx.array]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} vanished while it was read")
    if file.suffix in PICKLES:
        return _read_pickle(file)
    try:
        return dict(mx.load(str(file)))  # type: ignore[arg-type]
    except RuntimeError as error:  # a dtype that MLX has not
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist any more") from None
        raise ValueError(f"{file}: MLX cannot read it ({_short(error)}); weights must be {', '.join(DTYPES)}") from None


def _read_pickle(file: Path) -> dict[str, mx.array]:
    """Tensors of PyTorch's pickled state dict, which only torch can read, safely with `weights_only=True`.

    Raises ValueError when torch is not installed or the file holds anything but tensors.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{file}: a pickled file, which only torch reads safely; install it (pip install torch) for this one "
            "conversion, or fetch the .safetensors file of the same checkpoint"
        ) from None
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means that the file cannot be used
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: torch refuses to read it as plain weights ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file}: holds more than named tensors; wanted a state dict")
    # MLX would make float32 of float64 in silence. Whole numbers may belong to the rest of a larger model.
    allowed = {getattr(torch, name) for name in (*DTYPES, "bool", "uint8", "int8", "int32", "int64")}
    if other := [f"{name} is {tensor.dtype}" for name, tensor in state.items() if tensor.dtype not in allowed]:
        raise ValueError(f"{file}: weights must be {', '.join(DTYPES)}, got {', '.join(other)}")
    arrays: dict[str, mx.array] = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16: carry the bits
            bits = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
            arrays[name] = mx.array(bits).view(mx.bfloat16)
        else:
            arrays[name] = mx.array(tensor.contiguous().numpy())
    return arrays


def _short(error: Exception) -> str:
    """One line of an error that may quote an untrusted file at length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
