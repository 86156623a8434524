"""Classifies images by labels in words, without any training.

python -m examples.zero_shot [IMAGE ...] [--labels cat,dog,fox] [--model MODEL]

The embedded model has no text encoder: this needs Apple's LiT checkpoint (1.7 GB), which is fetched on first use.
"""

import argparse

from mlx_aimv2 import bundled, load, zero_shot
from mlx_aimv2.config import LIT_CHECKPOINT

# Several sentences are averaged into one vector per label, as in CLIP's zero-shot set-up.
TEMPLATES = ["a photo of a {}", "a close-up photo of a {}", "a photo of the {}", "an image of one {}"]

parser = argparse.ArgumentParser(description="Classify images by labels.")
parser.add_argument("images", nargs="*", default=bundled.photographs(), help="default: the bundled photographs")
parser.add_argument(
    "--labels", default="astronaut,cat,cup of coffee,rocket,dog,lighthouse", help="default: %(default)s"
)
parser.add_argument("--model", default=LIT_CHECKPOINT, help="Hub name or checkpoint folder (default: %(default)s)")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model, processor = load(args.model)
    predictions = zero_shot(model, processor, args.images, args.labels.split(","), templates=TEMPLATES)
    for image, prediction in zip(args.images, predictions, strict=True):
        best = ", ".join(f"{label} {100 * probability:.1f} %" for label, probability in prediction.top(3))
        print(f"{image}: {best}")


if __name__ == "__main__":
    main()
