"""Which pixels are what, and where? Trains a head on your masks or boxes, without DATA on scenes of pasted digits.

python -m examples.masks_and_boxes [DATA] [--task detect] [--model MODEL] [--output overlays.jpg]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from examples import make_scenes
from mlx_aimv2 import bundled
from mlx_aimv2.learn import fit

SETTINGS = {"segment": {"iters": 3000, "layer_decay": 1.0}, "detect": {"iters": 1000}}  # the pair knows emoji alone
parser = argparse.ArgumentParser(description="Train a head for masks or boxes and draw what it finds.")
parser.add_argument("data", nargs="?", type=Path, help="folder with images/ beside masks/, or with COCO JSON")
parser.add_argument("--task", default="segment", choices=("segment", "detect"), help="default: %(default)s")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--fine-tune-type", default="full", help="linear (masks), decoder, lora, dora or full")
parser.add_argument("--image-size", type=int, default=112, help="pixels of a side (default: %(default)s)")
parser.add_argument("--iters", type=int, help="steps (default: 3000 for masks, 1000 for boxes)")
parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: %(default)s")
parser.add_argument("--scenes", type=int, default=1200, help="scenes for training (default: %(default)s)")
parser.add_argument("--output", default="overlays.jpg", help="default: %(default)s")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    how = {name: getattr(args, name) for name in ("task", "fine_tune_type", "image_size", "learning_rate")}
    how |= SETTINGS[args.task] | ({"iters": args.iters} if args.iters else {})
    with tempfile.TemporaryDirectory() as folder:
        data, head = args.data, Path(folder) / "head"
        if data is None:
            make_scenes.main([folder, "--train", str(args.scenes), "--held-out", str(max(2, args.scenes // 6))])
            data = Path(folder) / {"segment": "masks", "detect": "boxes"}[args.task]
        fitted = fit(data, args.model, head, drop_path=0.0, patience=0, say=print, **how)
        shutil.copy(head / "overlays.jpg", args.output)
    print(f"{fitted.line}: {args.output}")


if __name__ == "__main__":
    main()
