"""Measures what fewer bits cost, rounded plainly and with calibration: fidelity, size, search and recall of names.

`python -m benchmarks.quantization`: converts the pair that ships, float16, in each mode and by each method. All are
judged by every second one of the 300 bundled emoji: the mean of 1 - cosine of the tokens and of the text vectors, how
many of the ten nearest images stay the same, and how many of these emoji find their own name first among the 300.
gptq is calibrated on crops of bundled photographs, and on the other half of the emoji ("of the kind").

`python -m benchmarks.quantization ENCODER OF_THE_KIND HELD_OUT`: another encoder, with a folder of images of its kind
to calibrate on and one to judge.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np

from mlx_aimv2 import Aimv2Model, Aimv2Processor, bundled, load
from mlx_aimv2.conversion.fidelity import choose_images, compare
from mlx_aimv2.convert import convert
from mlx_aimv2.quantize import RECIPES
from tools.train_emoji import embed_images, embed_texts

BITS = (8, 6, 5, 4, 3, 2)
CASES = {
    "dense": {},
    **{f"{bits} bit": {"quantize": True, "q_bits": bits} for bits in BITS},
    **{mode: {"quantize": True, "q_mode": mode} for mode in ("mxfp8", "mxfp4", "nvfp4")},
    **{recipe: {"quantize": True, "quant_predicate": recipe} for recipe in RECIPES},
    **{f"{bits} bit gptq": {"quantize": True, "q_bits": bits, "q_method": "gptq"} for bits in BITS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("own", nargs="*", type=Path, metavar="ENCODER OF_THE_KIND HELD_OUT")
    own = parser.parse_args().own
    print(f"{'':<20} {'bits/weight':>11} {'tokens':>9} {'texts':>9} {'nearest':>8} {'name':>8}   (1 - cosine)")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if own:
            source, kind, held_out = own[0], own[1], choose_images(own[2], limit=None)
        else:
            source, kind, held_out = bundled.emoji_checkpoint(), place / "kind", list(bundled.emoji_images())[1::2]
            kind.mkdir()
            for file in list(bundled.emoji_images())[::2]:
                shutil.copy(file, kind)
        cases = CASES | {
            f"{name}, of the kind": options | {"calibration": kind}
            for name, options in CASES.items()
            if "q_method" in options
        }
        for name, options in cases.items():
            result = convert(source, place / "mlx", dtype="float16", verify=False, overwrite=True, **options)
            report(name, compare(source, result, images=held_out), None if own else recall_of(result))


def report(name: str, found: dict, named: float | None) -> None:
    """A line of the table."""
    token, text = (1 - found[key]["mean"] if key in found else np.nan for key in ("token_cosine", "text_cosine"))
    line = f"{name:<26} {found['model']['bits_per_weight']:>5.2f} {token:>9.2e} {text:>9.2e}"
    print(line, f"{found['nearest_in_common']:>8.1%}", "" if named is None else f"{named:>8.1%}", flush=True)


def recall_of(folder: Path) -> float:
    """How many of the emoji that judge find their own name first among all."""
    scores = name_scores(*load(folder, dtype="float32"))
    return float((scores.argmax(axis=1) == np.arange(len(scores)))[1::2].mean())


def name_scores(model: Aimv2Model, processor: Aimv2Processor) -> np.ndarray:
    """The cosine of each bundled emoji and each one's name, `(300, 300)`."""
    names = bundled.emoji_images()
    return embed_images(model, processor, list(names)) @ embed_texts(model, processor, list(names.values())).T


if __name__ == "__main__":
    main()
