"""Features equal those of transformers on torch, on random small models in Apple's and in transformers' layout.

The measure is float32's own error: torch's distance from float64, where its norms too are computed in float64.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.aimv2.modeling_aimv2 import Aimv2RMSNorm

from mlx_aimv2 import Aimv2Processor, load
from mlx_aimv2.images.preprocessing import published

MOST = 3
"""How many times torch's own float32 error our difference from float64 may be."""

SIZES = {
    "one block": (32, 47, 1, 1, 28),
    "wide heads": (96, 53, 2, 1, 42),
    "narrow heads": (60, 77, 3, 5, 70),
    "deep": (44, 31, 13, 2, 42),
    "native": (52, 61, 3, 13, None),
}
"""hidden, intermediate, blocks, heads, pixels; None is a native model, which sees 58 x 44 pixels."""

# transformers' name -> Apple's, written independently of the package's table, which is under test.
TO_APPLE = {
    "embeddings.patch_embed.": "preprocessor.patchifier.proj.",
    "embeddings.rms_norm.": "preprocessor.patchifier.norm.",
    "embeddings.position_embedding.weight": "preprocessor.pos_embed",
    "encoder.layers.": "trunk.blocks.",
    ".rms_norm1.": ".norm_1.",
    ".rms_norm2.": ".norm_2.",
    "attention.out_proj": "attn.proj",
    "ffn.gate_proj": "mlp.fc1",
    "ffn.up_proj": "mlp.fc3",
    "ffn.down_proj": "mlp.fc2",
}


def random_model(size: str, seed: int) -> transformers.Aimv2VisionModel:
    """transformers' class with random weights: norms away from one, attention neither flat nor of one token."""
    torch.manual_seed(seed)
    hidden, intermediate, blocks, heads, side = SIZES[size]
    config = transformers.Aimv2VisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        image_size=side or 224,
        is_native=side is None,
        use_head=False,
    )
    model = transformers.Aimv2VisionModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name or "position" in name:
                parameter.normal_()
            else:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    return model


def write(model: transformers.Aimv2VisionModel, folder: Path, layout: str) -> Path:
    """transformers' own file, or what Apple's release of it would be."""
    model.save_pretrained(folder)
    Aimv2Processor(published(None if model.config.is_native else model.config.image_size)).save_to(folder)
    if layout == "transformers":
        return folder
    named = {}
    for name, tensor in model.state_dict().items():
        for reference, apples in TO_APPLE.items():
            name = name.replace(reference, apples)
        name = name.replace("rms_norm.weight", "trunk.post_trunk_norm.weight") if name == "rms_norm.weight" else name
        named[name] = tensor[None] if name.endswith("pos_embed") else tensor
    for name in [name for name in named if name.endswith("attention.q_proj.weight")]:
        parts = [named.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        named[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    save_file({name: tensor.clone().contiguous() for name, tensor in named.items()}, folder / "model.safetensors")
    config = model.config.to_dict()
    config = {key: config[key] for key in config if key.startswith("num_") or key.endswith("_size")}
    if model.config.is_native:
        config.pop("image_size")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "aimv2", "rms_norm_eps": 1e-5}))
    return folder


@torch.no_grad()
def in_float64(model: transformers.Aimv2VisionModel, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> list:
    """All hidden states and the features in float64."""

    def norm(self: Aimv2RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with monkeypatch.context() as patch:
        patch.setattr(Aimv2RMSNorm, "forward", norm)
        output = model.double()(torch.from_numpy(pixels).double(), output_hidden_states=True)
    return [state.numpy() for state in (*output.hidden_states, output.last_hidden_state)]


@pytest.mark.parametrize("layout", ["apple", "transformers"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [3, 5])
def test_every_hidden_state_is_as_near_to_float64_as_torchs(tmp_path, monkeypatch, size, layout, seed):
    reference = random_model(size, seed)
    side = SIZES[size][4]
    shape = (2, 3, side, side) if side else (2, 3, 58, 44)
    pixels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    actual = load(write(reference, tmp_path / layout, layout))[0](
        mx.array(pixels.transpose(0, 2, 3, 1)), output_hidden_states=True
    )
    with torch.no_grad():
        single = reference(torch.from_numpy(pixels), output_hidden_states=True)
    exact = in_float64(reference, pixels, monkeypatch)
    found = [*actual.hidden_states, actual.last_hidden_state]
    torchs = [*single.hidden_states, single.last_hidden_state]
    assert len(found) == len(torchs) == len(exact)
    for our, torch_, true in zip(found, torchs, exact, strict=True):
        error = np.linalg.norm(torch_.numpy() - true)
        assert error < 1e-3 * np.linalg.norm(true)
        assert np.linalg.norm(np.array(our) - true) <= MOST * error
