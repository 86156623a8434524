"""How do I fine-tune an encoder in a training loop of my own?

python -m examples.own_loop [--model MODEL] [--output FOLDER] [--iters N]

LoRA adapters and a linear head learn handwritten digits; the encoder is fused and saved as a checkpoint like any other.
"""

import argparse

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_aimv2 import bundled, load, save
from mlx_aimv2.learn import add_adapters, fuse

parser = argparse.ArgumentParser(description="Fine-tune an encoder by LoRA in a loop of one's own.")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="tuned", help="folder to write (default: %(default)s)")
parser.add_argument("--iters", type=int, default=60, help="steps (default: %(default)s)")


class Classifier(nn.Module):
    """An encoder with a linear head on the mean of its tokens: `(B, H, W, 3) -> (B, 10)`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.head(self.encoder.encode_image(pixels))


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model, processor = load(args.model, dtype="float32")
    scans, rng = bundled.digits(), np.random.default_rng(0)
    pixels, labels = processor(list(scans.train_images[:300])), mx.array(scans.train_labels[:300])
    add_adapters(model.vision, num_layers=2, scale=2.0)  # all else in the encoder is frozen
    classifier = Classifier(model.vision)
    optimizer = optim.AdamW(learning_rate=1e-3)
    loss_and_grad = nn.value_and_grad(classifier, lambda x, y: nn.losses.cross_entropy(classifier(x), y).mean())
    for step in range(args.iters):
        chosen = mx.array(rng.integers(len(labels), size=16))
        loss, grads = loss_and_grad(pixels[chosen], labels[chosen])
        optimizer.update(classifier, grads)
        mx.eval(classifier.parameters(), optimizer.state)
        if step in (0, args.iters - 1):
            print(f"step {step + 1}  loss {loss.item():.3f}")
    found = np.array(classifier(processor(list(scans.test_images[:100]))).argmax(axis=1))
    folder = save(fuse(model), processor, args.output, is_tuned=True)
    print(f"{(found == scans.test_labels[:100]).mean():.0%} of 100 held-out digits; the encoder is in {folder}")


if __name__ == "__main__":
    main()
