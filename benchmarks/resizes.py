"""Measures how far the vector of a photograph moves when another filter than Pillow's bicubic one resizes it.

An app resizes with what its system has. Of each photograph the whole is resized to the shortest edge and the middle cut
out, as the checkpoint's processor does, by other filters; the cosine of the two vectors says how far they are apart.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from PIL import Image

from mlx_aimv2 import bundled, load
from mlx_aimv2.images.preprocessing import RESAMPLE
from mlx_aimv2.images.processor import Aimv2Processor

NEIGHBOURS = "bilinear without antialiasing"
"""As OpenCV's INTER_LINEAR and many GPUs' texture units: two by two pixels, however much smaller the result is."""


def main() -> None:
    """Prints the smallest and the mean cosine for each filter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(bundled.emoji_checkpoint()), help="default: the bundled pair")
    parser.add_argument("images", nargs="*", default=bundled.photographs(), help="default: the bundled photographs")
    arguments = parser.parse_args()
    model, processor = load(arguments.model, dtype="float32")
    images = [Image.open(file).convert("RGB") for file in arguments.images]
    wanted = np.array(model.encode_image(processor(images), normalize=True))
    for name in ("lanczos", "hamming", "bilinear", "box", NEIGHBOURS, "nearest"):
        if name == NEIGHBOURS:
            pixels = processor([_without_antialiasing(image, processor) for image in images])
        else:
            steps = replace(processor.preprocessing, resample=RESAMPLE[name])
            pixels = Aimv2Processor(steps, patch_size=processor.patch_size)(images)
        found = np.array(model.encode_image(pixels, normalize=True))
        cosines = (found * wanted).sum(axis=1)
        print(f"{name:<30} min {cosines.min():.4f} mean {cosines.mean():.4f}")


def _without_antialiasing(image: Image.Image, processor: Aimv2Processor) -> Image.Image:
    """The image with its shortest edge as long as the checkpoint wants it, which the processor only crops then."""
    scale = min(image.size) / min(processor.canvas)
    size = (int(image.width / scale), int(image.height / scale))
    steps = (image.width / size[0], 0, 0, 0, image.height / size[1], 0)
    return image.transform(size, Image.Transform.AFFINE, steps, Image.Resampling.BILINEAR)


if __name__ == "__main__":
    main()
