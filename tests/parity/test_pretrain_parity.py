"""The pre-training objective and its gradients beside a plain PyTorch model written from the paper, in float64."""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch.nn import functional as F  # noqa: E402

from mlx_aimv2.cli import main  # noqa: E402
from mlx_aimv2.config import Aimv2VisionConfig  # noqa: E402
from mlx_aimv2.pretrain.objective import (  # noqa: E402
    Batch,
    DecoderConfig,
    Pretraining,
    initialise,
)
from mlx_aimv2.pretrain.pretraining import write_checkpoint  # noqa: E402

VISION = Aimv2VisionConfig(22, 13, 3, 2, image_size=15, patch_size=5)
DECODER = DecoderConfig(26, 17, 2, 2, vocab_size=31, max_position_embeddings=11)
EOS = 1
IDS = [[0, 5, 7, 29, EOS], [0, 3, EOS, EOS, EOS], [0, 11, 12, EOS, EOS]]
LENGTHS = [1, 4, 8]


def rms_norm(x, weight):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def block(x, w, prefix, heads, allowed):
    """Pre-norm attention and SwiGLU; `allowed` (B, N, N) says what is seen."""
    batch, tokens, width = x.shape
    h = rms_norm(x, w[f"{prefix}.norm1.weight"]) @ w[f"{prefix}.attn.qkv.weight"].T
    q, k, v = (part.view(batch, tokens, heads, -1).transpose(1, 2) for part in h.split(width, dim=-1))
    scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
    x = x + h @ w[f"{prefix}.attn.proj.weight"].T
    h = rms_norm(x, w[f"{prefix}.norm2.weight"])
    h = F.silu(h @ w[f"{prefix}.mlp.gate.weight"].T) * (h @ w[f"{prefix}.mlp.up.weight"].T)
    return x + h @ w[f"{prefix}.mlp.down.weight"].T


def loss_in_torch(w, pixels, ids, lengths, alpha):
    """`L_text + alpha * L_image` from the weights by name, the means over the examples."""
    kernel = w["encoder.patch_embed.proj.weight"].permute(0, 3, 1, 2)
    bias = w["encoder.patch_embed.proj.bias"]
    x = F.conv2d(pixels.permute(0, 3, 1, 2), kernel, bias, stride=5).flatten(2).transpose(1, 2)
    x = rms_norm(x, w["encoder.patch_embed.norm.weight"]) + w["encoder.pos_embed"]
    batch, patches, _ = x.shape
    before = torch.tril(torch.ones(patches, patches, dtype=torch.bool))
    prefix = torch.arange(patches)[None, None] < lengths[:, None, None]
    for number in range(VISION.num_hidden_layers):
        x = block(x, w, f"encoder.blocks.{number}", VISION.num_attention_heads, before | prefix)
    features = rms_norm(x, w["encoder.norm.weight"]) @ w["decoder.from_features.weight"].T
    given, wanted = ids[:, :-1], ids[:, 1:]
    text = w["decoder.token_embed.weight"][given] + w["decoder.pos_embed"][: given.shape[1]]
    x = torch.cat([features, text], dim=1)
    tokens = x.shape[1]
    causal = torch.tril(torch.ones(tokens, tokens, dtype=torch.bool)).expand(batch, -1, -1)
    for number in range(DECODER.num_hidden_layers):
        x = block(x, w, f"decoder.blocks.{number}", DECODER.num_attention_heads, causal)
    x = rms_norm(x, w["decoder.norm.weight"])
    predicted = x[:, : patches - 1] @ w["decoder.patch_head.weight"].T + w["decoder.patch_head.bias"]
    logits = x[:, patches:] @ w["decoder.token_head.weight"].T + w["decoder.token_head.bias"]
    target = pixels.unfold(1, 5, 5).unfold(2, 5, 5).permute(0, 1, 2, 4, 5, 3).reshape(batch, patches, -1)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    losses = []
    for i in range(batch):
        start = int(lengths[i])
        image = (predicted[i, start - 1 :] - target[i, start:]).pow(2).mean()
        end = wanted[i].tolist().index(EOS) + 1
        losses.append(F.cross_entropy(logits[i, :end], wanted[i, :end]) + alpha * image)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("alpha", [0.4, 2.0])
def test_loss_and_gradients_are_those_of_torch(alpha):
    model = Pretraining(VISION, DECODER, eos=EOS)
    initialise(model, 1, seed=3)
    pixels = np.random.default_rng(5).normal(size=(3, 15, 15, 3)).astype(np.float32)
    batch = Batch(mx.array(pixels), mx.array(IDS), mx.array(LENGTHS))
    value, gradient = nn.value_and_grad(model, lambda batch: model.losses(batch, alpha)["loss"])(batch)

    weights = {name: torch.tensor(np.array(x, np.float64)) for name, x in tree_flatten(model.parameters())}
    for weight in weights.values():
        weight.requires_grad_()
    expected = loss_in_torch(
        weights, torch.tensor(pixels, dtype=torch.float64), torch.tensor(IDS), torch.tensor(LENGTHS), alpha
    )
    expected.backward()
    assert float(value.item()) == pytest.approx(expected.item(), abs=1e-5)
    found = dict(tree_flatten(gradient))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        wanted = weight.grad.numpy()
        error = np.abs(np.array(found[name], np.float64) - wanted).max()
        assert error < 1e-5 * max(1.0, np.abs(wanted).max()), name
        assert np.abs(wanted).max() > 0, name


def test_transformers_loads_what_was_trained(tmp_path):
    model = Pretraining(VISION, DECODER, eos=EOS).encoder
    initialise(model, 3, seed=3)
    write_checkpoint(model, tmp_path / "out")
    assert main(["convert", "--model", str(tmp_path / "out"), "--mlx-path", str(tmp_path / "torch_model"),
                 "--export-layout", "transformers"]) == 0  # fmt: skip
    torch_model = transformers.Aimv2VisionModel.from_pretrained(tmp_path / "torch_model")
    pixels = np.random.default_rng(5).normal(size=(2, 15, 15, 3)).astype(np.float32)
    with torch.no_grad():
        expected = torch_model(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    assert np.abs(np.array(model(mx.array(pixels)).last_hidden_state) - expected).max() < 1e-5
