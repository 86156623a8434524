"""How does anything that holds an image become an upright RGB image of 8 bits per colour?

path, bytes, open file, PIL image, NumPy array -> PIL image in mode RGB
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ImageInput: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray[Any, Any]"
)

Levels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

EXIF_ORIENTATION = 0x0112

# Pillow reads these by starting another program, which a folder of strangers' images should not be able to do.
NOT_OPENED = {"EPS"}

# The brands by which a HEIC file names itself, after "ftyp" at byte 4.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def name_of(image: object) -> str:
    """What an error calls this image: its file where there is one."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    file = getattr(image, "filename", None) or getattr(image, "name", None)
    if isinstance(file, str) and file:
        return file
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"image of {len(image)} bytes"
    return f"image ({type(image).__name__})"


def to_rgb(image: ImageInput) -> Image.Image:
    """Any image -> PIL image in mode RGB: first frame, turned upright by its EXIF tag, transparency laid on white.

    16-bit greys keep their high byte (Pillow alone would cut them off at 255). Arrays are (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4) of uint8, uint16, bool, wider integers up to 65535, or float from 0 to 1.
    Raises ValueError or OSError with one line that names the image.
    """
    from PIL import Image

    name = name_of(image)
    if isinstance(image, Image.Image):
        return _finish(image, name)
    if isinstance(image, np.ndarray):
        return _flatten(_from_array(image, name), name)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(image), name)
    if isinstance(image, (str, os.PathLike)):
        if name.startswith(("http://", "https://")):
            raise ValueError(f"{name} is an address: download it first and give the file")
        try:
            with Path(name).open("rb") as stream:
                return _decode(stream, name)
        except FileNotFoundError:
            raise FileNotFoundError(f"{name} does not exist") from None
        except IsADirectoryError:
            raise IsADirectoryError(f"{name} is a folder: give the images in it") from None
        except PermissionError:
            raise PermissionError(f"{name} may not be read: permission denied") from None
    if hasattr(image, "read") and hasattr(image, "seek"):
        return _decode(image, name)
    kind = type(image).__name__
    raise ValueError(f"an image is a path, bytes, an open file, a PIL image or a NumPy array, not {kind}")


def _decode(stream: IO[bytes], name: str) -> Image.Image:
    try:
        image = _identify(stream, name)
        _check_size(image.size, name)
        return _finish(image, name)
    except MemoryError:
        raise ValueError(f"{name} does not fit in memory") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    """Refuses a decompression bomb before it is decoded: Pillow warns above this limit and refuses above twice it."""
    from PIL import Image

    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{name} has {width}x{height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}: "
            "make it smaller, or raise that limit if you trust it"
        )


def _identify(stream: IO[bytes], name: str) -> Image.Image:
    """What Image.open does, without its DecompressionBombWarning: filters of warnings belong to all threads."""
    from PIL import Image

    stream.seek(0)
    start = stream.read(16)
    if not start:
        raise ValueError(f"{name} is empty: no image in it")
    start = start.ljust(16, b"\0")  # some of Pillow's plugins unpack numbers from it without asking for its length
    tried: set[str] = set()
    fault = ""
    for prepare in (Image.preinit, Image.init):
        prepare()
        for kind in [kind for kind in Image.ID if kind not in tried | NOT_OPENED]:
            tried.add(kind)
            make, accept = Image.OPEN[kind]
            answer = accept is None or accept(start)
            if not answer or isinstance(answer, str):  # a string tells what Pillow was built without
                continue
            try:
                stream.seek(0)
                return make(stream, name)
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                if accept is not None:  # it began as one of these, so this is the fault to tell
                    fault = fault or f"{kind}: {error}"
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
        file = pillow_heif.open_heif(stream)
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from None
    _check_size(file.size, name)
    try:
        return cast("Image.Image", file.to_pillow())
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from None


def _finish(image: Image.Image, name: str) -> Image.Image:
    from PIL import ImageOps

    if min(image.size) < 1:
        raise ValueError(f"{name} has {image.width}x{image.height} pixels: nothing to see")
    try:
        image.load()
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        elif image.mode == "I" and image.format == "PNG":
            image = image.convert("I;16")  # older Pillows widen the 16 bits of a grey PNG
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they meet in a broken file
        raise ValueError(f"{name} cannot be read as an image: {error}") from None
    return _flatten(image, name)


def _flatten(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = _from_array(np.asarray(image), name)
    try:
        if image.mode in ("La", "RGBa"):  # colours already multiplied by their opacity
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            # White behind what is transparent, as in transformers: what lies hidden there is often noise.
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{name} has the colour mode {image.mode}, which Pillow cannot turn into RGB: {error}"
        ) from None


def _from_array(array: np.ndarray[Any, Any], name: str) -> Image.Image:
    from PIL import Image

    shape = "x".join(str(n) for n in array.shape)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        raise ValueError(f"{name} of shape {shape} has its colours first: give array.transpose(1, 2, 0)")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"{name} has shape {shape}; wanted (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if 0 in array.shape:
        raise ValueError(f"{name} has shape {shape}: no pixels in it")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array, name)))


def _eight_bits(array: np.ndarray[Any, Any], name: str) -> Levels:
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        return cast("Levels", array)
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "u" and array.dtype.itemsize == 2:
        # The high byte, as Pillow does for 16-bit colour: exact for 8-bit images stored as v * 256 and as v * 257.
        return (array >> 8).astype(np.uint8)
    if kind not in "iuf":
        raise ValueError(f"{name} holds {array.dtype}; wanted uint8, uint16, bool, or float from 0 to 1")
    low, high = array.min(), array.max()
    if kind == "f" and low >= 0 and high <= 1:
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if kind != "f" and low >= 0 and high <= 65535:
        # Wider integers say nothing of their range: 8 bits where all fit in 8, else 16.
        return (array >> 8 if high > 255 else array).astype(np.uint8)
    raise ValueError(
        f"{name} holds {array.dtype} from {low} to {high}; wanted uint8, uint16, bool, or float from 0 to 1: "
        "scale it first"
    )
