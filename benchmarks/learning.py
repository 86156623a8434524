"""How much an encoder that never saw a label helps: probes and fine-tuning on digits, beside random weights.

An encoder of 4 blocks is pre-trained on the 1,198 training digits as a masked autoencoder (He et al. 2022): half of the
patches are hidden by `patch_mask`, and one more block tells their pixels, normalised in each patch. Then `fit` learns
the labels, every type with equal steps from these weights and from random ones; 599 digits are held out.

    python -m benchmarks.learning [--steps 1500] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlx_aimv2 import bundled
from mlx_aimv2.backend import run_blocks
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.conversion import folder
from mlx_aimv2.files import atomic_folder
from mlx_aimv2.images import preprocessing
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import fit
from mlx_aimv2.model import Aimv2VisionModel, visible_patches
from mlx_aimv2.train.loop import Plan, Watch, train

CONFIG = Aimv2VisionConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=56,
    patch_size=14,
)
BATCH, HIDDEN, LEARNING_RATE, DECODER_BLOCKS = 64, 0.5, 2e-3, 1

RUNS: dict[str, dict[str, Any]] = {
    "knn": {},
    "linear": {},
    "attentive": {"epochs": 40, "batch_size": 64},
    "lora": {"epochs": 4, "batch_size": 32, "learning_rate": 1e-3, "patience": 0},
    "full": {"epochs": 4, "batch_size": 32, "learning_rate": 5e-4, "patience": 0},
}
"""Fine-tune type -> how it is trained, from either weights."""


class Autoencoder(nn.Module):
    """The encoder, and what is thrown away after pre-training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Aimv2VisionModel(CONFIG)
        decoder = Aimv2VisionModel(CONFIG)
        self.blocks, self.norm = decoder.blocks[:DECODER_BLOCKS], decoder.norm
        self.hidden_token = mx.zeros((CONFIG.hidden_size,))
        self.positions = mx.zeros((CONFIG.num_patches or 0, CONFIG.hidden_size))
        self.pixels = nn.Linear(CONFIG.hidden_size, CONFIG.patch_size**2 * 3)

    def __call__(self, pixels: mx.array, patch_mask: mx.array) -> mx.array:
        """Mean squared error of the hidden patches, `(B, H, W, 3), (B, N) -> (B,)`."""
        tokens = self.encoder(pixels, patch_mask=patch_mask).last_hidden_state
        places = visible_patches(patch_mask, patch_mask.shape)[..., None]
        x = mx.broadcast_to(self.hidden_token, (*patch_mask.shape, tokens.shape[-1]))
        x = mx.put_along_axis(x, mx.broadcast_to(places, tokens.shape), tokens, axis=1) + self.positions
        *_, x = run_blocks(self.blocks, x)
        errors = mx.square(self.pixels(self.norm(x)) - targets(pixels)).mean(axis=-1)
        return (errors * patch_mask).sum(axis=1) / patch_mask.sum(axis=1)


def targets(pixels: mx.array) -> mx.array:
    """Patches, each of mean 0 and variance 1: `(B, H, W, 3) -> (B, N, 3 P²)`."""
    patch, side = CONFIG.patch_size, pixels.shape[1] // CONFIG.patch_size
    cut = pixels.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    cut = cut.reshape(len(pixels), side * side, -1)
    return (cut - cut.mean(axis=-1, keepdims=True)) / mx.sqrt(cut.var(axis=-1, keepdims=True) + 1e-2)


def random_start(model: nn.Module, seed: int) -> None:
    """Normal weights of variance 1 over the inputs, smaller where a block writes into the residual."""
    keys = iter(mx.random.split(mx.random.key(seed), 999))
    flat: Any = tree_flatten(model.parameters())
    for name, array in flat:
        if array.ndim < 2 and not name.endswith("hidden_token"):
            continue
        spread = 0.02 if "pos" in name or "token" in name else math.prod(array.shape[1:]) ** -0.5
        spread /= math.sqrt(2 * CONFIG.num_hidden_layers) if name.endswith(("attn.proj.weight", "down.weight")) else 1
        model.load_weights([(name, spread * mx.random.normal(array.shape, key=next(keys)))], strict=False)


class Drawn:
    """Batches of images with random masks."""

    def __init__(self, images: mx.array) -> None:
        self.images = images

    def __call__(self, number: int) -> tuple[tuple[mx.array, mx.array], int]:
        rng = np.random.default_rng([1, number])
        patches = CONFIG.num_patches or 0
        order = np.argsort(rng.random((BATCH, patches)), axis=1)
        chosen = mx.array(rng.integers(0, len(self.images), BATCH))
        return (self.images[chosen], mx.array(order < HIDDEN * patches)), 0

    def close(self) -> None:
        pass


def pretrain(model: Autoencoder, images: mx.array, *, steps: int) -> None:
    """Trains the encoder to be of use for the hidden patches."""
    began = time.perf_counter()

    def after_step(step: int, losses: dict[str, float]) -> None:
        if step % 100 == 0:
            print(f"  step {step:5}  loss {losses['loss']:.4f}  {time.perf_counter() - began:.0f} s", flush=True)

    plan = Plan(
        steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        warm_up=steps // 20,
        clip=1.0,
        keep="last",
    )
    losses = lambda model, batch, key: {"loss": model(*batch).mean()}  # noqa: E731
    train(model, losses, Drawn(images), plan, watch=Watch(after_step=after_step))


def write(encoder: Aimv2VisionModel, place: Path) -> None:
    """An MLX folder of an encoder."""
    with atomic_folder(place) as inside:
        flat: Any = tree_flatten(encoder.parameters())
        folder.save_weights(inside, flat)
        folder.save_config(inside, CONFIG.to_dict())
        processor().save_to(inside)


def processor() -> Aimv2Processor:
    return Aimv2Processor(preprocessing.published(CONFIG.image_size), patch_size=CONFIG.patch_size)


def write_digits(place: Path) -> None:
    """`train` and `test`, each with a folder for every digit."""
    scans = bundled.digits()
    parts = {"train": (scans.train_images, scans.train_labels), "test": (scans.test_images, scans.test_labels)}
    for part, (images, labels) in parts.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = place / part / str(label) / f"{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning from an encoder that never saw a label, on digits.")
    parser.add_argument("--steps", type=int, default=1500, help="of pre-training (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for the encoders and heads (default: a temporary one)")
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="fine-tune types")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mask-ratio", type=float, default=0.0, help="of patches that lora and full hide in training")
    parser.add_argument("--mask-shape", default="random", help="random or block")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.keep or Path(temporary)
        if not (place / "digits").exists():
            write_digits(place / "digits")
        if not (place / "pretrained").exists():
            model = Autoencoder()
            random_start(model, seed=3)
            write(model.encoder, place / "random")
            images = processor()(list(bundled.digits().train_images))
            pretrain(model, images, steps=arguments.steps)
            write(model.encoder, place / "pretrained")
        print("\n| 599 held-out digits, top-1 | pre-trained without labels | random weights |\n| --- | ---: | ---: |")
        for kind in arguments.only:
            cells = []
            for start in ("pretrained", "random"):
                began = time.perf_counter()
                target = place / f"{kind}-from-{start}"
                settings = {"fine_tune_type": kind, "seed": arguments.seed, **RUNS[kind]}
                if kind in ("lora", "full"):
                    settings["augment"] = False  # crops and turns of 8 x 8 pixels hide more than they teach
                    settings |= {name: getattr(arguments, name) for name in ("mask_ratio", "mask_shape")}
                fitted = fit(place / "digits", place / start, target, cache=place / "cache", **settings)
                taken = time.perf_counter() - began
                cells.append(f"{100 * fitted.scores['test']['top1']:.2f} % ({taken:.0f} s)")
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
