"""Prepares images as pixels and texts as ids, just as this checkpoint wants them.

image -> images.open_image -> resize, crop -> levels (H, W, 3) uint8 -> scale, normalise -> batch (B, H, W, 3) float32
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from mlx_aimv2.backend.device import check_process
from mlx_aimv2.config import Aimv2Config
from mlx_aimv2.habits import AnswersHabits
from mlx_aimv2.images.open import ImageInput, Levels, OpenImage, Policy, as_array, name_of, open_image, warn_of
from mlx_aimv2.images.preprocessing import Preprocessing, read_preprocessing, to_clip
from mlx_aimv2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_aimv2.config import Aimv2VisionConfig

# Resizing the shortest edge of a ribbon 1 pixel wide would make gigabytes of it before the crop.
MAX_RESIZED_PIXELS = 1 << 27

MAX_ASKED_PATCHES = 1 << 16
"""Patches that the files of a checkpoint that takes any size may ask for: 16 times what Apple's was trained on."""


class Aimv2Processor(AnswersHabits):
    """Images to pixels, texts to ids."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        patch_size: int = 14,
        tokenizer: Tokenizer | None = None,
        no_tokenizer: str | None = None,
        any_size: bool | None = None,
    ) -> None:
        """`no_tokenizer` is what `tokenize` says where a text encoder's tokenizer files are missing.

        `any_size` says that the model takes images of any size, so that `max_patches` counts; None: where images keep
        their own size.
        """
        final = preprocessing.final_size
        if final is not None and min(final) < patch_size:
            raise ValueError(
                f"images of {final[0]}x{final[1]} pixels are less than one patch of {patch_size}x{patch_size}"
            )
        self.any_size = (preprocessing.resize is None and preprocessing.crop is None) if any_size is None else any_size
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
        preprocessing = read_preprocessing(folder, config=vision)
        wanted = None if vision is None else vision.image_size
        final = preprocessing.final_size
        if wanted is not None and final is not None and final != (wanted, wanted):
            raise ValueError(
                f"{folder}: images are prepared as {final[0]}x{final[1]}, but the model takes {wanted}x{wanted}: mend "
                "size and crop_size in its preprocessor_config.json"
            )
        patch = 14 if vision is None else vision.patch_size
        any_size = wanted is None if vision is not None else None
        asked = preprocessing.crop or preprocessing.resize or 0
        height, width = asked if isinstance(asked, tuple) else (asked, asked)
        if any_size and (patches := (height // patch) * (width // patch)) > MAX_ASKED_PATCHES:
            raise ValueError(
                f"{folder}: its preprocessor_config.json asks for {height}x{width} pixels, {patches:,} patches of "
                f"every image; at most {MAX_ASKED_PATCHES:,} are taken: mend that file (Apple's native checkpoint sets "
                "do_resize and do_center_crop to false)"
            )
        tokenizer, missing = None, None
        if text is not None:
            try:
                tokenizer = Tokenizer.from_folder(folder, config=text)
            except FileNotFoundError as error:
                missing = str(error)
        return cls(preprocessing, patch_size=patch, tokenizer=tokenizer, no_tokenizer=missing, any_size=any_size)

    def at_size(self, size: int, *, whole: bool = False) -> Aimv2Processor:
        """The same for square images of `size` pixels a side: the same share is cut, or with `whole` all squashed."""
        steps, sized = self.preprocessing, copy.copy(self)

        def scaled(side: int) -> int:  # more than `size` where timm's crop_pct is below 1
            return side * size // min(steps.final_size or (side,))

        resize = steps.resize or min(steps.final_size or (size,))
        if whole:
            resize = (size, size)
        else:
            resize = (scaled(resize[0]), scaled(resize[1])) if isinstance(resize, tuple) else scaled(resize)
        sized.preprocessing, sized.any_size = replace(steps, resize=resize, crop=(size, size)), False
        return sized

    @property
    def is_native(self) -> bool:
        """Whether images keep their own size."""
        return self.preprocessing.resize is None and self.preprocessing.crop is None

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) of every image, where all have one size, as `loading.at_size` sees to it."""
        if (size := self.preprocessing.final_size) is None:
            raise ValueError("images of one batch need one size: make the processor with loading.at_size")
        return size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of every image, where all have one size."""
        height, width = self.canvas
        return height // self.patch_size, width // self.patch_size

    def __repr__(self) -> str:
        steps = self.preprocessing
        size = "images keep their size" if steps.final_size is None else "{}x{} pixels".format(*steps.final_size)
        numbers = {"mean": steps.image_mean, "deviation": steps.image_std}
        rounded = (f"{name} {tuple(round(one, 4) for one in three or ())}" for name, three in numbers.items())
        return f"Aimv2Processor({size}, patches of {self.patch_size}x{self.patch_size}, {', '.join(rounded)})"

    def __call__(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        max_patches: int | None = None,
        decode: str = "exact",
        max_pixels: int | None = None,
        truncated: str = "accept",
    ) -> mx.array:
        """One image or several -> (B, H, W, 3) float32; ValueError where their final sizes differ.

        An image is a path, bytes, an open file, a PIL image or an array (H, W, C) of NumPy or MLX; several are any
        iterable of them, or an array (B, H, W, C). A native checkpoint takes images as large as they are, at a cost
        that grows with the square of their pixels: with `max_patches` larger ones are scaled down in their shape.
        `decode`, `max_pixels` and `truncated` are `images.Policy`'s.
        """
        policy = Policy(decode=decode, max_pixels=max_pixels, truncated=truncated)
        batch = as_list(images)
        if not batch:
            raise ValueError("no image to prepare: give one, or a list of them")

        def levels(number: int, image: ImageInput) -> Levels:
            try:
                opened = open_image(image, policy=policy)
                warn_of(opened)
                return self.levels(opened, max_patches=max_patches)
            except (OSError, ValueError) as error:
                if len(batch) == 1:
                    raise
                raise (type(error) if isinstance(error, OSError) else ValueError)(f"image {number}: {error}") from None

        with ThreadPoolExecutor(min(len(batch), os.cpu_count() or 1) if are_apart(batch) else 1) as pool:
            arrays = list(pool.map(levels, range(len(batch)), batch))
        first: dict[tuple[int, ...], int] = {}
        for number, array in enumerate(arrays):
            first.setdefault(array.shape, number)
        if len(first) > 1:
            sizes = ", ".join(f"{h}x{w} ({name_of(batch[n])}, image {n})" for (h, w, _), n in first.items())
            raise ValueError(f"images of one batch must end up equal in size, these do not: {sizes}; give one per call")
        batch_of_pixels = self.normalised(mx.array(np.stack(arrays)))
        mx.eval(batch_of_pixels)  # a lazy array could be read in this thread alone
        return batch_of_pixels

    def pixels(self, image: ImageInput, *, max_patches: int | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """An image -> (H, W, 3) float32, for NumPy."""
        return np.array(self([image], max_patches=max_patches))[0]

    def levels(self, opened: OpenImage, *, max_patches: int | None = None) -> Levels:
        """An image -> (H, W, 3) uint8, resized and cropped, which `normalised` makes pixels of."""
        if opened.size == (1, 1):
            raise ValueError(f"{opened.name} is a single pixel: nothing to see")
        steps, name = self.preprocessing, opened.name
        width, height = size = self._size(opened, max_patches)
        image, box = opened.rgb(size if size != opened.size else None)
        if size != image.size or box is not None:
            image = image.resize(size, steps.resample, box=box)
        if steps.crop is not None:
            height, width = steps.crop
            top, left = (image.height - height) // 2, (image.width - width) // 2
            # Beyond the image's edge crop() gives black.
            image = image.crop((left, top, left + width, top + height))
        patch = self.patch_size
        if min(image.size) < patch:
            raise ValueError(f"{name} has {image.height}x{image.width} pixels, less than one patch of {patch}x{patch}")
        return np.asarray(image)

    def decoding_bytes(self, opened: OpenImage, *, max_patches: int | None = None) -> int:
        """About the memory that `levels` takes for an image, beside its file."""
        size = self._size(opened, max_patches)
        return opened.decoding_bytes(size if size != opened.size else None) + 4 * size[0] * size[1]

    def normalised(self, levels: mx.array) -> mx.array:
        """Levels (B, H, W, 3) uint8 -> pixels (B, H, W, 3) float32, rescaled and normalised, on the device."""
        check_process()
        steps = self.preprocessing
        pixels = levels.astype(mx.float32)
        if steps.rescale_factor is not None:  # x / 255 is exact where x * (1 / 255) in float32 is not
            pixels = pixels / mx.array(1 / steps.rescale_factor, mx.float32)
        if steps.image_mean is not None and steps.image_std is not None:
            pixels = (pixels - mx.array(steps.image_mean)) / mx.array(steps.image_std)
        return pixels

    def tokenize(self, texts: str | Sequence[str]) -> mx.array:
        """Texts -> ids (B, L) int32: BOS, tokens, EOS, filled with EOS, at most the encoder's context."""
        if self._no_tokenizer is not None:
            raise FileNotFoundError(self._no_tokenizer)
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no text encoder: load apple/aimv2-large-patch14-224-lit for text")
        return mx.array(self.tokenizer(texts))

    def save_to(self, folder: str | os.PathLike[str]) -> None:
        """Writes preprocessor_config.json into `folder`, as CLIPImageProcessor spells it."""
        text = json.dumps(to_clip(self.preprocessing), indent=2, sort_keys=True)
        (Path(folder) / "preprocessor_config.json").write_text(f"{text}\n", encoding="utf-8")

    def _size(self, opened: OpenImage, max_patches: int | None) -> tuple[int, int]:
        """(width, height) that the image is resized to, before the crop."""
        steps, name, patch = self.preprocessing, opened.name, self.patch_size
        if max_patches is not None and max_patches < 1:
            raise ValueError(f"max_patches (--max-patches) must be at least 1, got {max_patches}")
        width, height = opened.size
        if isinstance(steps.resize, tuple):
            height, width = steps.resize
        elif steps.resize is not None:  # the longer edge is rounded down, as in transformers
            shortest = min(width, height)
            width, height = int(steps.resize * width / shortest), int(steps.resize * height / shortest)
        rows, columns = (length // patch for length in steps.crop or (height, width))
        if self.any_size and max_patches is not None and rows * columns > max_patches:
            if not self.is_native:
                final = steps.crop or (height, width)
                raise ValueError(
                    f"{name} would have {rows * columns:,} patches, since the checkpoint's preprocessor_config.json "
                    f"asks for {final[0]}x{final[1]} pixels, but max_patches (--max-patches) is {max_patches:,}: "
                    "change one of them"
                )
            scale = (max_patches * patch * patch / (width * height)) ** 0.5
            width, height = int(width * scale), int(height * scale)
            if min(width, height) < patch:
                raise ValueError(
                    f"{name} has {opened.size[1]}x{opened.size[0]} pixels: scaled to {max_patches} patches it is "
                    "narrower than one patch"
                )
        if height * width > max(MAX_RESIZED_PIXELS, opened.size[0] * opened.size[1]):
            raise ValueError(
                f"{name} of {opened.size[1]}x{opened.size[0]} pixels is too narrow: it would grow to {height}x{width}"
            )
        return width, height


def as_list(images: ImageInput | Iterable[ImageInput]) -> list[ImageInput]:
    """One image or several -> list of images: what is a path, bytes, a file, a PIL image or (H, W, C) is one."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, dict)) or hasattr(images, "read"):
        return [cast("ImageInput", images)]
    if hasattr(images, "getbands"):  # a PIL image, which offers itself as an array too
        return [cast("ImageInput", images)]
    array = as_array(images)
    if array is not None:
        if array.ndim == 4 or (array.ndim == 1 and array.dtype.kind in "OU"):  # a batch, or a column of paths
            return list(array)
        return [array]
    if isinstance(images, Iterable):
        return list(images)
    return [cast("ImageInput", images)]


def are_apart(images: Iterable[ImageInput]) -> bool:
    """Whether threads may read these at once: an open file or a PIL image may occur twice in a list."""
    return all(isinstance(image, (str, os.PathLike, bytes)) for image in images)
