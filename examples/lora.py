"""How much better does an encoder know my labels when LoRA bends it a little?

python -m examples.lora [DATA] [--model MODEL] [--output HEAD] [--iters N]

DATA is a folder with a folder of images for each label. Without it: a few of the handwritten digits.
"""

import argparse
import tempfile
from pathlib import Path

from examples.probe import write_digits
from mlx_aimv2 import bundled, load
from mlx_aimv2.learn import fit, fuse

parser = argparse.ArgumentParser(description="Fine-tune an encoder by LoRA and fuse the result.")
parser.add_argument("data", nargs="?", help="folder with a folder of images for each label")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="lora", help="folder for the head and its card (default: %(default)s)")
parser.add_argument("--iters", type=int, default=60, help="steps (default: %(default)s)")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    output = Path(args.output)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(args.data) if args.data else write_digits(Path(temporary) / "digits")
        fitted = fit(
            data,
            args.model,
            output,
            fine_tune_type="lora",
            iters=args.iters,
            dtype="auto",
            grad_checkpoint=True,
            say=print,
        )
    adapters = (output / "adapters.safetensors").stat().st_size
    fused = fuse(output, output.with_name(f"{output.name}-fused"))
    load(fused)  # a checkpoint like any other: embed, search and convert read it, too
    whole = (fused / "model.safetensors").stat().st_size
    print(f"adapters of {adapters / 1e6:.2f} MB, fused into {fused}, {whole / 1e6:.2f} MB")
    print(fitted.line)


if __name__ == "__main__":
    main()
