"""How do images become pixels and texts become ids, just as this checkpoint wants them?

image -> images.to_rgb -> resize, crop, scale, normalise -> (H, W, 3) -> batch (B, H, W, 3)
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import mlx.core as mx
import numpy as np

from mlx_aimv2 import preprocessing as reading
from mlx_aimv2.config import Aimv2Config
from mlx_aimv2.images import ImageInput, name_of, to_rgb
from mlx_aimv2.preprocessing import Preprocessing
from mlx_aimv2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from mlx_aimv2.config import Aimv2VisionConfig

# Resizing the shortest edge of a ribbon 1 pixel wide would make gigabytes of it before the crop.
MAX_RESIZED_PIXELS = 1 << 27

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


class Aimv2Processor:
    """Images to pixels, texts to ids."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        patch_size: int = 14,
        tokenizer: Tokenizer | None = None,
        no_tokenizer: str | None = None,
    ) -> None:
        """`no_tokenizer` is what `tokenize` says where a text encoder's tokenizer files are missing."""
        final = preprocessing.final_size
        if final is not None and min(final) < patch_size:
            raise ValueError(
                f"images of {final[0]}x{final[1]} pixels are less than one patch of {patch_size}x{patch_size}"
            )
        self.preprocessing = preprocessing
        self.patch_size = patch_size
        self.tokenizer = tokenizer
        self._no_tokenizer = no_tokenizer

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], *, config: Aimv2Config | Aimv2VisionConfig | None = None
    ) -> Aimv2Processor:
        """The processor that the files in `folder` describe; `config` is the model's, whose sizes must agree."""
        folder = Path(folder)
        vision = config.vision_config if isinstance(config, Aimv2Config) else config
        text = config.text_config if isinstance(config, Aimv2Config) else None
        preprocessing = reading.read(folder, config=vision)
        wanted = None if vision is None else vision.image_size
        final = preprocessing.final_size
        if wanted is not None and final is not None and final != (wanted, wanted):
            raise ValueError(
                f"{folder}: images are prepared as {final[0]}x{final[1]}, but the model takes {wanted}x{wanted}"
            )
        tokenizer, missing = None, None
        if text is not None:
            try:
                tokenizer = Tokenizer.from_folder(folder, config=text)
            except FileNotFoundError as error:
                missing = str(error)
        patch = 14 if vision is None else vision.patch_size
        return cls(preprocessing, patch_size=patch, tokenizer=tokenizer, no_tokenizer=missing)

    @property
    def is_native(self) -> bool:
        """Whether images keep their own size."""
        return self.preprocessing.resize is None and self.preprocessing.crop is None

    def __call__(self, images: ImageInput | Sequence[ImageInput], *, max_patches: int | None = None) -> mx.array:
        """One image or several -> (B, H, W, 3) float32; ValueError where their final sizes differ.

        A native checkpoint takes images as large as they are, at a cost that grows with the square of their pixels:
        with `max_patches` larger ones are scaled down in their shape. It changes nothing for the other checkpoints.
        """
        batch = _as_list(images)
        if not batch:
            raise ValueError("no image to prepare: give one, or a list of them")
        arrays = self._all_pixels(batch, max_patches)
        first: dict[tuple[int, ...], int] = {}
        for number, array in enumerate(arrays):
            first.setdefault(array.shape, number)
        if len(first) > 1:
            sizes = ", ".join(f"{h}x{w} ({name_of(batch[n])}, image {n})" for (h, w, _), n in first.items())
            raise ValueError(f"images of one batch must end up equal in size, these do not: {sizes}; give one per call")
        return mx.array(np.stack(arrays))

    def pixels(self, image: ImageInput, *, max_patches: int | None = None) -> Pixels:
        """An image -> (H, W, 3) float32, contiguous. Uses Pillow and NumPy alone, so any thread may call it."""
        name = name_of(image)
        image = to_rgb(image)
        if image.size == (1, 1):
            raise ValueError(f"{name} is a single pixel: nothing to see")
        image = self._sized(image, name)
        patch = self.patch_size
        if max_patches is not None and self.is_native:
            image = self._shrunk(image, max_patches, name)
        if min(image.size) < patch:
            raise ValueError(f"{name} has {image.height}x{image.width} pixels, less than one patch of {patch}x{patch}")
        return _scaled(np.asarray(image), self.preprocessing)

    def tokenize(self, texts: str | Sequence[str]) -> mx.array:
        """Texts -> ids (B, L) int32: BOS, tokens, EOS, filled with EOS, at most the encoder's context."""
        if self._no_tokenizer is not None:
            raise FileNotFoundError(self._no_tokenizer)
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no text encoder: load apple/aimv2-large-patch14-224-lit for text")
        return mx.array(self.tokenizer(texts))

    def save_to(self, folder: str | os.PathLike[str]) -> None:
        """Writes preprocessor_config.json into `folder`, as CLIPImageProcessor spells it."""
        file = Path(folder) / "preprocessor_config.json"
        file.write_text(
            json.dumps(reading.to_clip(self.preprocessing), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )

    def _all_pixels(self, batch: list[ImageInput], max_patches: int | None) -> list[Pixels]:
        if len(batch) == 1:
            return [self.pixels(batch[0], max_patches=max_patches)]
        # An open file or a PIL image may occur twice in a list, and neither is for two threads at once.
        apart = all(isinstance(image, (str, os.PathLike, bytes)) for image in batch)
        with ThreadPoolExecutor(min(len(batch), os.cpu_count() or 1) if apart else 1) as pool:
            return list(pool.map(self._numbered_pixels, range(len(batch)), batch, [max_patches] * len(batch)))

    def _numbered_pixels(self, number: int, image: ImageInput, max_patches: int | None) -> Pixels:
        try:
            return self.pixels(image, max_patches=max_patches)
        except OSError as error:
            raise type(error)(f"image {number}: {error}") from None
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from None

    def _shrunk(self, image: Image.Image, max_patches: int, name: str) -> Image.Image:
        """The image scaled down in its shape until it has at most `max_patches` patches."""
        patch = self.patch_size
        if (image.width // patch) * (image.height // patch) <= max_patches:
            return image
        scale = (max_patches * patch * patch / (image.width * image.height)) ** 0.5
        width, height = int(image.width * scale), int(image.height * scale)
        if min(width, height) < patch:
            raise ValueError(
                f"{name} has {image.height}x{image.width} pixels: "
                f"scaled to {max_patches} patches it is narrower than one patch"
            )
        return image.resize((width, height), self.preprocessing.resample)

    def _sized(self, image: Image.Image, name: str) -> Image.Image:
        steps = self.preprocessing
        if steps.resize is not None:
            height, width = _resized(image.height, image.width, steps.resize)
            if height * width > max(MAX_RESIZED_PIXELS, image.width * image.height):
                raise ValueError(
                    f"{name} of {image.height}x{image.width} pixels is too narrow: it would grow to {height}x{width}"
                )
            image = image.resize((width, height), steps.resample)
        if steps.crop is not None:
            height, width = steps.crop
            top, left = (image.height - height) // 2, (image.width - width) // 2
            # Beyond the image's edge crop() gives black.
            image = image.crop((left, top, left + width, top + height))
        return image


def _resized(height: int, width: int, size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) after the resize; the longer edge is rounded down, as in transformers."""
    if isinstance(size, tuple):
        return size
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def _scaled(levels: np.ndarray[Any, np.dtype[np.uint8]], steps: Preprocessing) -> Pixels:
    """(H, W, 3) uint8 -> (H, W, 3) float32, rescaled and normalised."""
    height, width, channels = levels.shape
    # A row of W * 3 numbers in one go: NumPy is several times slower where the last axis is 3.
    values = levels.reshape(height, width * channels).astype(np.float32)
    if steps.rescale_factor is not None:
        # x / 255 is exact where x * (1 / 255) in float32 is not.
        values /= np.float32(1 / steps.rescale_factor)
    if steps.image_mean is not None and steps.image_std is not None:
        values -= np.tile(np.array(steps.image_mean, np.float32), width)
        values /= np.tile(np.array(steps.image_std, np.float32), width)
    return values.reshape(height, width, channels)


def _as_list(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    if isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4):
        return list(images)
    return [cast("ImageInput", images)]
