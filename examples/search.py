"""Which images fit some words, or another image? Ranks them, and draws the best.

python -m examples.search [QUERY] [IMAGE ...] [--model MODEL] [--output search.png]

QUERY is an image file, or else words; the pair in the package knows a few for emoji, Apple's LiT checkpoint sentences.
To search a folder often, embed it once (mlx-aimv2 embed) and search the index (mlx-aimv2 search).
"""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_aimv2 import bundled, load
from mlx_aimv2.embed import embed
from mlx_aimv2.plot import contact_sheet

parser = argparse.ArgumentParser(description="Rank images by words or by an image.")
parser.add_argument("query", nargs="?", default="animal", help="words, or an image file (default: %(default)s)")
parser.add_argument("images", nargs="*", default=list(bundled.emoji_images())[::5], help="default: 60 bundled emoji")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="search.png", help="the best eight (default: %(default)s)")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model, processor = load(args.model, dtype="auto")
    if Path(args.query).is_file():
        query = model.encode_image(processor(args.query), normalize=True)  # (1, D)
    else:
        query = model.encode_text(processor.tokenize([args.query]), normalize=True)
    images = list(embed(args.images, model, processor))
    vectors = np.array([one.vector for one in images], np.float32)  # (n, D), as long as the model gave them
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ np.array(query.astype(mx.float32))[0]
    order = np.argsort(-cosines)
    for i in order:
        print(f"{cosines[i]:7.4f}  {images[i].path}")
    captions = [f"{cosines[i]:.3f}" for i in order[:8]]
    contact_sheet([[Image.open(images[i].path) for i in order[:8]]], captions=[captions]).save(args.output)


if __name__ == "__main__":
    main()
