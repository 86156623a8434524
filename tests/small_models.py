"""Small checkpoints that several tests start from: the reference folders, and a random LiT model in Apple's layout."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_aimv2.checkpoint.layouts import layout_for
from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig, AnyConfig
from mlx_aimv2.conversion.folder import config_for
from mlx_aimv2.loading import build, parameter_shapes

FIXED = Path(__file__).parent / "golden" / "reference" / "fixed"
NATIVE = FIXED.parent / "native"

LIT = Aimv2Config(
    Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5, use_head=True),
    Aimv2TextConfig(31, 14, 17, 3, 2, 11, 30),
    projection_dim=19,
)


def random_weights(config: AnyConfig) -> dict[str, mx.array]:
    """Weights of every parameter, under our names."""
    shapes = parameter_shapes(build(config))
    keys = mx.random.split(mx.random.key(3), len(shapes))
    return {
        name: 0.3 * mx.random.normal(shape, key=key) for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def write(folder: Path, tensors: Mapping[str, mx.array], config: object) -> Path:
    """A checkpoint folder of these tensors."""
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tensors), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Changes keys of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Writes a folder's weights anew, `{name: array} -> {name: array}`."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def write_lit(folder: Path) -> Path:
    """A random LiT model in Apple's layout."""
    return write_pair(folder, LIT)


def write_pair(folder: Path, config: Aimv2Config) -> Path:
    """A random pair of these sizes in Apple's layout, with its preprocessing."""
    tensors = layout_for("apple", pair=True).to_source(random_weights(config).items())
    write(folder, dict(tensors), config_for(config, "apple") | {"torch_dtype": "float32"})
    size = config.vision_config.image_size
    preprocessing = json.loads((FIXED / "preprocessor_config.json").read_text())
    preprocessing |= {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def pair_with_words(folder: Path, config: Aimv2Config = LIT) -> Path:
    """A random pair of these sizes, but with the vocabulary of the small tokenizer beside it."""
    write_pair(folder, replace(config, text_config=replace(config.text_config, vocab_size=778, eos_token_id=777)))
    for file in (FIXED.parents[1] / "tokenizer").iterdir():
        if file.name != "ids.json":
            shutil.copy(file, folder)
    return folder
