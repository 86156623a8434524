"""Trains the checkpoint that ships with the package.

scan -> small random turn, shift and zoom -> processor -> model -> mean token -> nearest class direction

    python -m convert.train_digits                  trains and prints the accuracy of the features
    python -m convert.train_digits --write          also replaces the checkpoint in the package
    python -m convert.train_digits --write-scans    only replaces the scans, from scikit-learn's copy
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.numpy import save_file

from examples.digits import digits_accuracy
from mlx_aimv2 import bundled, preprocessing
from mlx_aimv2.checkpoint.layouts import layout_for
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.loading import load
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.processor import Aimv2Processor

SEED = 20
TEST_SHARE = 1 / 3
CONFIG = Aimv2VisionConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=56,
    patch_size=14,
)
EPOCHS, BATCH = 80, 64
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 3e-3, 0.1, 0.1
# The loss sees cosines between features and class directions; the scale sets how far apart classes are pushed.
COSINE_SCALE, LABEL_SMOOTHING = 12.0, 0.1
TURN, SHIFT, ZOOM = 10.0, 0.07, 0.1
"""Largest random change of a training image: degrees, share of the side, share of the size."""


class Classifier(nn.Module):
    """The encoder and one direction per class; only the encoder is kept."""

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__()
        self.encoder = Aimv2VisionModel(config)
        self.directions = mx.random.normal((10, config.hidden_size))

    def __call__(self, pixels: mx.array) -> mx.array:
        """Scaled cosine of each image's mean token with each class: `(B, H, W, 3) -> (B, 10)`."""
        directions = self.directions / mx.linalg.norm(self.directions, axis=1, keepdims=True)
        return COSINE_SCALE * self.encoder.encode_image(pixels, normalize=True) @ directions.T


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded checkpoint on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--write", action="store_true", help="replace the checkpoint in the package")
    parser.add_argument("--write-scans", action="store_true", help="replace the scans in the package and stop")
    arguments = parser.parse_args()
    if arguments.write_scans:
        write_scans(bundled.ASSETS / "digits.npz")
        return
    model = train(epochs=arguments.epochs, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(model, Path(place))
        again, processor = load(place)  # what is measured is what was written
        print(f"5 nearest neighbours, held-out digits: {digits_accuracy(again, processor):.2%}")
        if arguments.write:
            for file in Path(place).iterdir():
                shutil.copyfile(file, bundled.digits_checkpoint() / file.name)
            print(f"written: {bundled.digits_checkpoint()}")


def train(*, epochs: int, seed: int) -> Aimv2VisionModel:
    """An encoder trained on the training part of the digits, the same for the same seed on the same machine."""
    mx.random.seed(seed)
    chance = np.random.default_rng(seed)
    scans = bundled.digits()
    images, labels = scans.train_images, mx.array(scans.train_labels.astype(np.int32))
    processor = Aimv2Processor(preprocessing.published(CONFIG.image_size), patch_size=CONFIG.patch_size)
    model = Classifier(CONFIG)
    start_small(model.encoder)
    steps = epochs * math.ceil(len(images) / BATCH)
    warm_up = int(WARM_UP * steps)
    rise = optim.linear_schedule(0.0, LEARNING_RATE, warm_up)
    fall = optim.cosine_decay(LEARNING_RATE, steps - warm_up)
    optimizer = optim.AdamW(optim.join_schedules([rise, fall], [warm_up]), betas=[0.9, 0.98], weight_decay=WEIGHT_DECAY)

    def loss(pixels: mx.array, wanted: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(pixels), wanted, label_smoothing=LABEL_SMOOTHING, reduction="mean")

    step = nn.value_and_grad(model, loss)
    began = time.perf_counter()
    for epoch in range(epochs):
        order, total = chance.permutation(len(images)), 0.0
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            pixels = processor([varied(images[i], chance) for i in chosen])
            value, gradients = step(pixels, labels[mx.array(chosen)])
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            optimizer.update(model, gradients)
            mx.eval(model.state, optimizer.state)
            total += value.item() * len(chosen)
        print(f"epoch {epoch + 1:3}  loss {total / len(order):.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    return model.encoder


def start_small(model: Aimv2VisionModel) -> None:
    """Normal weights of standard deviation 0.02 in every matrix, smaller where a block writes into the residual."""
    writes = ("attn.proj.weight", "mlp.down.weight")

    def start(name: str, weight: mx.array) -> mx.array:
        if weight.ndim < 2:
            return weight
        depth = 2 * CONFIG.num_hidden_layers if name.endswith(writes) else 1
        fan_in = math.prod(weight.shape[1:])
        spread = 0.02 if name == "pos_embed" else fan_in**-0.5
        return mx.random.normal(weight.shape) * spread / math.sqrt(depth)

    parameters: Any = tree_flatten(model.parameters())
    model.load_weights([(name, start(name, weight)) for name, weight in parameters])


def varied(scan: bundled.Bytes, chance: np.random.Generator) -> Image.Image:
    """The scan at the model's size, a little turned, shifted and zoomed; what enters at the edges is white."""
    size = CONFIG.image_size or 0
    image = Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC)
    turn, zoom = math.radians(chance.uniform(-TURN, TURN)), 1 + chance.uniform(-ZOOM, ZOOM)
    shift = chance.uniform(-SHIFT, SHIFT, 2) * size
    cos, sin, centre = math.cos(turn) / zoom, math.sin(turn) / zoom, size / 2
    # Pillow asks where each pixel of the result comes from: turn and zoom about the centre, then shift.
    matrix = (
        (cos, sin, centre - cos * (centre + shift[0]) - sin * (centre + shift[1])),
        (-sin, cos, centre + sin * (centre + shift[0]) - cos * (centre + shift[1])),
    )
    return image.transform(
        image.size, Image.Transform.AFFINE, [*matrix[0], *matrix[1]], Image.Resampling.BICUBIC, fillcolor=255
    )


def write_checkpoint(model: Aimv2VisionModel, folder: Path) -> None:
    """A folder as PyTorch and transformers would have left it, in Apple's layout."""
    parameters: Any = tree_flatten(model.parameters())
    tensors = layout_for("apple", pair=False).to_source(parameters)
    arrays = {name: np.ascontiguousarray(np.array(array)) for name, array in tensors}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["AIMv2Model"],
        "auto_map": {
            "AutoConfig": "configuration_aimv2.AIMv2Config",
            "AutoModel": "modeling_aimv2.AIMv2Model",
        },
        "attention_dropout": 0.0,
        "hidden_size": CONFIG.hidden_size,
        "image_size": CONFIG.image_size,
        "intermediate_size": CONFIG.intermediate_size,
        "model_type": "aimv2",
        "num_attention_heads": CONFIG.num_attention_heads,
        "num_channels": CONFIG.num_channels,
        "num_hidden_layers": CONFIG.num_hidden_layers,
        "num_queries": CONFIG.num_patches,
        "patch_size": CONFIG.patch_size,
        "projection_dropout": 0.0,
        "qkv_bias": False,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "torch_dtype": "float32",
        "use_bias": False,
    }
    images = preprocessing.to_clip(preprocessing.published(CONFIG.image_size))
    for name, content in (("config.json", config), ("preprocessor_config.json", images)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_scans(file: Path) -> None:
    """scikit-learn's digits as grey images with their labels and whether they are held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    labels = found.target.astype(np.uint8)
    ink = np.rint(found.images * 255 / 16).astype(np.uint8)  # 0 to 16 in the data
    _, held_out = train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=0)
    is_test = np.zeros(len(labels), bool)
    is_test[held_out] = True
    np.savez_compressed(file, images=255 - ink, labels=labels, is_test=is_test)


if __name__ == "__main__":
    main()
