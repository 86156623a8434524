"""A whole aimv2-large-patch14-224, converted by the command line, gives the features of transformers on torch.

Random weights of the released size: 309 million parameters, 1.24 GB in Apple's layout, and one real photograph.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import save_file  # noqa: E402

from mlx_aimv2 import bundled, load  # noqa: E402
from mlx_aimv2.images.preprocessing import published, to_clip  # noqa: E402
from tests.checkpoint.test_layouts import INVENTORIES  # noqa: E402
from tests.exact import APART  # noqa: E402
from tools.make_golden import to_transformers  # noqa: E402

NAME = "aimv2-large-patch14-224"
CONFIG = {
    "model_type": "aimv2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 8, "num_channels": 3, "patch_size": 14, "image_size": 224, "rms_norm_eps": 1e-5,
    "qkv_bias": False, "use_bias": False, "torch_dtype": "float32",
}  # fmt: skip


def draw(name: str, shape: tuple[int, ...], dice: np.random.Generator) -> np.ndarray:
    if "norm" in name:
        return dice.uniform(0.5, 1.5, shape).astype(np.float32)
    values = dice.standard_normal(shape, np.float32)
    return values if len(shape) != 2 and "proj.weight" not in name else values * np.float32(np.prod(shape[1:]) ** -0.5)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """transformers' model, and the folder that the command line made of the same weights in Apple's layout."""
    place = tmp_path_factory.mktemp("large")
    source = place / "apple"
    source.mkdir()
    dice = np.random.default_rng(11)
    weights = {name: draw(name, shape, dice) for name, shape in INVENTORIES["apple", NAME].items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(CONFIG))
    (source / "preprocessor_config.json").write_text(json.dumps(to_clip(published(224))))
    assert (source / "model.safetensors").stat().st_size > 1.23e9
    command = [sys.executable, "-m", "mlx_aimv2.convert", "--hf-path", source, "--mlx-path", place / "mlx"]
    subprocess.run([*command, "--no-verify"], check=True, cwd=Path(__file__).parents[2])
    shutil.rmtree(source)
    reference = transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(use_head=False))
    state = {name: torch.from_numpy(array) for name, array in to_transformers(weights).items()}
    reference.load_state_dict(state, strict=True, assign=True)
    yield reference.eval(), place / "mlx"
    shutil.rmtree(place)


def test_a_photograph_gives_the_same_features_in_every_layer(encoders):
    reference, folder = encoders
    model, processor = load(folder)
    photograph = bundled.photographs()[1]
    pixels = processor([photograph])
    with torch.no_grad():
        wanted = reference(torch.tensor(np.array(pixels).transpose(0, 3, 1, 2)), output_hidden_states=True)
    found = model(pixels, output_hidden_states=True)
    assert found.last_hidden_state.shape == (1, 256, 1024)
    pairs = {"last hidden state": (found.last_hidden_state, wanted.last_hidden_state)}
    pairs |= {f"state {i}": pair for i, pair in enumerate(zip(found.hidden_states, wanted.hidden_states, strict=True))}
    errors = {name: relative(*pair) for name, pair in pairs.items()}
    print(
        f"relative error of the last hidden state {errors['last hidden state']:.1e}, of any {max(errors.values()):.1e}"
    )
    assert max(errors.values()) <= APART
    mean = wanted.last_hidden_state.mean(dim=1)
    assert relative(model.encode_image(pixels), mean) <= APART


def relative(found: mx.array, reference: "torch.Tensor") -> float:
    wanted = reference.numpy().astype(np.float64)
    return float(np.linalg.norm(np.array(found) - wanted) / np.linalg.norm(wanted))
