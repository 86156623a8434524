"""The folders that `save`, conversion and training write, for MLX or for PyTorch (transformers' layout and Apple's).

Weights in one file or in numbered shards, their index, config.json, and the files that belong with them. A file is
written one tensor after another, so its weights are never in memory together.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_aimv2 import quantize
from mlx_aimv2.checkpoint.detect import differences
from mlx_aimv2.checkpoint.layouts import MLX as MLX_LAYOUT
from mlx_aimv2.checkpoint.layouts import Match, layout_for
from mlx_aimv2.checkpoint.read import AUXILIARY_FILES, CONFIG_FILE, INDEX_FILE, Checkpoint
from mlx_aimv2.config import (
    APPLE_NAMES,
    DTYPES,
    Aimv2Config,
    Aimv2TextConfig,
    Aimv2VisionConfig,
    AnyConfig,
    dtype_name,
)
from mlx_aimv2.conversion import model_card
from mlx_aimv2.files import atomic_folder, check_size, check_target, expand_user, read_bytes, write_json
from mlx_aimv2.images.preprocessing import is_clips
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.loading import AnyModel, Source, build, parameter_shapes
from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel

SHARD_BYTES = 5 << 30
"""A weight file is closed before it exceeds this size, as in mlx-lm."""

CARD_FILE = "README.md"

BESIDE = tuple(name for name in AUXILIARY_FILES if name != "processor_config.json")
"""Files that `save` copies from the checkpoint unless the processor has written them."""

WRITTEN = (CONFIG_FILE, INDEX_FILE, "model*.safetensors", CARD_FILE, "fidelity.json", *AUXILIARY_FILES)
"""Files that a converted folder may hold."""

PYTORCH_LAYOUTS = ("transformers", "apple")
"""The layouts to export."""

MLX, PYTORCH = "mlx", "pt"
"""The library named in a file's header."""

CODES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}
"""safetensors' names of the dtypes that a checkpoint may hold."""

AHEAD = 4
"""Tensors computed while one is written: a quantized layer has three."""

CACHE_BYTES = 1 << 30
"""Freed buffers that MLX may keep meanwhile. A 3B model uses about 0.5 GB of it; with less, every tensor's memory is
requested from the system again, which took as long as casting it. Metal has no limit, so they would pile up."""


def save_weights(
    folder: Path,
    weights: Iterable[tuple[str, mx.array]],
    *,
    reader: str = MLX,
    shard_bytes: int = SHARD_BYTES,
    total_parameters: int | None = None,
) -> int:
    """Writes lazy tensors as one file or as numbered shards, with the index; returns the bytes of all tensors.

    One tensor after another is computed, written and freed. `total_parameters` is for the index, since packed tensors
    hold more numbers than they have elements. PyTorch's readers want no index next to a single file.
    """
    shards: list[dict[str, mx.array]] = [{}]
    held = total_size = elements = 0
    for name, array in weights:
        if shards[-1] and held + array.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = array
        held += array.nbytes
        total_size += array.nbytes
        elements += array.size
    count = len(shards)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_safetensors(folder / file, shard, metadata={"format": reader})
    if count > 1 or reader == MLX:
        about = {"total_size": total_size, "total_parameters": total_parameters or elements}
        write_json(folder / INDEX_FILE, {"metadata": about, "weight_map": dict(sorted(weight_map.items()))})
    return total_size


def write_safetensors(path: Path, tensors: dict[str, mx.array], *, metadata: Mapping[str, str]) -> None:
    """Writes lazy arrays as one safetensors file and empties `tensors`; memory holds a few of them at a time.

    MLX's own writer takes a whole file's tensors at once, so a shard of 5 GB needs 5 GB. The shapes and dtypes of lazy
    arrays are known before they are computed, so the header can be written first and each tensor computed, written and
    freed in turn. The format is safetensors': the header's length in eight bytes, the header as JSON, the tensors.

    Raises OSError when the disk takes no more, or when the file behind a lazy array can no longer be read.
    """
    # Wider numbers come first, as in safetensors' own files: an odd number of bytes would misalign what follows.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.size, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ends = list(itertools.accumulate((tensors[name].nbytes for name in order), initial=0))
    for name, start, end in zip(order, ends, ends[1:], strict=False):
        array = tensors[name]
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    limit = mx.set_cache_limit(CACHE_BYTES)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in _computed(order, tensors):
                file.write(memoryview(cast("Any", array)))
    finally:
        _settle()
        mx.set_cache_limit(limit)
        mx.clear_cache()


def _computed(order: list[str], tensors: dict[str, mx.array]) -> Iterator[mx.array]:
    """Each array in turn, while the next ones are being computed."""
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
        raise OSError(f"the source can no longer be read at {name}: was it truncated or changed? ({error})") from None


def _settle() -> None:
    """Waits for pending arrays: otherwise their failed reads would raise in some later call of MLX."""
    for _ in range(AHEAD + 1):
        with suppress(RuntimeError):
            mx.synchronize()
            return


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json with sorted keys."""
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def save_pytorch(
    config: AnyConfig, weights: Iterable[tuple[str, mx.array]], folder: Path, *, layout: str, dtype: mx.Dtype
) -> dict[str, Any]:
    """Writes a model's weights and sizes for PyTorch, dense: `sizes, (target name, array), … -> config.json`."""
    dense = ((name, array.astype(dtype)) for name, array in weights)
    match = layout_for(layout, pair=isinstance(config, Aimv2Config))
    save_weights(folder, match.to_source(dense), reader=PYTORCH)
    written = config_for(config, layout) | {"torch_dtype": dtype_name(dtype)}
    save_config(folder, written)
    return written


def save_beside(folder: Path, source: Source) -> None:
    """Adds the rest of the checkpoint (tokenizer, licence) and the preprocessing of its images to the weights.

    Raises FileNotFoundError if the source is gone.
    """
    copy_beside(folder, source, AUXILIARY_FILES)
    processor = source.processor()
    if not (is_said := is_clips(folder, processor.preprocessing)):  # another size, or another package's format
        (folder / "processor_config.json").unlink(missing_ok=True)
    if not (is_said and (folder / "preprocessor_config.json").is_file()):
        processor.save_to(folder)


def copy_beside(folder: Path, source: Source, patterns: Iterable[str]) -> None:
    """Copies a checkpoint's files that match one of the patterns and are not in `folder` yet."""
    origin = source.origin.folder
    for pattern in patterns:
        for file in sorted(origin.glob(pattern)):
            if not file.is_file() or (folder / file.name).exists():
                continue
            if not _is_inside(file, origin):
                warnings.warn(f"{file} is a link to outside the checkpoint: not copied", stacklevel=2)
                continue
            check_size(file)
            shutil.copyfile(file, folder / file.name)
    if not (origin / CONFIG_FILE).is_file():  # open weight files can still be read, the rest cannot
        raise FileNotFoundError(f"{origin} disappeared while it was read; nothing was written")


def save(
    model: AnyModel,
    processor: Aimv2Processor,
    folder: str | os.PathLike[str],
    *,
    is_tuned: bool | None = None,
) -> Path:
    """Writes the model in memory as an MLX folder, from which `load` gives the same numbers: `-> its path`.

    Changed weights are saved as they are, packed ones stay packed, a resized encoder keeps its size. The tokenizer and
    the preprocessing are the processor's. Licence and origin come from the loaded checkpoint if it still exists; with
    `is_tuned` the model card says whether the weights are still that checkpoint's.

    Raises FileExistsError if `folder` exists, TypeError for arguments of the wrong type, ValueError for a model that
    `load` could not restore: with adapters, with weights of several dtypes, or with a processor that is not its own.
    Nothing is left at `folder` unless it is complete.
    """
    for name, value, kinds in (
        ("model", model, (Aimv2VisionModel, Aimv2Model)),
        ("processor", processor, (Aimv2Processor,)),
        ("folder", folder, (str, os.PathLike)),
    ):
        if not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"save(model, processor, folder): {name} must be {wanted}, got {type(value).__name__}")
    target = expand_user(folder)
    check_target(target)
    section, match = quantize.section_of(model), layout_for(MLX_LAYOUT, pair=isinstance(model, Aimv2Model))
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    _check_whole(weights, model.config, section, match)
    config = model.config.to_dict() | {"torch_dtype": dtype_name(model.dtype)}
    config |= {"quantization": section, "quantization_config": section} if section else {}
    source = Source(model.origin or Checkpoint(target, target, [], {}, {}), model.config, match, {}, section)
    with atomic_folder(target) as place:
        processor.save_to(place)
        if isinstance(model, Aimv2Model) and processor.tokenizer is not None:
            processor.tokenizer.save_to(place)
        try:
            Aimv2Processor.from_folder(place, config=model.config)
        except ValueError as error:
            what = str(error).replace(str(place), str(target)).partition(": mend ")[0]  # the file is not at fault
            raise ValueError(f"{what}; save a model with the processor that load returned with it") from None
        save_weights(place, sorted(weights.items()), total_parameters=source.parameters)
        save_config(place, config)
        try:
            if model.origin is not None:
                copy_beside(place, source, BESIDE)
        except FileNotFoundError:
            warnings.warn(f"{source.origin} is gone: its licence could not be copied into {target}", stacklevel=2)
        model_card.write(place, source=source, config=config, report=None, is_tuned=is_tuned)
    return target


def _check_whole(
    weights: Mapping[str, mx.array], config: AnyConfig, section: Mapping[str, Any] | None, match: Match
) -> None:
    """Raises ValueError for weights that `load` would refuse, or convert to another dtype."""
    plain = build(config)
    quantize.apply_structure(plain, section or {}, weights)
    if lines := differences(parameter_shapes(plain), {name: array.shape for name, array in weights.items()}, match):
        has_adapters = any(name.endswith(".lora_a") for name in weights)
        advice = "; merge the adapters first with mlx_aimv2.learn.fuse(model)" if has_adapters else ""
        raise ValueError(f"the parameters do not match this model: {'; '.join(lines)}{advice}")
    dtypes = sorted({dtype_name(one.dtype) for one in weights.values() if mx.issubdtype(one.dtype, mx.floating)})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        wanted = f"weights must be of one dtype, {', '.join(DTYPES)}"
        raise ValueError(f"{wanted}, got {', '.join(dtypes)}: call model.set_dtype(mx.float32)")


def is_own(folder: Path) -> bool:
    """Whether a conversion wrote this folder: its card says so, and it contains nothing but checkpoint files."""
    try:
        card, entries = read_bytes(folder / CARD_FILE), list(folder.iterdir())
    except (OSError, ValueError):
        return False
    are_files = all(not entry.is_dir() or entry.is_symlink() for entry in entries)
    return are_files and b"by mlx-aimv2 " in card and all(any(map(entry.match, WRITTEN)) for entry in entries)


def _is_inside(file: Path, source: Path) -> bool:
    """Whether a file, or the target of a link, is inside the checkpoint.

    That is its folder, the one its config.json is really in, or the repository in the Hub's cache: a link in an
    untrusted folder could point to a private file, which would be published with the result.
    """
    roots = {Path(os.path.realpath(source)), Path(os.path.realpath(source / CONFIG_FILE)).parent}
    repository = Path(os.path.realpath(source)).parents[1:2]
    roots |= {place for place in repository if place.name.startswith("models--")}
    return not roots.isdisjoint(Path(os.path.realpath(file)).parents)


def config_for(config: AnyConfig, layout: str) -> dict[str, Any]:
    """The content of config.json in one of `PYTORCH_LAYOUTS`."""
    if layout == "transformers":
        architecture = "Aimv2Model" if isinstance(config, Aimv2Config) else "Aimv2VisionModel"
        return {"architectures": [architecture], **config.to_dict()}
    common = {"architectures": ["AIMv2Model"], "model_type": "aimv2"}
    if isinstance(config, Aimv2VisionConfig):
        return common | _apple_sizes(config)
    return common | {
        "projection_dim": config.projection_dim,
        "max_logit_scale": config.max_logit_scale,
        "init_temperature": 0.07,
        "vision_config": _apple_sizes(config.vision_config) | {"num_queries": 1, "is_causal": False},
        "text_config": _apple_sizes(config.text_config) | {"is_causal": True},
    }


def _apple_sizes(config: Aimv2VisionConfig | Aimv2TextConfig) -> dict[str, Any]:
    """An encoder's sizes in Apple's names, where a missing `image_size` means native; the head is not mentioned."""
    names = {field: name for name, field in APPLE_NAMES.items()}
    sizes = {names.get(key, key): value for key, value in asdict(config).items() if value is not None}
    fixed = {"attention_dropout": 0.0, "projection_dropout": 0.0, "qkv_bias": False, "use_bias": False}
    return fixed | {key: value for key, value in sizes.items() if key not in ("is_native", "use_head")}
