"""Ranks several images by how much they are like the first one.

python -m examples.most_similar [QUERY IMAGE ...] [--model MODEL] [--output ranking.png]

Without images: a handwritten digit that the embedded model never saw, among a hundred that it was trained on.
"""

import argparse

import mlx.core as mx
import numpy as np

from mlx_aimv2 import bundled, load
from mlx_aimv2.images import to_rgb
from mlx_aimv2.learn.drawing import contact_sheet

parser = argparse.ArgumentParser(description="Rank images by their similarity to the first one.")
parser.add_argument("images", nargs="*", help="the query, then the images to rank")
parser.add_argument("--model", default=bundled.digits_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="most_similar.png", help="the ranking drawn (default: %(default)s)")
parser.add_argument("--show", type=int, default=8, help="how many to show (default: %(default)s)")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    if len(args.images) == 1:
        parser.error("give the query and at least one image to compare it with")
    scans = bundled.digits()
    images = args.images or [scans.test_images[0], *scans.train_images[:100]]
    names = args.images or [f"a {label}" for label in [scans.test_labels[0], *scans.train_labels[:100]]]

    model, processor = load(args.model)
    features = mx.concatenate([model.encode_image(processor(image), normalize=True) for image in images])
    cosines = np.array((features[1:] @ features[0]).astype(mx.float32))  # unit vectors: the product is the cosine
    best = np.argsort(-cosines)[: args.show]
    for rank, i in enumerate(best, 1):
        print(f"{rank:3}  {cosines[i]:.3f}  {names[i + 1]}")

    row = [to_rgb(images[i]) for i in (0, *(best + 1))]
    captions = ["query", *(f"{cosines[i]:.3f}" for i in best)]
    contact_sheet([row], captions=[captions], side=128).save(args.output)
    print(f"most like {names[0]}: {names[best[0] + 1]}; drawn in {args.output}")


if __name__ == "__main__":
    main()
