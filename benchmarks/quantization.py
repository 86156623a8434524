"""Measures what fewer bits cost: fidelity, size and recall of the embedded pair in every format.

`python -m benchmarks.quantization`: converts the pair that ships, float16, in each mode; the mean and the least token
cosine against its source on the four bundled photographs, bits per weight, and how many of the 300 bundled emoji find
their own name first, and among the first five, in that precision.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from mlx_aimv2 import Aimv2Model, Aimv2Processor, bundled, load
from mlx_aimv2.conversion import fidelity
from mlx_aimv2.convert import convert
from mlx_aimv2.quantize import RECIPES
from tools.train_emoji import embed_images, embed_texts, recall

CASES = {
    "dense": {},
    **{f"{bits} bit": {"quantize": True, "q_bits": bits} for bits in (8, 6, 5, 4, 3)},
    **{mode: {"quantize": True, "q_mode": mode} for mode in ("mxfp8", "mxfp4", "nvfp4")},
    **{recipe: {"quantize": True, "quant_predicate": recipe} for recipe in RECIPES},
}


def main() -> None:
    source = bundled.emoji_checkpoint()
    print(f"{'':<14} {'bits/weight':>11} {'cosine, mean':>12} {'least':>9} {'first':>8} {'of 5':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in CASES.items():
            result = convert(source, Path(folder) / name, dtype="float16", **options)
            found = json.loads((result / fidelity.FILE).read_text())
            first, of_five = recall(name_scores(*load(result, dtype="float32")))
            cosine, bits = found["token_cosine"], found["model"]["bits_per_weight"]
            print(
                f"{name:<14} {bits:>11.3f} {cosine['mean']:>12.6f} {cosine['min']:>9.6f} {first:>8.2%} {of_five:>8.2%}",
                flush=True,
            )


def name_scores(model: Aimv2Model, processor: Aimv2Processor) -> np.ndarray:
    """The cosine of each bundled emoji and each one's name, `(300, 300)`."""
    names = bundled.emoji_images()
    return embed_images(model, processor, list(names)) @ embed_texts(model, processor, list(names.values())).T


if __name__ == "__main__":
    main()
