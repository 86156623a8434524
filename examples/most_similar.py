"""Ranks several images by how much they are like the first one.

python -m examples.most_similar [QUERY IMAGE ...] [--model MODEL] [--output ranking.png]

Without images: one of the bundled faces among the others, in a style that the embedded model never saw.
"""

import argparse

import mlx.core as mx
import numpy as np

from mlx_aimv2 import bundled, load
from mlx_aimv2.images import to_rgb
from mlx_aimv2.plot import contact_sheet

parser = argparse.ArgumentParser(description="Rank images by their similarity to the first one.")
parser.add_argument("images", nargs="*", help="the query, then the images to rank")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="most_similar.png", help="the ranking drawn (default: %(default)s)")
parser.add_argument("--show", type=int, default=8, help="how many to show (default: %(default)s)")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    if len(args.images) == 1:
        parser.error("give the query and at least one image to compare it with")
    emoji = bundled.emoji_images()
    images = args.images or [file for file, name in emoji.items() if "face" in name]
    names = args.images or [emoji[file] for file in images]

    model, processor = load(args.model, dtype="auto")
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
