"""Opens any image source as an upright RGB image of 8 bits per colour: the single entry for untrusted images.

path, bytes, open file, PIL image, array -> OpenImage: its size, before anything is decoded -> PIL image in mode RGB
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union, cast

import numpy as np

from mlx_aimv2.files import read_image_file, read_stream, reason_of
from mlx_aimv2.images.metadata import date_in, orientation_in, trimmed
from mlx_aimv2.images.raw import read_raw

if TYPE_CHECKING:
    import PIL.Image
    from PIL import Image

ImageInput: TypeAlias = Union[
    str, os.PathLike[str], bytes, bytearray, memoryview, BinaryIO, "PIL.Image.Image", np.ndarray[Any, Any]
]
"""An mx.array counts as a NumPy array. (`Union`, since `|` does not accept the name of a class not yet loaded.)"""

Levels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom of the valid part of an image: decoding at a scale may add a border."""

DECODE = ("exact", "fast")
TRUNCATED = ("accept", "refuse")

ENDS_EARLY = "ends early: what is missing is grey, or blurred"
"""The note on a truncated JPEG; if it is progressive, detail is missing everywhere."""

MAX_NAME = 300
"""Characters of a name that errors show: anything longer was hardly meant as a name."""

ADDRESSES = {
    **dict.fromkeys(("http://", "https://"), "is a URL: download it first and give the file"),
    "file:///": "is a URL: give only the path, without file://",
    "data:": "is a data URL, not a file: give its bytes, base64.b64decode(url.partition(',')[2])",
}
"""Starts of texts that are not paths -> what to do with them."""

BASE64_IMAGE = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkq|TU0AKg|Qk)[A-Za-z0-9+/_\-\s]{24,}={0,2}\s*")
"""JPEG, PNG, GIF, WebP, TIFF or BMP, encoded as text."""

END_OF_JPEG = b"\xff\xd9"

# Pillow reads these by starting another program, which untrusted images must not be able to trigger.
NOT_OPENED = {"EPS"}

HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
"""Brands of HEIC files, after "ftyp" at byte 4."""

OVERSAMPLING = 3
"""Fast decoding keeps this many pixels for each one after the resize, along either side.

With two, the bundled photographs' features have a mean cosine of 0.99988 with the exact ones (embedded checkpoint),
with three 0.99999; 12 megapixels are decoded at the same scale for 224 and for 448 pixels either way.
"""

TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
"""EXIF's orientations from 2 on, as Pillow's operations."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is accepted from an untrusted image, and how a JPEG is decoded.

    `max_pixels`: larger images are refused before decoding; None for twice `PIL.Image.MAX_IMAGE_PIXELS` (178,956,970),
    as in Pillow. `truncated`: "accept" a truncated JPEG, with a note, or "refuse" it. `decode`: "exact", or "fast" for
    a JPEG at the smallest scale that keeps three times the wanted pixels along each side.
    """

    max_pixels: int | None = None
    truncated: str = "accept"
    decode: str = "exact"

    def __post_init__(self) -> None:
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels (--max-pixels) must be at least 1, got {self.max_pixels}")
        for name, known in (("truncated", TRUNCATED), ("decode", DECODE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} (--{name}) must be one of {', '.join(known)}, got {getattr(self, name)!r}")


POLICY, FAST = Policy(), Policy(decode="fast")
"""Exact, full-size decoding; and the policy for many photographs, for features and thumbnails."""


@dataclass
class OpenImage:
    """An image with a known size whose pixels are not decoded yet.

    `size` is (width, height), upright. `notes` are what is unusual about it, each continuing a sentence that starts
    with its name. `taken` is the day from its EXIF, 2024-05-17 or "".
    """

    name: str
    image: Image.Image
    orientation: int = 1
    decode: str = "exact"
    notes: list[str] = field(default_factory=list)
    taken: str = ""

    def __post_init__(self) -> None:
        width, height = self.image.size
        if min(width, height) < 1:
            raise ValueError(f"{self.name} has {width}x{height} pixels: nothing to see")
        self.size = (height, width) if self.orientation >= 5 else (width, height)

    def scale(self, wanted: tuple[int, int] | None) -> int:
        """The divisor of a JPEG's sides while decoding, if only `wanted` (width, height) is needed."""
        if wanted is None or self.decode != "fast" or self.image.format != "JPEG":
            return 1
        ratio = min(have / (OVERSAMPLING * want) for have, want in zip(self.size, wanted, strict=True))
        return next((scale for scale in (8, 4, 2) if ratio >= scale), 1)

    def decoding_bytes(self, wanted: tuple[int, int] | None = None) -> int:
        """Approximate peak memory of decoding, besides the file: Pillow keeps four bytes per pixel."""
        pixels = self.size[0] * self.size[1]
        copies = 4 if self.image.format == "WEBP" else 1 if self.image.mode in ("RGB", "L") else 3  # measured
        coefficients = 6 * pixels if self.image.info.get("progressive") else 0  # 16 bits for each of three colours
        return 4 * copies * pixels // self.scale(wanted) ** 2 + coefficients

    def rgb(self, wanted: tuple[int, int] | None = None) -> tuple[Image.Image, Box | None]:
        """Decodes it, once: mode RGB, upright, transparency on white; and its valid part, None for all of it.

        `wanted` is the (width, height) it will be resized to, which fast decoding need not exceed by far. Raises
        ValueError with one line that names the image.
        """
        image, name = self.image, self.name
        scale, box = self.scale(wanted), None
        try:
            if scale > 1:
                width, height = image.size
                image.draft(None, (width // scale, height // scale))
                if image.size != (width / scale, height / scale):
                    box = turned_box((width / scale, height / scale), image.size, self.orientation)
            try:
                image.load()
            except MemoryError:
                raise
            except Exception as error:  # decoders raise whatever they meet in a broken file
                raise ValueError(f"{name} cannot be read as an image: {error}") from None
            return flattened(turned(image, self.orientation), name), box
        except MemoryError:
            raise ValueError(f"{name} does not fit in memory") from None


def _orientation_of(image: Image.Image) -> int:
    return orientation_in(image.info.get("exif"), image.info.get("xmp") or image.info.get("XML:com.adobe.xmp"))


def name_of(image: object) -> str:
    """The name of this image in errors: its file if it has one."""
    if isinstance(image, (str, os.PathLike)):
        return _short(os.fspath(image))
    file = getattr(image, "filename", None) or getattr(image, "name", None)
    if isinstance(file, str) and file:
        return _short(file)
    if hasattr(image, "read"):
        return "the open file"
    is_content = isinstance(image, (bytes, bytearray, memoryview))
    return f"image of {len(image)} bytes" if is_content else f"image ({type(image).__name__})"  # type: ignore[arg-type]


def to_rgb(image: ImageInput, *, policy: Policy = POLICY) -> Image.Image:
    """Any image -> PIL image in mode RGB: first frame, turned upright by its EXIF tag, transparency on white.

    16-bit greys keep their high byte (Pillow alone would cut them off at 255). Arrays are as in `from_array`. Raises
    ValueError or OSError with one line that names the image; warns about anything unusual.
    """
    opened = open_image(image, policy=policy)
    warn_of(opened)
    return opened.rgb()[0]


def warn_of(opened: OpenImage) -> None:
    """Issues each note as a warning."""
    for note in opened.notes:
        warnings.warn(f"{opened.name} {note}", stacklevel=3)


def open_image(image: ImageInput | OpenImage, *, policy: Policy = POLICY, name: str | None = None) -> OpenImage:
    """Any image -> OpenImage, checked against the policy. Raises ValueError or OSError with a line that names it."""
    from PIL import Image

    if isinstance(image, OpenImage):
        return image
    name = name_of(image) if name is None else name
    if isinstance(image, Image.Image):
        with contextlib.suppress(Exception):  # rgb() will report it
            image.load()  # Pillow rotates a TIFF while loading it, and a PNG's EXIF may follow its pixels
        return OpenImage(name, image, 1 if image.format == "TIFF" else _orientation_of(image))
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
    """NumPy's view of an array of any library, MLX included; None for anything else."""
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
        for start, reason in ADDRESSES.items():
            if text[:8].lower().startswith(start):
                raise ValueError(f"{_short(text, 100)} {reason}")
        if "\0" in text:
            raise ValueError(f"{name!r} contains a NUL, as no path does: give an image's content as bytes, not as text")
    try:
        return read_image_file(path)[1]
    except IsADirectoryError:
        raise IsADirectoryError(f"{name} is a folder: give the images in it") from None
    except OSError as error:
        if isinstance(text, str) and BASE64_IMAGE.fullmatch(text):
            raise ValueError(
                f"{_short(text, 100)} is an image as base64, not a file: give its bytes, base64.b64decode(text)"
            ) from None
        raise type(error)(f"{name} {reason_of(error)}") from None


def _short(name: str, limit: int = MAX_NAME) -> str:
    return name if len(name) <= limit else f"{name[:40]}… ({len(name):,} characters)"


def _from_bytes(data: bytes, name: str, policy: Policy) -> OpenImage:
    if not data:
        raise ValueError(f"{name} is empty: no image in it")
    try:
        essential = trimmed(data)
        if essential.ends_early and policy.truncated == "refuse":
            raise ValueError(
                "cannot be read as an image: it ends early; --truncated accept (truncated='accept') reads what is there"
            )
        if essential.raw:
            doors = partial(_check_size, policy=policy), partial(_from_bytes, name=name, policy=policy)
            return OpenImage(name, decode=policy.decode, **read_raw(essential, *doors))
        image = _identified(essential.data + END_OF_JPEG * essential.ends_early)
        _check_size(image.size, policy)
    except MemoryError:
        raise ValueError(f"{name} does not fit in memory") from None
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    orientation = _orientation_of(image) if essential.orientation is None else essential.orientation
    taken = essential.taken or date_in(image.info.get("exif"))
    return OpenImage(name, image, orientation, policy.decode, [ENDS_EARLY] if essential.ends_early else [], taken)


def _identified(data: bytes) -> Image.Image:
    """Image.open without its DecompressionBombWarning: warning filters are shared by all threads."""
    stream, fault = io.BytesIO(data), ""
    # Some of Pillow's plugins unpack numbers without checking the length of the header.
    for kind, make in _readers(data[:16].ljust(16, b"\0")):
        try:
            stream.seek(0)
            return make(stream, "")
        except MemoryError:
            raise
        except Exception as error:  # as above
            fault = fault or (f"{kind}: {error}" if kind else "")
    raise ValueError(f"is a broken {fault}" if fault else "is not an image in a format that Pillow reads")


def _readers(start: bytes) -> Iterator[tuple[str, Callable[[io.BytesIO, str], Image.Image]]]:
    """Readers for a file with this start, the most frequent formats first; "" for a format without a fixed start."""
    from PIL import Image

    tried = set(NOT_OPENED)
    for prepare in (Image.preinit, Image.init):
        prepare()
        for kind in [kind for kind in Image.ID if kind not in tried]:
            tried.add(kind)
            make, accept = Image.OPEN[kind]
            # A string says what Pillow was built without.
            if accept is None or ((answer := accept(start)) and not isinstance(answer, str)):
                yield kind if accept else "", cast("Callable[[io.BytesIO, str], Image.Image]", make)
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
        try:
            from pillow_heif import HeifImageFile  # decodes when loaded, so its size is checked first
        except ImportError:
            raise ValueError("is a HEIC image: pip install 'mlx-aimv2[heic]' to read it") from None
        yield "HEIC", HeifImageFile


def _check_size(size: tuple[int, int], policy: Policy) -> None:
    """Refuses a decompression bomb before it is decoded."""
    from PIL import Image

    limit = policy.max_pixels
    if limit is None and Image.MAX_IMAGE_PIXELS is not None:
        limit = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow refuses; below it only warns
    width, height = size
    if limit is not None and width * height > limit:
        raise ValueError(
            f"has {width}x{height} pixels, more than {limit:,}: make it smaller; if you trust it, embed, search, "
            "classify and map accept a higher limit, --max-pixels (max_pixels)"
        )


# Pixels


def from_array(array: np.ndarray[Any, Any], name: str) -> Image.Image:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, integers up to 65535 or float from 0 to 1.

    -> PIL image in mode L, RGB or RGBA. Raises ValueError with one line that names the image if its shape or range is
    unclear.
    """
    from PIL import Image

    shape = "x".join(str(n) for n in array.shape)
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (1, 3, 4)):
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            raise ValueError(f"{name} of shape {shape} has its colours first: give array.transpose(1, 2, 0)")
        raise ValueError(f"{name} has shape {shape}; wanted (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if 0 in array.shape:
        raise ValueError(f"{name} has shape {shape}: no pixels in it")
    levels = _eight_bits(array, name)
    return Image.fromarray(np.ascontiguousarray(levels[..., 0] if array.shape[2:] == (1,) else levels))


def _eight_bits(array: np.ndarray[Any, Any], name: str) -> Levels:
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        return cast("Levels", array)
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "u" and array.dtype.itemsize == 2:
        # The high byte, as Pillow does for 16-bit colour: exact for 8-bit images stored as v * 256 or v * 257.
        return (array >> 8).astype(np.uint8)
    if kind not in "iuf":
        raise ValueError(f"{name} has dtype {array.dtype}; wanted uint8, uint16, bool, or float from 0 to 1")
    low, high = array.min(), array.max()
    if kind == "f" and low >= 0 and high <= 1:
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if kind != "f" and low >= 0 and high <= 65535:
        # Wider integers do not show their range: 8 bits if all values fit, else 16.
        return (array >> 8 if high > 255 else array).astype(np.uint8)
    raise ValueError(
        f"{name} has dtype {array.dtype} from {low} to {high}; wanted uint8, uint16, bool, or float from 0 to 1: "
        "scale it first"
    )


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Upright, by EXIF's number."""
    from PIL import Image

    if orientation < 2:
        return image
    upright = image.transpose(Image.Transpose[TURNS[orientation - 2]])
    upright.info = {key: image.info[key] for key in ("transparency",) if key in image.info}  # must not be rotated again
    return upright


def turned_box(filled: tuple[float, float], size: tuple[int, int], orientation: int) -> Box:
    """The part (0, 0, *filled) of an image of this (width, height), after it was turned upright."""
    (wide, high), (width, height) = filled, size
    left = width - wide if orientation in (2, 3, 7, 8) else 0.0
    top = height - high if orientation in (3, 4, 6, 7) else 0.0
    if orientation >= 5:
        return top, left, top + high, left + wide
    return left, top, left + wide, top + high


def flattened(image: Image.Image, name: str) -> Image.Image:
    """Mode RGB: levels of 8 bits, and white behind transparency, whose colours are often noise, as in transformers."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = from_array(np.asarray(image), name)
    try:
        if image.mode in ("La", "RGBa"):  # colours already multiplied by their opacity
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        on_white = Image.new("RGB", image.size, (255, 255, 255))
        on_white.paste(image, mask=image.getchannel("A"))
        return on_white
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{name} has the colour mode {image.mode}, which Pillow cannot turn into RGB: {error}"
        ) from None
