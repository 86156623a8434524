"""Draws which parts of a photograph are like one of them, as a heat map over the image.

python -m examples.patch_similarity [IMAGE] [--patch ROW,COL] [--model MODEL] [--output map.png]
"""

import argparse

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_aimv2 import bundled, load, plot
from mlx_aimv2.images import open_image

parser = argparse.ArgumentParser(description="How alike every patch is to one of them.")
parser.add_argument("image", nargs="?", default=bundled.photographs()[1])
parser.add_argument("--patch", default="1,1", metavar="ROW,COL", help="counted from 0,0 at the top left")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="patch_similarity.png", help="default: %(default)s")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    row, column = (int(number) for number in args.patch.split(","))
    model, processor = load(args.model)
    pixels = processor(args.image)
    grid = model.vision.grid(pixels)
    tokens = np.array(model.vision(pixels).last_hidden_state[0].astype(mx.float32))  # (N, D)

    seen = Image.fromarray(processor.levels(open_image(args.image)))  # the image as the model sees it
    heat = plot.similarity_map(tokens, grid, (row, column), cell=28)
    image = plot.to_height(seen, 672)
    Image.blend(image, heat.resize(image.size, Image.Resampling.NEAREST), 0.6).save(args.output)

    cosines = plot.similarities(tokens, grid, (row, column))
    cosines[row, column] = -1  # itself
    best = np.unravel_index(cosines.argmax(), grid)
    print(f"most like patch {row},{column} is {best[0]},{best[1]} (cosine {cosines.max():.3f}): {args.output}")


if __name__ == "__main__":
    main()
