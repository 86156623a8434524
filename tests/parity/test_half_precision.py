"""In half precision the error is about that of transformers on torch with the same weights.

Exact is transformers in float64, but for its norms, which it always takes in float32. Both sides round the same float32
checkpoint to the same dtype. The error is the Euclidean norm of the difference over that of the exact features.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlx_aimv2 import load
from mlx_aimv2.convert import convert

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
KINDS = ("fixed", "native", "outlier", "lit")

MOST = 1.2
"""How many times the error of torch actual may be."""


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory) -> tuple[str, Path, dict[str, np.ndarray]]:
    """The kind, the folder as transformers reads it, and the inputs."""
    folder = tmp_path_factory.mktemp("half") / request.param
    convert(REFERENCE / request.param, folder, export_layout="transformers", verify=False)
    with np.load(REFERENCE / request.param / "expected.npz") as expected:
        inputs = {name: expected[name] for name in ("pixel_values", "input_ids") if name in expected}
    return request.param, folder, inputs


@torch.no_grad()
def reference(kind: str, folder: Path, inputs: dict, dtype: torch.dtype, attention: str) -> dict[str, np.ndarray]:
    kind_of_model = transformers.Aimv2Model if kind == "lit" else transformers.Aimv2VisionModel
    model = kind_of_model.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval().to(dtype)
    pixels = torch.from_numpy(inputs["pixel_values"]).to(dtype)
    if kind != "lit":
        return {"tokens": model(pixels).last_hidden_state.double().numpy()}
    ids = torch.from_numpy(inputs["input_ids"]).long()
    image = model.vision_model(pixels)
    text = model.text_model(ids, attention_mask=torch.ones_like(ids))
    found = {
        "tokens": image.last_hidden_state,
        "image": model.visual_projection(image.pooler_output),
        "text": model.text_projection(text.pooler_output),
    }
    return {name: tensor.double().numpy() for name, tensor in found.items()}


def actual(kind: str, folder: Path, inputs: dict, dtype: str) -> dict[str, np.ndarray]:
    model, _ = load(folder, dtype=dtype)
    pixels = mx.array(inputs["pixel_values"].transpose(0, 2, 3, 1))
    found = {"tokens": model.vision(pixels).last_hidden_state}
    if kind == "lit":
        found |= {"image": model.encode_image(pixels), "text": model.encode_text(mx.array(inputs["input_ids"]))}
    return {name: np.array(array.astype(mx.float32)).astype(np.float64) for name, array in found.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_we_are_as_near_to_float64_as_torch_in_the_same_dtype(case, dtype):
    kind, folder, inputs = case
    # Eager attention is the one whose text encoder is causal; elsewhere both count and the better one is met.
    attentions = ["eager"] if kind == "lit" else ["eager", "sdpa"]
    exact = reference(kind, folder, inputs, torch.float64, "eager")
    found = actual(kind, folder, inputs, dtype)
    for name in exact:
        size = np.linalg.norm(exact[name])
        error = np.linalg.norm(found[name] - exact[name]) / size
        torchs = [
            np.linalg.norm(reference(kind, folder, inputs, getattr(torch, dtype), attention)[name] - exact[name]) / size
            for attention in attentions
        ]
        ratio = error / min(torchs)
        print(f"{kind} {dtype} {name}: {error:.3g}, torch {', '.join(f'{e:.3g}' for e in torchs)}, {ratio:.2f} x")
        assert error <= MOST * min(torchs), f"{name}: {error:.3g} against {min(torchs):.3g}"
