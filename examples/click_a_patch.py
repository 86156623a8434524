"""Writes a page for any browser, complete in one file: click a patch of a photograph and see what is like it.

python -m examples.click_a_patch [IMAGE] [--model MODEL] [--output page.html]
"""

import argparse
import base64
import io
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_aimv2 import bundled, load, plot
from mlx_aimv2.images import open_image

PAGE = Path(__file__).with_suffix(".html")

parser = argparse.ArgumentParser(description="A page that shows which patches are like the one that is clicked.")
parser.add_argument("image", nargs="?", default=bundled.photographs()[1])
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="click_a_patch.html", help="default: %(default)s")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    model, processor = load(args.model)
    pixels = processor(args.image)
    rows, columns = model.vision.grid(pixels)
    tokens = model.vision(pixels).last_hidden_state[0].astype(mx.float32)  # (N, D)
    tokens = tokens / mx.linalg.norm(tokens, axis=1, keepdims=True)
    cosines = np.array(tokens @ tokens.T)  # (N, N): a row for each patch that can be clicked
    low = cosines.min(axis=1, keepdims=True)
    levels = np.rint((cosines - low) / np.maximum(1 - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)

    file = io.BytesIO()
    Image.fromarray(processor.levels(open_image(args.image))).save(file, "PNG")  # the image as the model sees it
    data = {
        "rows": rows,
        "columns": columns,
        "patch": model.vision.config.patch_size,
        "levels": base64.b64encode(levels.tobytes()).decode(),
        "colours": (plot.heat(np.linspace(0, 1, 256)) * 255).round().astype(int).tolist(),
        "image": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    }
    page = PAGE.read_text(encoding="utf-8").replace("{{DATA}}", json.dumps(data))
    Path(args.output).write_text(page, encoding="utf-8")
    print(f"{rows * columns} patches to click, {len(page) / 1e6:.2f} MB: open {args.output} in a browser")


if __name__ == "__main__":
    main()
