"""The folder that training writes, HEAD: head, classes, scores, the encoder it needs; and how it is used.

`head.json`, `head.safetensors` and `trained_on.sha256`; for lora and dora mlx-lm's adapter files; for full
`encoder.safetensors` with the weights that changed; `README.md` with its images.
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, overload

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.conversion import folder as mlx_folder
from mlx_aimv2.embed.cache import differences, fingerprint
from mlx_aimv2.files import check_target, expand_user, read_bytes, read_json, write_json
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import lora
from mlx_aimv2.learn.learner import Learner
from mlx_aimv2.learn.samples import Sample, one_image
from mlx_aimv2.learn.task_options import MAX_SIDE, TASKS, Task, find_task
from mlx_aimv2.loading import AnyModel, Loaded, at_size, read_source
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.train.optimizer import first_not_finite, flat
from mlx_aimv2.untrusted_json import Fields, misfit

Model = TypeVar("Model", bound=AnyModel)

FORMAT = 1
"""Version of the format written here; a newer one is refused."""

INFO_FILE = "head.json"
HEAD_FILE = "head.safetensors"
ENCODER_FILES = {"full": "encoder.safetensors"} | dict.fromkeys(lora.KINDS, lora.WEIGHTS_FILE)
"""Fine-tune type -> the file with the encoder weights that it changed or added."""

TRAINED_ON_FILE = "trained_on.sha256"
"""Holds the `digests` of the training images."""

DIGEST_BYTES = 8

FIELDS: Fields = {
    "task": str,
    "fine_tune_type": str,
    "classes": list,
    "options": dict,
    "encoder": dict,
    "image_size": int,
}
"""Fields of head.json that are used, and their types."""

ENCODER_FIELDS: Fields = {"checkpoint": str, "commit": (str, NoneType), "dtype": str, "weights": dict}
"""What head.json says of the encoder."""


@dataclass(frozen=True)
class Head:
    """A head folder loaded, with its encoder: ready to predict."""

    task: Task
    classes: tuple[str, ...]
    learner: Learner
    processor: Aimv2Processor
    trained_on: bytes
    """The content of `TRAINED_ON_FILE`; empty where the folder has none."""
    loaded: Loaded
    """The encoder's checkpoint."""


def save(
    folder: Path,
    info: Mapping[str, Any],
    learner: Learner,
    *,
    adapters: Mapping[str, Any] | None,
    trained_on: Sequence[Sample],
) -> None:
    """Writes everything but the card into an existing folder."""
    kind = info["fine_tune_type"]
    changed = {HEAD_FILE: learner.head.parameters()}
    if file := ENCODER_FILES.get(kind):
        changed[file] = learner.encoder.trainable_parameters()
    for file, parameters in changed.items():
        if (name := first_not_finite(flat(parameters))) is not None:
            raise ValueError(
                f"{name} has values that are not numbers: does the encoder, or its output for an image, have them too?"
            )
        try:
            mx.save_safetensors(str(folder / file), flat(parameters), metadata={"format": "mlx"})
        except RuntimeError as error:  # a full disk
            raise OSError(errno.ENOSPC, f"{file} cannot be written") from error
    if adapters is not None:
        write_json(folder / lora.CONFIG_FILE, adapters)
    (folder / TRAINED_ON_FILE).write_bytes(digests(trained_on))
    write_json(folder / INFO_FILE, {"format_version": FORMAT, **info})


def digests(samples: Sequence[Sample]) -> bytes:
    """The first `DIGEST_BYTES` of each image's SHA-256, one after another, which a head keeps from its training."""
    return b"".join(sorted({sample.sha256[:DIGEST_BYTES] for sample in samples}))


def seen(samples: Sequence[Sample], learned: bytes) -> list[str]:
    """A note if images to be scored are among those a head was trained on, by its `digests`."""
    known = {learned[start : start + DIGEST_BYTES] for start in range(0, len(learned), DIGEST_BYTES)}
    count = sum(sample.sha256[:DIGEST_BYTES] in known for sample in samples)
    line = f"{count:,} of the {one_image(len(samples))} scored are images that the head was trained on"
    return [f"{line}, so the result is too optimistic"] if count else []


def read_info(folder: Path) -> dict[str, Any]:
    """head.json, checked. FileNotFoundError or ValueError with one line if this version cannot use it."""
    file = folder / INFO_FILE
    try:
        info = read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} is not a folder written by fit (no {INFO_FILE}): make one with "
            "mlx-aimv2 fit DATA -m MODEL -o HEAD"
        ) from None
    version = info.get("format_version")
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{folder} was written by a newer version of mlx-aimv2 (format {version}, this one reads {FORMAT}): "
            "pip install -U mlx-aimv2"
        )
    if (name := misfit(info, FIELDS)) is None:
        is_right = {
            "format_version": version == FORMAT,
            "task": info["task"] in TASKS,
            "fine_tune_type": info["task"] in TASKS and info["fine_tune_type"] in find_task(info["task"]).types,
            "encoder": misfit(info["encoder"], ENCODER_FIELDS) is None,
            "image_size": 1 <= info["image_size"] <= MAX_SIDE,
            "classes": info["classes"] and all(isinstance(one, str) for one in info["classes"]),
        }
        name = next((one for one, is_so in is_right.items() if not is_so), None)
    if name is not None:
        raise ValueError(f"{file} is damaged: {name} is {info.get(name)!r:.60}")
    return info


def load_head(folder: str | os.PathLike[str], *, model: str | None = None, dtype: str | mx.Dtype | None = None) -> Head:
    """A head folder with the encoder it needs, from the place it was trained with or from `model`: `folder -> Head`.

    Raises ValueError if the encoder's weights or preprocessing are not those the head was trained on.
    """
    folder = expand_user(folder)
    info = read_info(folder)
    task = find_task(info["task"])
    wanted = info["encoder"]
    loaded = _encoder_of(folder, wanted, model, None, dtype=dtype or wanted.get("dtype"))
    check_encoder(folder, wanted, loaded)
    vision, processor = at_size(loaded.model.vision, loaded.processor, info["image_size"], whole=task.dense)
    if (patches := math.prod(processor.grid)) > 1 << 14:  # four times as many as any checkpoint was trained on
        warnings.warn(f"{folder} takes images of {patches:,} patches: each may take minutes", stacklevel=2)
    learner = Learner(vision, _load_learned(folder, info, vision))
    learner.eval()
    file = folder / TRAINED_ON_FILE
    trained_on = read_bytes(file) if file.is_file() else b""
    return Head(task, tuple(info["classes"]), learner, processor, trained_on, loaded)


@overload
def fuse(adapter_path: Model) -> Model: ...
@overload
def fuse(
    adapter_path: str | os.PathLike[str],
    save_path: str | os.PathLike[str] = ...,
    *,
    model: str | None = ...,
    revision: str | None = ...,
) -> Path: ...
def fuse(
    adapter_path: str | os.PathLike[str] | Model,
    save_path: str | os.PathLike[str] = "fused_model",
    *,
    model: str | None = None,
    revision: str | None = None,
) -> Path | Model:
    """Merges adapters, or a head folder's fine-tuned encoder, into an MLX folder: `HEAD -> folder`, returning its path.

    A model with adapters from `add_adapters` is merged in place into an equivalent one without them, and returned.

    A head folder names its encoder; `model` is for adapters alone, or for another place. The result is dense, without
    the head. Raises FileExistsError if `save_path` exists, ValueError if nothing was fine-tuned or the encoder is a
    different one.
    """
    if isinstance(adapter_path, nn.Module):
        lora.remove_adapters(adapter_path)
        return adapter_path
    head, target = expand_user(adapter_path), expand_user(save_path)
    check_target(target)
    info = read_info(head) if (head / INFO_FILE).is_file() else {}
    kind, encoder = info.get("fine_tune_type", "lora"), info.get("encoder", {})
    if kind not in ENCODER_FILES:
        raise ValueError(f"{head} did not change the encoder ({kind}): nothing to fuse")
    if not (model or encoder):
        raise ValueError(f"{head} does not say which encoder it is for: give --model")
    loaded = _encoder_of(head, encoder, model, revision)
    if info:
        check_encoder(head, encoder, loaded)
        if kind == "full" and (own := loaded.model.vision.config.image_size) not in (None, info["image_size"]):
            raise ValueError(
                f"{head} was trained in full on images of {info['image_size']} pixels, its checkpoint takes {own}: "
                "train it without --image-size, or with lora, whose adapters fit any size"
            )
        _load_learned(head, info, loaded.model.vision)
    else:
        _load_changes(head, kind, loaded.model.vision)
    return mlx_folder.save(loaded.model, loaded.processor, target, is_tuned=True)


def _encoder_of(
    folder: Path,
    wanted: Mapping[str, Any],
    model: str | None,
    revision: str | None,
    *,
    dtype: str | mx.Dtype | None = None,
) -> Loaded:
    """The encoder that a folder was trained with, from its original place or from `model`."""
    revision = revision or (None if model else wanted.get("commit"))
    try:
        return read_source(model or str(wanted.get("checkpoint")), revision=revision).load(dtype=dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the encoder that {folder} needs is missing: {error}; put it back, or say where it is "
            "(predict, evaluate and fuse take -m MODEL)"
        ) from None


def _load_learned(folder: Path, info: Mapping[str, Any], vision: Aimv2VisionModel) -> nn.Module:
    """Loads what training changed into an encoder; returns the matching head, which is read in any case."""
    kind = info["fine_tune_type"]
    _load_changes(folder, kind, vision)
    head: nn.Module = find_task(info["task"]).head.make_head(kind, vision.config, len(info["classes"]), info["options"])
    lora.load_arrays(folder / HEAD_FILE, head, head.parameters())
    return head


def _load_changes(folder: Path, kind: str, vision: Aimv2VisionModel) -> None:
    """Loads what training changed into an encoder: weights, or adapters, which are merged into the weights."""
    if kind == "full":
        lora.load_arrays(folder / ENCODER_FILES[kind], vision, vision.parameters(), partly=True)
    elif kind in lora.KINDS:
        lora.load_adapters(vision, folder)
        lora.remove_adapters(vision)


def describe_encoder(loaded: Loaded, processor: Aimv2Processor) -> dict[str, Any]:
    """What head.json records about an encoder, to detect a different one."""
    preprocessing = json.loads(json.dumps(asdict(processor.preprocessing)))
    return {**loaded.origin, "preprocessing": preprocessing, "weights": fingerprint(loaded.model)}


def check_encoder(folder: Path, wanted: Mapping[str, Any], loaded: Loaded) -> None:
    """Raises ValueError if `loaded` is not the encoder that a head was trained on."""
    here = {**loaded.origin, "weights": fingerprint(loaded.model)}
    there = {key: wanted.get(key) for key in here}
    refused, _ = differences(there, here)
    if refused:
        raise ValueError(
            f"{folder} was trained on another encoder ({'; '.join(refused)}): put that one back, or say where it is "
            "(predict, evaluate and fuse take -m MODEL)"
        )
