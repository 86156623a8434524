"""Measures what fewer bits cost: fidelity, size and accuracy of the embedded encoder in every format.

`python -m benchmarks.quantization`: converts the encoder that ships, float16, in each mode; the mean and the least
token cosine against its float32 source on the four bundled photographs, bits per weight, and the accuracy of a
5-nearest-neighbour vote on held-out digits.
"""

import json
import tempfile
from pathlib import Path

from examples.digits import digits_accuracy
from mlx_aimv2 import bundled, load
from mlx_aimv2.conversion import fidelity
from mlx_aimv2.convert import convert
from mlx_aimv2.quantize import RECIPES

CASES = {
    "dense": {},
    **{f"{bits} bit": {"quantize": True, "q_bits": bits} for bits in (8, 6, 5, 4, 3)},
    **{mode: {"quantize": True, "q_mode": mode} for mode in ("mxfp8", "mxfp4", "nvfp4")},
    **{recipe: {"quantize": True, "quant_predicate": recipe} for recipe in RECIPES},
    **{f"target {target}": {"q_target": target} for target in (0.9995, 0.999, 0.998, 0.995)},
}


def main() -> None:
    source = bundled.digits_checkpoint()
    accuracy = digits_accuracy(*load(source))
    print(f"{'':<14} {'bits/weight':>11} {'cosine, mean':>12} {'least':>9} {'accuracy':>9}")
    print(f"{'source':<14} {32:>11.3f} {1:>12.6f} {1:>9.6f} {accuracy:>9.2%}")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in CASES.items():
            result = convert(source, Path(folder) / name, dtype="float16", **options)
            found = json.loads((result / fidelity.FILE).read_text())
            accuracy = digits_accuracy(*load(result, dtype="float32"))
            cosine, bits = found["token_cosine"], found["model"]["bits_per_weight"]
            print(
                f"{name:<14} {bits:>11.3f} {cosine['mean']:>12.6f} {cosine['min']:>9.6f} {accuracy:>9.2%}", flush=True
            )


if __name__ == "__main__":
    main()
