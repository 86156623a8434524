"""Ranks images by how well they fit a text.

python -m examples.search_by_text "a sad face" [IMAGE ...] [--model MODEL]

The embedded model knows words for emoji; for photographs take Apple's LiT checkpoint (1.7 GB, fetched on first use).
For more images than a few, embed them once (mlx-aimv2 embed) and search the index (mlx-aimv2 search).
"""

import argparse

import mlx.core as mx

from mlx_aimv2 import bundled, load

parser = argparse.ArgumentParser(description="Rank images by a text.")
parser.add_argument("text")
parser.add_argument("images", nargs="*", default=list(bundled.emoji_images())[::5], help="default: 60 bundled emoji")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model, processor = load(args.model, dtype="auto")
    ids = processor.tokenize(args.text)
    query = model.encode_text(ids, normalize=True)  # (1, E); fails at once without a text encoder
    images = model.encode_image(processor(args.images), normalize=True)  # (B, E)
    cosines = (images @ query.T)[:, 0].astype(mx.float32)
    for i in mx.argsort(-cosines).tolist():
        print(f"{cosines[i].item():7.4f}  {args.images[i]}")


if __name__ == "__main__":
    main()
