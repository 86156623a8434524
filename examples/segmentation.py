"""Which pixels are what? Trains a head on your masks, without DATA on scenes of pasted digits.

python -m examples.segmentation [DATA] [--model MODEL] [--output segmentation.jpg]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from examples import make_scenes
from mlx_aimv2 import bundled
from mlx_aimv2.learn import fit

parser = argparse.ArgumentParser(description="Trains a head for masks and draws what it finds.")
parser.add_argument("data", nargs="?", type=Path, help="folder with images/ beside masks/")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--fine-tune-type", default="full", help="linear, decoder, lora, dora or full")
parser.add_argument("--image-size", type=int, default=112, help="pixels of a side (default: %(default)s)")
parser.add_argument("--iters", type=int, default=3000, help="steps (default: %(default)s)")
parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: %(default)s")
parser.add_argument("--scenes", type=int, default=1200, help="scenes for training (default: %(default)s)")
parser.add_argument("--output", default="segmentation.jpg", help="default: %(default)s")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data, head = args.data, Path(folder) / "head"
        if data is None:
            make_scenes.main([folder, "--train", str(args.scenes), "--held-out", str(max(2, args.scenes // 6))])
            data = Path(folder) / "masks"
        fitted = fit(
            data,
            args.model,
            head,
            task="segment",
            fine_tune_type=args.fine_tune_type,
            image_size=args.image_size,
            iters=args.iters,
            learning_rate=args.learning_rate,
            drop_path=0.0,
            layer_decay=1.0,
            patience=0,
            say=print,
        )
        shutil.copy(head / "overlays.jpg", args.output)
    print(f"{fitted.line}: {args.output}")


if __name__ == "__main__":
    main()
