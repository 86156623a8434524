"""What does the model return for a photograph? A vector for each patch, one for the image, and how to see them.

python -m examples.features [IMAGE] [--patch ROW,COL] [--model MODEL] [--output features.png]
"""

import argparse

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_aimv2 import bundled, load, plot
from mlx_aimv2.images import open_image

parser = argparse.ArgumentParser(description="Features of one photograph, printed and drawn.")
parser.add_argument("image", nargs="?", default=bundled.photographs()[2])
parser.add_argument("--patch", default="8,12", metavar="ROW,COL", help="compared with all others, counted from 0,0")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--image-size", type=int, help="pixels of a side (default: 336 for the pair in the package)")
parser.add_argument("--output", default="features.png", help="the maps (default: %(default)s)")


def maps(model, processor, image, patch: tuple[int, int], *, cell: int) -> list[Image.Image]:
    """An image as the model sees it, its patches as colours, and how similar they are to one of them."""
    pixels = processor(image)
    grid = model.vision.grid(pixels)
    tokens = np.array(model.vision(pixels).last_hidden_state[0].astype(mx.float32))  # (N, D)
    seen = Image.fromarray(processor.levels(open_image(image)))
    drawn = [plot.pca_map(tokens, grid, cell=cell), plot.similarity_map(tokens, grid, patch, cell=cell)]
    return [plot.to_height(seen, cell * grid[0]), *drawn]


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    size = 336 if args.model == bundled.emoji_checkpoint() else None
    model, processor = load(args.model, image_size=args.image_size or size)
    pixels = processor(args.image)  # (1, H, W, 3)
    out = model.vision(pixels, output_hidden_states=True)
    print("pixels             ", pixels.shape, pixels.dtype)
    print("last_hidden_state  ", out.last_hidden_state.shape, "a vector for each patch, after the final norm")
    print("hidden_states      ", len(out.hidden_states), "arrays: the embedding, then each block's output")
    print("encode_image       ", model.encode_image(pixels).shape, "a vector for the image")

    grid = model.vision.grid(pixels)
    drawn = maps(model, processor, args.image, tuple(map(int, args.patch.split(","))), cell=672 // max(grid))
    plot.beside(drawn, gap=8).save(args.output)
    print(f"{grid[0]} x {grid[1]} patches, like colours for like vectors, bright is like {args.patch}: {args.output}")


if __name__ == "__main__":
    main()
