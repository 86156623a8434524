"""Makes one checkpoint of an encoder and what `fit` has changed in it: an MLX folder like any other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_aimv2.config import dtype_name
from mlx_aimv2.conversion import folder, model_card
from mlx_aimv2.files import atomic_folder, check_target, expand_user
from mlx_aimv2.learn import head_folder, lora
from mlx_aimv2.loading import read_source

DEFAULT_PATH = "fused_model"


def fuse(
    adapter_path: str | os.PathLike[str],
    save_path: str | os.PathLike[str] = DEFAULT_PATH,
    *,
    model: str | None = None,
    revision: str | None = None,
) -> Path:
    """Adapters, or a head folder of a fine-tuned encoder, to an MLX folder: `HEAD -> folder`, whose path is returned.

    A head folder knows its encoder; `model` is for adapters alone, or for another place. The result is dense, without
    the head. Raises FileExistsError where `save_path` exists, ValueError where nothing was fine-tuned or the encoder
    is another one.
    """
    source_folder, target = (expand_user(path) for path in (adapter_path, save_path))
    check_target(target)
    is_head = (source_folder / head_folder.INFO_FILE).is_file()
    info: dict[str, Any] = head_folder.read_info(source_folder) if is_head else {}
    if info and info["fine_tune_type"] not in (*lora.KINDS, "full"):
        raise ValueError(f"{source_folder} left the encoder as it is ({info['fine_tune_type']}): nothing to fuse")
    name = model or info.get("encoder", {}).get("checkpoint")
    if name is None:
        raise ValueError(f"{source_folder} does not say which encoder it is for: give --model")
    revision = revision or (info["encoder"].get("commit") if info and model is None else None)
    loaded = read_source(name, revision=revision).load()
    if info:
        head_folder.check_encoder(source_folder, info["encoder"], loaded)
    if info.get("fine_tune_type") == "full":
        own = loaded.model.vision.config.image_size
        if own not in (None, info["image_size"]):
            raise ValueError(
                f"{source_folder} was trained in full on images of {info['image_size']} pixels, its checkpoint takes "
                f"{own}: train it without --image-size, or by lora, whose adapters fit any size"
            )
        head_folder.load_encoder(source_folder, loaded.model.vision)
    else:
        lora.load_adapters(loaded.model.vision, source_folder)
        lora.remove_adapters(loaded.model.vision)
    source = loaded.source
    with atomic_folder(target) as place:
        folder.save_weights(place, _weights(loaded.model))
        config = source.config.to_dict() | {"torch_dtype": dtype_name(loaded.model.dtype)}
        folder.save_config(place, config)
        folder.save_beside(place, source)
        model_card.write(place, source=source, config=config, report=None, hub_name=None)
    return target


def _weights(model: Any) -> Iterator[tuple[str, mx.array]]:
    flat: Any = tree_flatten(model.parameters())
    yield from sorted(flat)
