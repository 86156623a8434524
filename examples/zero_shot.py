"""Which label fits an image best? Labels are words, and nothing is trained.

python -m examples.zero_shot [IMAGE ...] [--labels cat,dog,fox] [--model MODEL] [--output zero_shot.png]

The pair in the package knows a few words for emoji; for photographs take Apple's LiT checkpoint (1.7 GB).
"""

import argparse

from mlx_aimv2 import bundled, load, zero_shot
from mlx_aimv2.images import to_rgb
from mlx_aimv2.plot import contact_sheet

EMOJI = ("cow", "bouquet", "angry-face", "waving-hand", "red-square", "kangaroo", "hibiscus", "weary-face")
# Several sentences are averaged into one vector per label, as in CLIP's zero-shot set-up.
TEMPLATES = ["{}", "a {}", "an image of a {}"]

parser = argparse.ArgumentParser(description="Classify images by labels.")
files = [bundled.ASSETS / "noto" / f"{name}.webp" for name in EMOJI]
parser.add_argument("images", nargs="*", default=files, help="default: eight bundled emoji")
parser.add_argument("--labels", default="animal,plant,face,hand,square", help="default: %(default)s")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="zero_shot.png", help="images and labels (default: %(default)s)")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model, processor = load(args.model, dtype="auto")
    predictions = list(zero_shot(model, processor, args.images, args.labels.split(","), templates=TEMPLATES))
    for image, prediction in zip(args.images, predictions, strict=True):
        print(f"{image}: {', '.join(f'{label} {100 * share:.1f} %' for label, share in prediction.top(3))}")
    labels = [prediction.label for prediction in predictions]
    contact_sheet([[to_rgb(image) for image in args.images]], captions=[labels]).save(args.output)


if __name__ == "__main__":
    main()
