"""Reads raw photographs by LibRaw (the extra `raw`: rawpy): the preview in them, or developed at half size."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_aimv2.images.metadata import Trimmed

RAW_SUFFIXES = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw")
"""Endings of their names, in any case."""

ENOUGH = 1024
"""Pixels on the longer side of a preview that is taken; a smaller one has at least half of the sensor's."""

ORIENTATIONS = (1, 2, 4, 3, 5, 8, 6, 7)
"""LibRaw's number (flip) -> EXIF's."""


@cache
def can_read_raw() -> bool:
    """Whether the extra `raw` is installed."""
    return find_spec("rawpy") is not None


def read_raw(
    photograph: Trimmed, check: Callable[[tuple[int, int]], None], open_preview: Callable[[bytes], Any]
) -> dict[str, Any]:
    """What an OpenImage says of a raw photograph: of its preview or, where that is small, of its pixels.

    `check` refuses a sensor of too many pixels (width, height), `open_preview` makes an OpenImage of a JPEG. Raises
    ValueError, which continues a sentence that starts with the file's name.
    """
    from PIL import Image

    try:
        import rawpy
    except ImportError:
        what = "pip install 'mlx-aimv2[raw]' to read it, or"
        raise ValueError(f"is a raw photograph ({photograph.raw}): {what} export it as JPEG, PNG or TIFF") from None
    try:
        with rawpy.imread(io.BytesIO(photograph.data)) as raw:
            size = width, height = raw.sizes.width, raw.sizes.height
            check(size)
            turn = ORIENTATIONS[raw.sizes.flip & 7]
            with suppress(rawpy.LibRawError, ValueError):  # none, or one that is broken
                thumb = raw.extract_thumb()
                preview = open_preview(thumb.data) if thumb.format == rawpy.ThumbFormat.JPEG else None
                if preview is not None and max(preview.size) >= min(ENOUGH, max(size) / 2):
                    # Cameras turn neither the sensor's pixels nor the preview's; some programs turn the latter.
                    wide, high = preview.image.size
                    if preview.orientation == 1 and (turn < 5 or (wide < high) == (width < height)):
                        preview.orientation = turn
                    taken = photograph.taken or preview.taken
                    return {"image": preview.image, "orientation": preview.orientation, "taken": taken}
            pixels = raw.postprocess(half_size=True, use_camera_wb=True)  # (H, W, 1) where a sensor sees no colours
            return {"image": Image.fromarray(pixels.repeat(3 // pixels.shape[2], axis=2)), "taken": photograph.taken}
    except rawpy.LibRawError as error:
        raise ValueError(
            f"is a raw photograph ({photograph.raw}), which LibRaw cannot read: {error}; export it as JPEG, PNG or TIFF"
        ) from None
