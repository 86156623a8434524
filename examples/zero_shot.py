"""Classifies images by labels in words, without any training.

python -m examples.zero_shot [IMAGE ...] [--labels cat,dog,fox] [--model MODEL]

The embedded model knows words for emoji; for photographs take Apple's LiT checkpoint (1.7 GB, fetched on first use).
"""

import argparse

from mlx_aimv2 import bundled, load, zero_shot

# Several sentences are averaged into one vector per label, as in CLIP's zero-shot set-up.
TEMPLATES = ["{}", "a {}", "an image of a {}"]

parser = argparse.ArgumentParser(description="Classify images by labels.")
parser.add_argument("images", nargs="*", default=list(bundled.emoji_images())[::30], help="default: ten bundled emoji")
parser.add_argument("--labels", default="animal,food,vehicle,face,clothes,plant", help="default: %(default)s")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model, processor = load(args.model, dtype="auto")
    predictions = zero_shot(model, processor, args.images, args.labels.split(","), templates=TEMPLATES)
    for image, prediction in zip(args.images, predictions, strict=True):
        best = ", ".join(f"{label} {100 * probability:.1f} %" for label, probability in prediction.top(3))
        print(f"{image}: {best}")


if __name__ == "__main__":
    main()
