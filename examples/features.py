"""Shows what the model returns for a photograph: a vector per patch, one per image, and a map of the patches.

python -m examples.features [IMAGE] [--model MODEL] [--output map.png]
"""

import argparse

import mlx.core as mx
import numpy as np

from mlx_aimv2 import bundled, load, plot

parser = argparse.ArgumentParser(description="Features of one photograph.")
parser.add_argument("image", nargs="?", default=bundled.photographs()[0])
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="features.png", help="the map (default: %(default)s)")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model, processor = load(args.model)
    pixels = processor(args.image)  # (1, H, W, 3)
    out = model.vision(pixels, output_hidden_states=True)
    print("pixels             ", pixels.shape, pixels.dtype)
    print("last_hidden_state  ", out.last_hidden_state.shape, "one vector per patch, after the final norm")
    print("hidden_states      ", len(out.hidden_states), "arrays: the embedding, then each block's output")
    print("encode_image       ", model.encode_image(pixels).shape, "one vector per image")

    tokens = np.array(out.last_hidden_state[0].astype(mx.float32))  # (N, D)
    grid = model.vision.grid(pixels)
    plot.pca_map(tokens, grid, cell=672 // max(grid)).save(args.output)
    print(f"{grid[0]} x {grid[1]} patches, like colours for like features: {args.output}")


if __name__ == "__main__":
    main()
