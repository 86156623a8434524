"""Apple's network in float64, in NumPy and from the released layout: what float32's own error is measured against.

Written from Apple's code and independently of the package, which is under test.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

EPS = float(np.finfo(np.float32).eps)
"""The relative distance of neighbouring float32 numbers, 2 ** -23."""

NEAR = 128
"""Roundings that the same features may be apart which were computed in two ways, in other batches say."""

ALLOWED = 4
"""How many times Apple's own float32 error, measured against float64, ours may be.

In which order a product's sums are made depends on the processor's BLAS kernel, and their errors differ: of eleven
kernels of OpenBLAS 0.3.21 and the reference BLAS each had between 0.4 and 1.8 times Apple's.
"""

Weights = Mapping[str, np.ndarray]


def roundings(found: object, wanted: object) -> float:
    """The largest difference in units of float32's own, of `EPS` times the largest wanted value."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max() / EPS)


def error(found: object, exact: np.ndarray) -> float:
    """The Euclidean distance: the largest single difference is mostly luck, Apple's as ours."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact))


def hidden_states(folder: Path, pixels: np.ndarray) -> list[np.ndarray]:
    """Embedding, each block's output and the features: `(B, 3, H, W) -> depth + 2 arrays (B, N, D)` of float64."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    return encode(weights, embed(weights, pixels), config["num_attention_heads"], config["rms_norm_eps"])


def pair(folder: Path, pixels: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What a LiT model gives for `(B, 3, H, W)` and `(T, L)`, under the names of the golden file, in float64."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    vision, text = (
        {name.removeprefix(f"{tower}_encoder."): array for name, array in weights.items() if name.startswith(tower)}
        for tower in ("image", "text")
    )
    heads = {tower: config[f"{tower}_config"]["num_attention_heads"] for tower in ("vision", "text")}
    tokens = encode(vision, embed(vision, pixels), heads["vision"])[-1]
    keys, values = (tokens @ vision[f"head.{name}.weight"].T for name in "kv")
    query = np.broadcast_to(vision["head.cls_token"], (len(tokens), 1, tokens.shape[-1]))
    seen = attention(query, keys, values, heads["vision"])[:, 0]
    found = {"image_pooled": seen @ vision["head.linear.weight"].T + vision["head.linear.bias"]}
    places = text["preprocessor.positional_embedding"][: ids.shape[1]]
    words = encode(text, text["preprocessor.text_embedding.weight"][ids] + places, heads["text"], causal=True)[-1]
    first_end = (ids == config["text_config"]["eos_token_id"]).argmax(axis=1)
    found["text_pooled"] = words[np.arange(len(ids)), first_end]
    for tower in ("image", "text"):
        features = found[f"{tower}_pooled"] @ weights[f"{tower}_projector.weight"].T
        found[f"{tower}_features"] = features
        found[f"{tower}_embeds"] = features / np.linalg.norm(features, axis=1, keepdims=True)
    scale = np.exp(min(weights["log_logit_scale"], np.log(config["max_logit_scale"])))
    found["logits_per_image"] = scale * found["image_embeds"] @ found["text_embeds"].T
    return found | {"logits_per_text": found["logits_per_image"].T}


def embed(weights: Weights, pixels: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Patches with their positions, `(B, 3, H, W) -> (B, N, D)`."""
    kernel = weights["preprocessor.patchifier.proj.weight"]  # (D, 3, p, p)
    p = kernel.shape[-1]
    batch, channels, height, width = pixels.shape
    grid = pixels.astype(np.float64).reshape(batch, channels, height // p, p, width // p, p)
    patches = np.einsum("bchpwq,dcpq->bhwd", grid, kernel).reshape(batch, -1, len(kernel))
    x = norm(
        patches + weights["preprocessor.patchifier.proj.bias"], weights["preprocessor.patchifier.norm.weight"], eps
    )
    return x + weights.get("preprocessor.pos_embed", positions(height // p, width // p, len(kernel)))


def positions(rows: int, columns: int, dims: int) -> np.ndarray:
    """A native model's table, `(rows * columns, D)`: sines and cosines of the column, then of the row."""
    omega = 10000.0 ** -(np.arange(dims // 4) / (dims // 4))
    row, column = np.indices((rows, columns)).reshape(2, -1, 1)
    waves = [wave(place * omega) for place in (column, row) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1)


def encode(weights: Weights, x: np.ndarray, heads: int, eps: float = 1e-5, *, causal: bool = False) -> list[np.ndarray]:
    """Runs tokens through the trunk: `(B, N, D) -> depth + 2 arrays (B, N, D)`, the last one after the final norm."""
    states = [x]
    while f"trunk.blocks.{len(states) - 1}.norm_1.weight" in weights:
        block = f"trunk.blocks.{len(states) - 1}."
        own = {name.removeprefix(block): array for name, array in weights.items() if name.startswith(block)}
        q, k, v = np.split(norm(x, own["norm_1.weight"], eps) @ own["attn.qkv.weight"].T, 3, axis=-1)
        x = x + attention(q, k, v, heads, causal=causal) @ own["attn.proj.weight"].T
        y = norm(x, own["norm_2.weight"], eps)
        gate = y @ own["mlp.fc1.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ own["mlp.fc3.weight"].T)) @ own["mlp.fc2.weight"].T
        states.append(x)
    return [*states, norm(x, weights["trunk.post_trunk_norm.weight"], eps)]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, *, causal: bool = False) -> np.ndarray:
    """Attention of several heads, `(B, M, D), two (B, N, D) -> (B, M, D)`."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = shares / shares.sum(axis=-1, keepdims=True) @ v
    return mixed.swapaxes(1, 2).reshape(len(mixed), mixed.shape[2], -1)


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
