"""Draws which parts of a photograph are like one of them, as a heat map over the image.

python -m examples.patch_similarity [IMAGE] [--patch ROW,COL] [--model MODEL] [--output map.png]
"""

import argparse

import mlx.core as mx
import numpy as np

from mlx_aimv2 import bundled, load, plot

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

    steps = processor.preprocessing
    image = plot.seen(np.array(pixels[0]), mean=steps.image_mean, std=steps.image_std)
    image = plot.to_height(image, 672)
    heat = plot.similarity_map(tokens, grid, (row, column), cell=28)
    plot.overlay(image, heat).save(args.output)

    cosines = plot.similarities(tokens, grid, (row, column))
    cosines[row, column] = -1  # itself
    best = np.unravel_index(cosines.argmax(), grid)
    print(f"most like patch {row},{column} is {best[0]},{best[1]} (cosine {cosines.max():.3f}): {args.output}")


if __name__ == "__main__":
    main()
