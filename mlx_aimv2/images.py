"""Opens whatever holds an image as an upright RGB image of 8 bits per colour: the one door for strangers' images.

path, bytes, open file, PIL image, array -> OpenImage: its size, before anything is decoded -> PIL image in mode RGB
"""

from __future__ import annotations

import io
import os
import re
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union, cast

import numpy as np

from mlx_aimv2.image_array import from_array
from mlx_aimv2.image_decode import Box, flattened, identify, turned, turned_box
from mlx_aimv2.image_file import read_image_file, read_stream
from mlx_aimv2.image_trim import TrimError, Trimmed, orientation_in, trimmed

if TYPE_CHECKING:
    import PIL.Image
    from PIL import Image

ImageInput: TypeAlias = Union[
    str, os.PathLike[str], bytes, bytearray, memoryview, BinaryIO, "PIL.Image.Image", np.ndarray[Any, Any]
]
"""An mx.array counts as a NumPy array. (`Union`, since `|` does not take the name of a class that is not loaded.)"""

DECODE = ("exact", "fast")
TRUNCATED = ("refuse", "accept")

SMALL_LOSS = 0.1
"""The share of a JPEG that may be missing at its end unless the policy says otherwise."""

LONGEST_NAME = 300
"""Characters of a name that errors show: what is longer was hardly meant as one."""

BASE64_IMAGE = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkq|TU0AKg|Qk)[A-Za-z0-9+/_\-\s]{24,}={0,2}\s*")
"""JPEG, PNG, GIF, WebP, TIFF or BMP, written as text."""

END_OF_JPEG = b"\xff\xd9"

OVERSAMPLING = 3
"""Fast decoding keeps so many pixels for each one that the resize leaves, along either side.

With two, the bundled photographs' features are 0.99988 of the exact ones on average (cosine, embedded checkpoint), with
three 0.99999; 12 megapixels are decoded at the same scale for 224 and for 448 pixels either way.
"""


PIXEL_BLOCKS = 4
"""Blocks, of 16 MB each, that Pillow keeps; eight are no faster than four."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is accepted of a stranger's image, and how a JPEG is decoded.

    `max_pixels`: more are refused before they are decoded; None for the number at which Pillow itself refuses, twice
    `PIL.Image.MAX_IMAGE_PIXELS` (178,956,970). `truncated`: "refuse" a JPEG whose data end before its last pixel,
    "accept" whatever is there, or None to accept where at most a tenth is missing; what is accepted has a note.
    `decode`: "exact", or "fast" to decode a JPEG at the smallest scale that keeps three times the pixels that are
    wanted, along each side.
    """

    max_pixels: int | None = None
    truncated: str | None = None
    decode: str = "exact"

    def __post_init__(self) -> None:
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels (--max-pixels) must be at least 1, got {self.max_pixels}")
        if self.truncated not in (None, *TRUNCATED):
            raise ValueError(f"truncated (--truncated) must be one of {', '.join(TRUNCATED)}, got {self.truncated!r}")
        if self.decode not in DECODE:
            raise ValueError(f"decode (--decode) must be one of {', '.join(DECODE)}, got {self.decode!r}")


POLICY = Policy()


@dataclass
class OpenImage:
    """An image whose size is known and whose pixels are not decoded yet.

    `size` is (width, height), upright. `notes` are what is unusual about it, each continuing a sentence that starts
    with its name.
    """

    name: str
    image: Image.Image
    orientation: int = 1
    is_progressive: bool = False
    decode: str = "exact"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        width, height = self.image.size
        if min(width, height) < 1:
            raise ValueError(f"{self.name} has {width}x{height} pixels: nothing to see")
        self.size = (height, width) if self.orientation >= 5 else (width, height)

    def scale(self, wanted: tuple[int, int] | None) -> int:
        """By what a JPEG's sides are divided as it is decoded, if `wanted` (width, height) is all that is asked for."""
        if wanted is None or self.decode != "fast" or self.image.format != "JPEG":
            return 1
        ratio = min(have / (OVERSAMPLING * want) for have, want in zip(self.size, wanted, strict=True))
        return next((scale for scale in (8, 4, 2) if ratio >= scale), 1)

    def decoding_bytes(self, wanted: tuple[int, int] | None = None) -> int:
        """About what decoding takes at its peak, beside the file: Pillow keeps four bytes a pixel."""
        pixels = self.size[0] * self.size[1]
        copies = 1 if self.image.mode in ("RGB", "L") else 2
        coefficients = 6 * pixels if self.is_progressive else 0  # 16 bits for each of three colours
        return 4 * copies * pixels // self.scale(wanted) ** 2 + coefficients

    def rgb(self, wanted: tuple[int, int] | None = None) -> tuple[Image.Image, Box | None]:
        """Decodes it: mode RGB, upright, transparency laid on white; and which part of it counts, None for the whole.

        `wanted` is the (width, height) that it will be resized to, which fast decoding need not exceed by far. Once
        only, since that frees what is not needed any more. Raises ValueError with one line that names the image.
        """
        image, name = self.image, self.name
        scale, box = self.scale(wanted), None
        try:
            if scale > 1:
                width, height = image.size
                image.draft(None, (width // scale, height // scale))
                if image.size != (width / scale, height / scale):
                    box = turned_box((width / scale, height / scale), image.size, self.orientation)
            image.load()
            if image.mode == "I" and image.format == "PNG":
                image = image.convert("I;16")  # older Pillows widen the 16 bits of a grey PNG
            image = turned(image, self.orientation)
        except MemoryError:
            raise ValueError(f"{name} does not fit in memory") from None
        except Exception as error:  # decoders raise whatever they meet in a broken file
            raise ValueError(f"{name} cannot be read as an image: {error}") from None
        try:
            return flattened(image, name), box
        except MemoryError:
            raise ValueError(f"{name} does not fit in memory") from None


def reuse_decoding_memory() -> None:
    """Lets Pillow keep up to `PIXEL_BLOCKS` blocks of freed pixels, for a program that decodes many large images.

    Without, Linux hands out every page of every image anew: a fifth of the time of decoding 12 megapixels exactly.
    PILLOW_BLOCKS_MAX, where the user has set it, stays.
    """
    from PIL import Image

    if "PILLOW_BLOCKS_MAX" not in os.environ:
        core: Any = Image.core  # type: ignore[attr-defined]
        core.set_blocks_max(PIXEL_BLOCKS)


def name_of(image: object) -> str:
    """What an error calls this image: its file where there is one."""
    if isinstance(image, (str, os.PathLike)):
        return _short(os.fspath(image))
    file = getattr(image, "filename", None) or getattr(image, "name", None)
    if isinstance(file, str) and file:
        return _short(file)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"image of {len(image)} bytes"
    return f"image ({type(image).__name__})"


def to_rgb(image: ImageInput, *, policy: Policy = POLICY, wanted: tuple[int, int] | None = None) -> Image.Image:
    """Any image -> PIL image in mode RGB: first frame, turned upright by its EXIF tag, transparency laid on white.

    16-bit greys keep their high byte (Pillow alone would cut them off at 255). Arrays are (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4) of uint8, uint16, bool, wider integers up to 65535, or float from 0 to 1. `wanted` is the
    (width, height) beyond which no detail is needed, for a policy that decodes fast. Raises ValueError or OSError with
    one line that names the image; warns of what is unusual about it.
    """
    opened = open_image(image, policy=policy)
    warn_of(opened)
    return opened.rgb(wanted)[0]


def warn_of(opened: OpenImage) -> None:
    """Gives each note as a warning."""
    for note in opened.notes:
        warnings.warn(f"{opened.name} {note}", stacklevel=3)


def open_image(image: ImageInput | OpenImage, *, policy: Policy = POLICY, name: str | None = None) -> OpenImage:
    """Any image -> OpenImage, checked against the policy. Raises ValueError or OSError with a line that names it.

    `name` is what errors call it, if not by the name it has.
    """
    from PIL import Image

    if isinstance(image, OpenImage):
        return image
    name = name_of(image) if name is None else name
    if isinstance(image, Image.Image):
        return _opened_by_caller(image, name)
    if isinstance(image, (str, os.PathLike)):
        return _from_bytes(_content(image, name), name, policy)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(image), name, policy)
    if hasattr(image, "read"):
        try:
            return _from_bytes(read_stream(cast("BinaryIO", image)), name, policy)
        except OSError as error:
            raise _named(error, name) from None
    array = as_array(image)
    if array is None:
        kind = type(image).__name__
        raise ValueError(f"an image is a path, bytes, an open file, a PIL image or an array, not {kind}")
    return OpenImage(name, from_array(array, name))


def as_array(thing: object) -> np.ndarray[Any, Any] | None:
    """NumPy's view of an array of any library, MLX's included; None for what is no array."""
    if isinstance(thing, np.ndarray):
        return thing
    if type(thing).__module__.partition(".")[0] == "mlx":
        import mlx.core as mx

        if isinstance(thing, mx.array):
            return np.array(thing.astype(mx.float32) if thing.dtype == mx.bfloat16 else thing)
    if hasattr(thing, "__array__") and hasattr(thing, "shape"):
        return np.asarray(thing)
    return None


def _content(path: str | os.PathLike[str], name: str) -> bytes:
    text = os.fspath(path)
    if isinstance(text, str):
        _check_is_path(text, name)
    try:
        return read_image_file(path)[1]
    except IsADirectoryError:
        raise IsADirectoryError(f"{name} is a folder: give the images in it") from None
    except OSError as error:
        if isinstance(text, str) and BASE64_IMAGE.fullmatch(text):
            raise ValueError(
                f"{_short(text, 40)} is an image as base64, not a file: give its bytes, base64.b64decode(text)"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{name} does not exist") from None
        raise _named(error, name) from None


def _named(error: OSError, name: str) -> OSError:
    if isinstance(error, PermissionError):
        return PermissionError(f"{name} may not be read: permission denied")
    if error.errno is None:
        return type(error)(f"{name} {error}")
    return OSError(f"{name} cannot be read: {error.strerror}")


def _check_is_path(text: str, name: str) -> None:
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise ValueError(f"{name} is an address: download it first and give the file")
    if scheme.startswith("data:"):
        raise ValueError(
            f"{_short(text, 40)} is a data URL, not a file: give its bytes, base64.b64decode(url.partition(',')[2])"
        )
    if scheme.startswith("file:///"):
        raise ValueError(f"{name} is an address: give the path alone, without file://")
    if "\0" in text:
        raise ValueError(f"{name!r} holds a NUL, which no path does: an image's content is given as bytes, not as text")


def _short(name: str, most: int = LONGEST_NAME) -> str:
    return name if len(name) <= most else f"{name[:40]}… ({len(name):,} characters)"


def _from_bytes(data: bytes, name: str, policy: Policy) -> OpenImage:
    if not data:
        raise ValueError(f"{name} is empty: no image in it")
    try:
        essential = trimmed(data)
    except TrimError as error:
        raise ValueError(f"{name} {error}") from None
    notes: list[str] = []
    try:
        if essential.cut and (note := _note_of_loss(essential, name, policy)):
            notes.append(note)
        end = END_OF_JPEG if essential.cut else b""
        image = identify(io.BytesIO(essential.data + end if end else essential.data), name)
        _check_size(image.size, name, policy)
    except MemoryError:
        raise ValueError(f"{name} does not fit in memory") from None
    orientation = essential.orientation
    if orientation is None:
        orientation = _orientation_of(image)
    return OpenImage(name, image, orientation, essential.is_progressive, policy.decode, notes)


def _opened_by_caller(image: Image.Image, name: str) -> OpenImage:
    """Of an image that is the caller's own, nothing is changed but that it is loaded."""
    if image.format == "TIFF" and min(image.size) > 0:
        try:
            image.load()  # Pillow turns a TIFF as it loads it
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {error}") from None
        return OpenImage(name, image)
    return OpenImage(name, image, _orientation_of(image))


def _orientation_of(image: Image.Image) -> int:
    """By what Pillow has kept of the file, without Pillow's own reading of EXIF, which gives up where a tag is bad."""
    raw = image.info.get("exif")
    if raw is None and image.format == "PNG":
        try:
            image.load()  # a PNG's EXIF may follow its pixels
        except Exception:
            return 1  # rgb() will say what is wrong
        raw = image.info.get("exif")
    return orientation_in(raw, image.info.get("xmp") or image.info.get("XML:com.adobe.xmp"))


def _note_of_loss(cut: Trimmed, name: str, policy: Policy) -> str | None:
    """What is missing of a JPEG without its end, None if it is nothing; ValueError if it is too much."""
    share = _missing(cut, name, policy, scale=8)  # one pixel a block says where the blocks end
    if not share and not (cut.is_progressive and _missing(cut, name, policy, scale=1)):
        return None
    lost = (
        f"about {max(1, round(100 * share))} % of its pixels are missing" if share else "its finest detail is missing"
    )
    if share > SMALL_LOSS if policy.truncated is None else policy.truncated == "refuse":
        raise ValueError(
            f"{name} cannot be read as an image: it ends early, {lost}; --truncated accept (truncated='accept') "
            "takes what is there"
        )
    return f"ends early: {lost}"


def _missing(cut: Trimmed, name: str, policy: Policy, *, scale: int) -> float:
    """The share of a JPEG's pixels that its data end before: from the first on that depends on what follows them."""
    random = np.random.default_rng(0).integers(0, 255, 4096, np.uint8).tobytes()  # no 0xFF, so no marker
    levels = []
    for tail in (b"", random):
        image: Any = identify(io.BytesIO(cut.data.rstrip(b"\xff") + tail + END_OF_JPEG), name)
        _check_size(image.size, name, policy)
        image.draft(None, (image.width // scale, image.height // scale))
        try:
            levels.append(np.asarray(image))
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {error}") from None
    differs = (levels[0] != levels[1]).reshape(*levels[0].shape[:2], -1).any(axis=2)
    # Blocks come in units of as many rows and columns as the colour that is sampled most has in them.
    rows, columns = (max(layer[axis] for layer in image.layer) * 8 // scale for axis in (1, 2))
    height, width = (-(-side // step) for side, step in zip(differs.shape, (rows, columns), strict=True))
    units = np.zeros((height * rows, width * columns), bool)
    units[: differs.shape[0], : differs.shape[1]] = differs
    flat = units.reshape(height, rows, width, columns).any(axis=(1, 3)).ravel()
    return float((flat.size - flat.argmax()) / flat.size) if flat.any() else 0.0


def _check_size(size: tuple[int, int], name: str, policy: Policy) -> None:
    """Refuses a decompression bomb before it is decoded."""
    from PIL import Image

    limit = policy.max_pixels
    if limit is None and Image.MAX_IMAGE_PIXELS is not None:
        limit = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow refuses; it only warns before that
    width, height = size
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{name} has {width}x{height} pixels, more than {limit:,}: make it smaller, or raise the limit if you "
            "trust it, with --max-pixels (max_pixels)"
        )
