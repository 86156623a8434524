"""Prints the released checkpoints with their sizes dense and quantized, as a Markdown table: that of docs/models.md.

    python -m benchmarks.sizes

Computed, not downloaded: parameters of the table in `config.py`, bits as `convert -q` gives them (affine, groups of 64,
scales and biases in float16, what stays dense in float16). GB are 10**9 bytes.
"""

from __future__ import annotations

import math

from mlx_aimv2.config import RELEASED, AnyConfig, Released
from mlx_aimv2.loading import build, parameter_shapes
from mlx_aimv2.quantize import layers, plan, resolve, settings_at

HEAD = """| checkpoint | parameters | tokens per image | float16 | 8 bits | 4 bits |
| --- | ---: | ---: | ---: | ---: | ---: |"""


def main() -> None:
    print(HEAD)
    for name, checkpoint in RELEASED.items():
        print(row(name, checkpoint))


def row(name: str, checkpoint: Released) -> str:
    """A checkpoint's line of the table."""
    patches = checkpoint.config.vision.num_patches
    tokens = f"{patches:,}" if patches is not None else "112 to 4,096"
    sizes = [2 * checkpoint.parameters, quantized_bytes(checkpoint.config, 8), quantized_bytes(checkpoint.config, 4)]
    cells = [f"{checkpoint.parameters / 1e6:,.0f} M", tokens, *(f"{size / 1e9:.2f} GB" for size in sizes)]
    return f"| `{name}` | {' | '.join(cells)} |"


def quantized_bytes(config: AnyConfig, bits: int) -> int:
    """Bytes of the weights after `convert -q --q-bits BITS --dtype float16`."""
    model = build(config)
    section, quantizable, total = plan(model, resolve("affine", bits=bits)), layers(model), 0
    for name, shape in parameter_shapes(model).items():
        path, _, kind = name.rpartition(".")
        settings = settings_at(path, section) if kind == "weight" and path in quantizable else {}
        count = math.prod(shape)
        # A group has a scale and a bias of two bytes each.
        total += count * bits // 8 + 4 * count // settings["group_size"] if settings else 2 * count
    return total


if __name__ == "__main__":
    main()
