"""Makes golden values: small random checkpoints in Apple's layout with the outputs of transformers on torch.

    python -m tools.make_golden DIR

Writes DIR/{fixed,native,lit}, each with config.json, model.safetensors, preprocessor_config.json and expected.npz.
Needs the extra `parity`. Weights are drawn so that mistakes show: norm weights away from one, sharp attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mlx_aimv2.checkpoint.layouts import layout_for
from mlx_aimv2.cli.dispatch import one_line_errors
from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig, AnyConfig
from mlx_aimv2.conversion.folder import config_for
from mlx_aimv2.images.preprocessing import published, to_clip
from mlx_aimv2.loading import build, parameter_shapes

SIZES: dict[str, AnyConfig] = {
    "fixed": Aimv2VisionConfig(44, 29, 3, 2, image_size=35, patch_size=7),
    "native": Aimv2VisionConfig(52, 31, 2, 2, image_size=None, patch_size=14, is_native=True),
    "lit": Aimv2Config(
        Aimv2VisionConfig(44, 29, 3, 2, image_size=35, patch_size=7, use_head=True),
        Aimv2TextConfig(61, 38, 23, 2, 2, 13, 60),
        projection_dim=17,
    ),
}
PIXELS = {"fixed": (2, 3, 35, 35), "native": (2, 3, 42, 70), "lit": (2, 3, 35, 35)}
IDS = np.array([[59, 7, 11, 60, 60, 60], [59, 3, 60, 60, 60, 60], [59, 5, 17, 29, 41, 60]])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_golden", description="Make golden values.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    return one_line_errors(lambda: run(arguments.folder))


def run(folder: Path) -> int:
    """Writes the checkpoints and their values and prints where."""
    for seed, kind in enumerate(SIZES):
        print(make(folder / kind, kind, seed=seed))
    return 0


def make(place: Path, kind: str, *, seed: int) -> Path:
    """Writes one checkpoint in Apple's layout with the outputs of transformers, in float32 and in float64."""
    config = SIZES[kind]
    vision = config.vision_config if isinstance(config, Aimv2Config) else config
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    weights = {name: mx.array(_draw(rng, name, shape)) for name, shape in parameter_shapes(build(config)).items()}
    apple = dict(layout_for("apple", pair=isinstance(config, Aimv2Config)).to_source(weights.items()))
    mx.save_safetensors(str(place / "model.safetensors"), apple, metadata={"format": "pt"})
    _write_json(place / "config.json", config_for(config, "apple") | {"torch_dtype": "float32"})
    _write_json(place / "preprocessor_config.json", to_clip(published(vision.image_size)))
    pixels = rng.standard_normal(PIXELS[kind]).astype(np.float32)
    values: dict[str, Any] = {"pixel_values": pixels}
    for suffix, dtype in (("", "float32"), ("_float64", "float64")):
        outputs = _outputs(config, load_file(place / "model.safetensors"), pixels, dtype)
        values |= {name + suffix: array for name, array in outputs.items()}
    if kind == "lit":
        values["input_ids"] = IDS
    np.savez_compressed(place / "expected.npz", **values)
    return place


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if name == "logit_scale":
        return np.array(4.7, np.float32)  # above the limit of ln 100, as the trained one
    values = rng.standard_normal(shape)
    if "norm" in name:
        values = 1 + 0.5 * values
    elif "qkv" in name:
        values *= 3 * shape[-1] ** -0.5  # sharp attention
    elif len(shape) > 1:
        values *= np.prod(shape[1:]) ** -0.5
    return values.astype(np.float32)


def _outputs(
    config: AnyConfig, apple: dict[str, NDArray[Any]], pixels: NDArray[Any], dtype: str
) -> dict[str, NDArray[Any]]:
    """The outputs of transformers for these weights."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"{error.name} is needed here: pip install 'mlx-aimv2[parity]'") from None
    is_lit = isinstance(config, Aimv2Config)
    fields = config_for(config, "transformers")
    kind = ("Aimv2Config", "Aimv2Model") if is_lit else ("Aimv2VisionConfig", "Aimv2VisionModel")
    settings = {key: value for key, value in fields.items() if key not in ("architectures", "model_type")}
    transformers_config = getattr(transformers, kind[0])(**settings, attn_implementation="eager")
    model = getattr(transformers, kind[1])(transformers_config)
    state = {name: torch.from_numpy(array) for name, array in to_transformers(apple).items()}
    model.load_state_dict(state, strict=True)
    model = model.to(getattr(torch, dtype)).eval()
    images = torch.from_numpy(pixels).to(getattr(torch, dtype))
    with torch.no_grad():
        vision = getattr(model, "vision_model", model)(images, output_hidden_states=True)
        found = {
            "last_hidden_state": vision.last_hidden_state,
            "hidden_states": torch.stack(vision.hidden_states),
        }
        if is_lit:
            # Eager attention and a mask: only so is transformers' text encoder causal, as Apple's is.
            both = model(pixel_values=images, input_ids=torch.from_numpy(IDS), attention_mask=torch.ones(IDS.shape))
            found |= {"logits_per_image": both.logits_per_image, "image_pooled": vision.pooler_output}
    return {name: tensor.numpy() for name, tensor in found.items()}


def to_transformers(apple: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Apple's tensors under transformers' names, independently of the package's own tables, which are under test."""
    renamed: dict[str, NDArray[Any]] = {}
    for name, array in apple.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        if "attn.qkv" in name:
            stem = name.replace("attn.qkv.weight", "attention.")
            renamed |= {f"{stem}{x}_proj.weight": part for x, part in zip("qkv", np.split(array, 3), strict=True)}
        elif name.endswith("position_embedding.weight") and array.ndim == 3:
            renamed[name] = array[0]
        else:
            renamed[name] = array
    return renamed


_RENAMED = (
    ("image_encoder.", "vision_model."),
    ("text_encoder.", "text_model."),
    ("preprocessor.patchifier.proj.", "embeddings.patch_embed."),
    ("preprocessor.patchifier.norm.", "embeddings.rms_norm."),
    ("preprocessor.text_embedding.", "embeddings.token_embedding."),
    ("preprocessor.positional_embedding", "embeddings.position_embedding.weight"),
    ("preprocessor.pos_embed", "embeddings.position_embedding.weight"),
    ("trunk.blocks.", "encoder.layers."),
    ("trunk.post_trunk_norm.", "rms_norm."),
    ("norm_1.", "rms_norm1."),
    ("norm_2.", "rms_norm2."),
    ("attn.proj.", "attention.out_proj."),
    ("mlp.fc1.", "ffn.gate_proj."),
    ("mlp.fc2.", "ffn.down_proj."),
    ("mlp.fc3.", "ffn.up_proj."),
    ("head.k.", "head.k_proj."),
    ("head.v.", "head.v_proj."),
    ("head.linear.", "head.output_proj."),
    ("image_projector.", "visual_projection."),
    ("text_projector.", "text_projection."),
    ("log_logit_scale", "logit_scale"),
)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
