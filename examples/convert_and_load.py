"""Converts a checkpoint and compares its features with those of the original.

python -m examples.convert_and_load [MODEL] [--dtype float16] [--output mlx_model] [--image IMAGE]
"""

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx

from mlx_aimv2 import bundled, load
from mlx_aimv2.convert import convert

parser = argparse.ArgumentParser(description="Convert a checkpoint and compare its features with the original's.")
parser.add_argument("model", nargs="?", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--dtype", default="float16", help="of the converted weights (default: %(default)s)")
parser.add_argument("--output", help="folder to keep the converted model in (default: none is kept)")
parser.add_argument("--image", default=bundled.photographs()[0])


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = convert(args.model, args.output or Path(place) / "model", dtype=args.dtype)
        before, processor = load(args.model)
        after, _ = load(folder)
        pixels = processor(args.image)
        a, b = (model.encode_image(pixels)[0].astype(mx.float32) for model in (before, after))
        cosine = ((a @ b) / (mx.linalg.norm(a) * mx.linalg.norm(b))).item()
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{args.dtype}: {size / 1e6:.2f} MB, cosine with the original's feature {cosine:.6f}")


if __name__ == "__main__":
    main()
