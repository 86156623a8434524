"""Finds a checkpoint on disk or on the Hub at a pinned commit, and reads its tensors lazily."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_aimv2.checkpoint.detect import listed, recognise, rest_of
from mlx_aimv2.config import DTYPES, RELEASED, Released, dtype_name, near_release
from mlx_aimv2.files import check_link, expand_user, is_file, read_json, read_text

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
INDEX_FILES = (INDEX_FILE, "pytorch_model.bin.index.json")
"""Names of the list of shards; a folder with one is read by it."""

WEIGHT_FILES = ("model.safetensors", "mlx_model.safetensors", "pytorch_model.bin")
"""Names of a folder's weights in one file; the first one found is used."""

PICKLES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLES)
"""Suffixes of weight files: safetensors and PyTorch's pickles."""

SHARD = r"[\w.,+=@-]{1,200}\.(safetensors|bin|pt|pth)"
"""Names allowed in a list of shards: not patterns, which would fetch the whole repository."""

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
"""Files of a checkpoint other than its weights that are copied into every folder made from it."""

WHOLE = "save(model, processor, FOLDER) writes a complete checkpoint, model.save_weights only the weights"
"""What to do if the sizes for weights are missing."""

HUB_FILES = (CONFIG_FILE, "README.md", *INDEX_FILES, *AUXILIARY_FILES)
"""What is fetched from the Hub first: it names the files with the weights."""


@dataclass
class Checkpoint:
    """What was read: the tensors (lazy, under their own names), config.json, and where they came from.

    `path` is the folder or weight file given or downloaded; `files` are the ones with the weights. `repo` and `commit`
    are None for a checkpoint on disk.
    """

    path: Path
    folder: Path
    files: list[Path]
    config: dict[str, Any]
    tensors: dict[str, mx.array]
    repo: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        """The name its user knows: the repository with the commit, or the folder."""
        return f"{self.repo} at {self.commit}" if self.repo else str(self.folder)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor under its own name."""
        return {name: tuple(array.shape) for name, array in self.tensors.items()}

    def check_dtypes(self, names: Iterable[str], packed: Mapping[str, mx.Dtype]) -> None:
        """Raises ValueError naming every tensor with the wrong dtype: `packed` has the dtypes of those not floats."""
        dtypes = {name: self.tensors[name].dtype for name in names}
        if misfits := [name for name in packed if dtypes[name] != packed[name]]:
            each = [f"{name} is {dtype_name(dtypes[name])} (wanted {dtype_name(packed[name])})" for name in misfits]
            raise ValueError(f"quantized weights are packed integers, got {', '.join(each)}")
        dense = {name: dtype_name(dtype) for name, dtype in dtypes.items() if name not in packed}
        if other := [f"{name} is {dtype}" for name, dtype in dense.items() if dtype not in DTYPES]:
            note = "; MLX reads float8 as uint8" if "uint8" in dense.values() else ""
            raise ValueError(f"weights must be {', '.join(DTYPES)}{note}, got {', '.join(other)}")


def read(path_or_hf_repo: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint and reads its header: a folder, a weight file or a Hub name `-> Checkpoint`.

    No weights are in memory yet. Raises FileNotFoundError for what does not exist, ValueError for what is not a
    checkpoint, ConnectionError if the Hub cannot be reached; each message names the file or repository.
    """
    from mlx_aimv2.checkpoint.hub import announce, download

    path, repo, commit = _find(path_or_hf_repo, revision=revision)
    folder, index = (path.parent, None) if path.is_file() else (path, _read_index(path))

    def fetch(names: Sequence[str]) -> None:
        """From the Hub at one commit, so a branch that moves meanwhile is not read half and half."""
        if repo is not None:
            announce(repo, revision=commit, names=names)
            download(repo, revision=commit, patterns=(CONFIG_FILE, *names))

    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    try:
        files = [path] if path.is_file() else _weight_files(folder, index, fetch, config.get("encoder_prefix"))
    except ValueError as error:
        raise ValueError(f"{f'{repo} at {commit}' if repo else folder}: {error}") from None
    except FileNotFoundError as error:
        if repo is None:
            raise
        reason = str(error).removeprefix(f"{path}: ")
        raise FileNotFoundError(f"{repo} at {commit}: {reason}; if the Hub has more, go online and retry") from None
    if not os.path.lexists(folder / CONFIG_FILE):
        raise FileNotFoundError(f"{files[0]}: no {CONFIG_FILE} beside it; {WHOLE}")
    config = config or read_json(folder / CONFIG_FILE)
    for file in files:
        _check_safetensors(file)
    tensors = read_tensors(files)
    if index is not None:
        list_file, weight_map = index
        if absent := {name for name, file in weight_map.items() if folder / file in files} - set(tensors):
            raise ValueError(f"{list_file}: lists tensors that no shard contains: {listed(absent)}")
    return Checkpoint(path, folder, files, config, tensors, repo, commit)


def read_tensors(files: Iterable[Path]) -> dict[str, mx.array]:
    """The tensors of all files, lazy except from pickles: `files -> {source name: array}`."""
    tensors: dict[str, mx.array] = {}
    for file in files:
        more = _read_weights(file)
        if twice := sorted(set(more) & set(tensors)):
            raise ValueError(f"{file}: contains tensors that are also in another shard: {', '.join(twice)}")
        tensors |= more
    return tensors


def _find(path_or_hf_repo: str | os.PathLike[str], *, revision: str | None) -> tuple[Path, str | None, str | None]:
    """Where a checkpoint is: `path or Hub name -> (path on disk, repository or None, commit or None)`.

    A path on disk comes first. A released checkpoint without `revision` is used at its pinned commit. Everything but
    the weights is fetched from the Hub.
    """
    from mlx_aimv2.checkpoint.hub import download

    path = expand_user(path_or_hf_repo)
    if is_file(path) and path.suffix not in WEIGHT_SUFFIXES:
        more = f"; {WHOLE}" if path.suffix == ".npz" else ""
        wanted = ", ".join(WEIGHT_SUFFIXES)
        raise ValueError(f"{path}: not a weight file; wanted {wanted}, or a checkpoint's folder{more}")
    if os.path.exists(path):  # noqa: PTH110 - a Path raises for names that are too long
        if revision is not None:
            raise ValueError(f"{path} is on disk and has no revision; leave revision out or give a Hub name")
        return _in_cache(path), None, None
    name = str(path_or_hf_repo)
    if not is_hub_name(name):
        raise FileNotFoundError(
            f"{name}: no such file or folder, and not a Hub name of the form owner/name{near_release(name)}"
        )
    pinned = released_at(name, revision)
    folder = download(name, revision=pinned.commit if pinned else revision, patterns=HUB_FILES)
    return folder, name, folder.name


def released_at(name: str, revision: str | None) -> Released | None:
    """The released checkpoint of a Hub name, at Apple's commit if no `revision` is given."""
    return RELEASED.get(name.removeprefix("apple/")) if revision is None and name.startswith("apple/") else None


def is_hub_name(name: str) -> bool:
    """Whether a text has the form of a repository's name, `owner/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))


def _in_cache(path: Path) -> Path:
    """The commit's folder if a path is a repository in the Hub's cache; any other path unchanged."""
    repository = path.parent if path.name == "snapshots" else path
    if not repository.name.startswith("models--") or not (repository / "snapshots").is_dir():
        return path
    commits = sorted(folder.name for folder in (repository / "snapshots").iterdir() if folder.is_dir())
    main = repository / "refs" / "main"
    commit = read_text(main, max_bytes=1000).strip() if main.is_file() else None
    if commit is None and len(commits) == 1:
        commit = commits[0]
    if commit not in commits:
        held = f"it has {', '.join(commits)}: give the folder of one of them" if commits else "it has no commit"
        raise FileNotFoundError(f"{path} is a repository in the Hub's cache without what refs/main names; {held}")
    return repository / "snapshots" / commit


def _weight_files(
    folder: Path,
    index: tuple[Path, Mapping[str, str]] | None,
    fetch: Callable[[Sequence[str]], None],
    chosen: object = None,
) -> list[Path]:
    """The files with the weights, only the encoder's for a larger model; `fetch` gets those that are not here.

    Raises ValueError if the names in a list of shards are not those of one encoder, before any shard is fetched.
    """
    if index is not None:
        list_file, weight_map = index
        match = recognise(dict.fromkeys(weight_map, ()), chosen)
        rest = rest_of(weight_map, match)
        needed = sorted(
            {file for name, file in weight_map.items() if name.startswith(match.prefix) and name not in rest}
        )
        fetch(needed)
        for name in needed:
            check_link(folder / name)
        if missing := [name for name in needed if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder}: {list_file.name} names shards that are missing: {', '.join(missing)}")
        return [folder / name for name in needed]
    for name in WEIGHT_FILES:  # one by one, so the same weights are never fetched twice
        fetch([name])
        check_link(folder / name)
        if (folder / name).is_file():
            return [folder / name]
    if any(folder.glob("model-*-of-*.safetensors")):
        raise FileNotFoundError(f"{folder}: has shards but no {INDEX_FILE} that lists them")
    stray = sorted(file.name for kind in ("*.safetensors", "*.npz") for file in folder.glob(kind))
    what = f"; {stray[0]} is not one of them: {WHOLE}" if stray else ""
    raise FileNotFoundError(f"{folder}: no weights; looked for {', '.join((*INDEX_FILES, *WEIGHT_FILES))}{what}")


def _read_index(folder: Path) -> tuple[Path, Mapping[str, str]] | None:
    """The folder's list of shards: `-> (file, {tensor: its file})`, checked; None if it has none."""
    for name in INDEX_FILES:
        check_link(folder / name)
    index = next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)
    if index is None:
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: no weight_map of tensor names to file names")
    if other := [name for name in weight_map.values() if not re.fullmatch(SHARD, name)]:  # asked of the Hub
        raise ValueError(f"{index}: names {other[0]!r:.200}, which is not a weight file in its folder")
    return index, weight_map


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
        raise FileNotFoundError(f"{file} disappeared while it was read")
    if file.suffix in PICKLES:
        return _read_pickle(file)
    return _load(file)[0]


def read_safetensors(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of an untrusted file, lazy, and its metadata. ValueError with one line if it is not such a file."""
    _check_safetensors(file)
    return _load(file)


def _load(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        loaded: Any = mx.load(str(file), return_metadata=True)
    except RuntimeError as error:  # a dtype that MLX does not have
        raise ValueError(f"{file}: MLX cannot read it ({_short(error)}); weights must be {', '.join(DTYPES)}") from None
    return loaded


def _read_pickle(file: Path) -> dict[str, mx.array]:
    """Tensors of PyTorch's pickled state dict, which only torch can read, safely with `weights_only=True`.

    Raises ValueError if torch is not installed or the file contains anything but tensors.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{file}: a pickled file, which only torch can read safely; install it (pip install torch) for this one "
            "conversion, or fetch the .safetensors file of the same checkpoint"
        ) from None
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means the file cannot be used
        raise ValueError(f"{file}: torch refuses to read it as plain weights ({_short(error)})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file}: contains more than named tensors; wanted a state dict")
    # MLX would silently turn float64 into float32. Whole numbers may belong to the rest of a larger model.
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
