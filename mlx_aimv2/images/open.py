"""Opens whatever holds an image as an upright RGB image of 8 bits per colour: the one door for untrusted images.

path, bytes, open file, PIL image, array -> OpenImage: its size, before anything is decoded -> PIL image in mode RGB
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union, cast

import numpy as np

from mlx_aimv2.files import read_image_file, read_stream, reason_of
from mlx_aimv2.images.pixels import Box, flattened, from_array, turned, turned_box
from mlx_aimv2.images.trim import TrimError, orientation_in, trimmed

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

MAX_NAME = 300
"""Characters of a name that errors show: what is longer was hardly meant as one."""

BASE64_IMAGE = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkq|TU0AKg|Qk)[A-Za-z0-9+/_\-\s]{24,}={0,2}\s*")
"""JPEG, PNG, GIF, WebP, TIFF or BMP, written as text."""

END_OF_JPEG = b"\xff\xd9"

# Pillow reads these by starting another program, which a folder of untrusted images must not be able to do.
NOT_OPENED = {"EPS"}

# The brands by which a HEIC file names itself, after "ftyp" at byte 4.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}

OVERSAMPLING = 3
"""Fast decoding keeps so many pixels for each one that the resize leaves, along either side.

With two, the bundled photographs' features are 0.99988 of the exact ones on average (cosine, embedded checkpoint), with
three 0.99999; 12 megapixels are decoded at the same scale for 224 and for 448 pixels either way.
"""

PIXEL_BLOCKS = 4
"""Blocks, of 16 MB each, that Pillow keeps; eight are no faster than four."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is accepted of an untrusted image, and how a JPEG is decoded.

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
        copies = 1 if self.image.mode in ("RGB", "L") else 3
        coefficients = 6 * pixels if self.image.info.get("progressive") else 0  # 16 bits for each of three colours
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
            _load(image, name)
            return flattened(turned(image, self.orientation), name), box
        except MemoryError:
            raise ValueError(f"{name} does not fit in memory") from None


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they meet in a broken file
        raise ValueError(f"{name} cannot be read as an image: {error}") from None


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
    is_content = isinstance(image, (bytes, bytearray, memoryview))
    return f"image of {len(image)} bytes" if is_content else f"image ({type(image).__name__})"  # type: ignore[arg-type]


def to_rgb(image: ImageInput, *, policy: Policy = POLICY) -> Image.Image:
    """Any image -> PIL image in mode RGB: first frame, turned upright by its EXIF tag, transparency laid on white.

    16-bit greys keep their high byte (Pillow alone would cut them off at 255). Arrays are (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4) of uint8, uint16, bool, wider integers up to 65535, or float from 0 to 1. Raises ValueError
    or OSError with one line that names the image; warns of what is unusual about it.
    """
    opened = open_image(image, policy=policy)
    warn_of(opened)
    return opened.rgb()[0]


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
        return OpenImage(name, image, _orientation_of(image))
    if isinstance(image, (str, os.PathLike)):
        return _from_bytes(_content(image, name), name, policy)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(image), name, policy)
    if hasattr(image, "read"):
        try:
            return _from_bytes(read_stream(cast("BinaryIO", image)), name, policy)
        except OSError as error:
            raise type(error)(f"{name} {reason_of(error)}") from None
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
        raise type(error)(f"{name} {reason_of(error)}") from None


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


def _short(name: str, limit: int = MAX_NAME) -> str:
    return name if len(name) <= limit else f"{name[:40]}… ({len(name):,} characters)"


def _from_bytes(data: bytes, name: str, policy: Policy) -> OpenImage:
    if not data:
        raise ValueError(f"{name} is empty: no image in it")
    try:
        essential = trimmed(data)
    except TrimError as error:
        raise ValueError(f"{name} {error}") from None
    try:
        image = _identified(io.BytesIO(essential.data + END_OF_JPEG * essential.cut), name)
        _check_size(image.size, name, policy)
        note = _note_of_loss(essential.data, name, policy) if essential.cut else None
    except MemoryError:
        raise ValueError(f"{name} does not fit in memory") from None
    orientation = essential.orientation
    if orientation is None:
        orientation = _orientation_of(image)
    return OpenImage(name, image, orientation, policy.decode, [note] if note else [])


def _identified(stream: IO[bytes], name: str) -> Image.Image:
    """What Image.open does, without its DecompressionBombWarning: filters of warnings belong to all threads."""
    from PIL import Image

    start = stream.read(16).ljust(16, b"\0")  # some of Pillow's plugins unpack numbers without asking for its length
    tried, fault = set(NOT_OPENED), ""
    for prepare in (Image.preinit, Image.init):
        prepare()
        for kind in [kind for kind in Image.ID if kind not in tried]:
            tried.add(kind)
            make, accept = Image.OPEN[kind]
            # A string tells what Pillow was built without.
            if accept is not None and (isinstance(answer := accept(start), str) or not answer):
                continue
            try:
                stream.seek(0)
                return make(stream, name)
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                if accept is not None:  # it began as one of these, so this is the fault to tell
                    fault = fault or f"{kind}: {error}"
            except MemoryError:
                raise
            except Exception as error:
                raise ValueError(f"{name} cannot be read as an image: {error}") from None
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
        return _open_heic(stream, name)
    raise ValueError(
        f"{name} is a broken {fault}" if fault else f"{name} is not an image in a format that Pillow reads"
    )


def _open_heic(stream: IO[bytes], name: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise ValueError(f"{name} is a HEIC image: pip install 'mlx-aimv2[heic]' to read it") from None
    try:
        stream.seek(0)
        # A Pillow image that decodes when it is loaded, so that its size is checked before.
        return cast("Image.Image", pillow_heif.HeifImageFile(stream, name))
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from None


def _orientation_of(image: Image.Image) -> int:
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        try:
            image.load()  # Pillow turns a TIFF as it loads it, and a PNG's EXIF may follow its pixels
        except Exception:
            return 1  # rgb() will say what is wrong
        if image.format == "TIFF":
            return 1
    return orientation_in(image.info.get("exif"), image.info.get("xmp") or image.info.get("XML:com.adobe.xmp"))


def _note_of_loss(data: bytes, name: str, policy: Policy) -> str | None:
    """What is missing of a JPEG without its end, None if it is nothing; ValueError if it is too much."""
    share = _missing(data, name)
    if share is None:
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


def _missing(data: bytes, name: str) -> float | None:
    """The share of a JPEG's pixels that its data end before, 0 where only detail is missing, None where nothing is.

    Missing is what depends on the bytes that follow the data.
    """
    random = np.random.default_rng(0).integers(0, 255, 4096, np.uint8).tobytes()  # no 0xFF, so no marker
    for scale in (8, 1):  # one pixel a block says where the blocks end, and of a progressive JPEG nothing more
        levels = []
        for tail in (b"", random):
            image = _identified(io.BytesIO(data.rstrip(b"\xff") + tail + END_OF_JPEG), name)
            image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
            _load(image, name)
            levels.append(np.asarray(image))
        differs = (levels[0] != levels[1]).reshape(*levels[0].shape[:2], -1).any(axis=2)
        if differs.any():
            rows, first = len(differs), int(differs.any(axis=1).argmax())
            band = differs[first : first + 2]  # blocks come in rows of 16 pixels, the first of which is partly there
            return 0.0 if scale == 1 else (rows - first - len(band) * float(1 - band.any(axis=0).mean())) / rows
        if not image.info.get("progressive"):
            return None
    return None


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
