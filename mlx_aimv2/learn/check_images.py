"""Reads and decodes images before training relies on them, each only once while it is unchanged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mlx_aimv2.embed.cache import Known, KnownFiles
from mlx_aimv2.files import read_image_file, reason_of
from mlx_aimv2.images.open import open_image, warn_of


def check_images(paths: Sequence[str], *, decode: bool = True) -> tuple[dict[str, Known], list[str]]:
    """Reads, hashes and decodes every image: `paths -> ({path: SHA-256 and size}, errors)`.

    A file that was good before and is unchanged is not read again. Without `decode` only headers are read, unless one
    is bad: then all errors are reported together.
    """
    known_files = KnownFiles()
    known = known_files.look_up(paths, decoded=decode)
    others = [path for path in dict.fromkeys(paths) if path not in known]
    with ThreadPoolExecutor(os.cpu_count() or 1, "check") as pool:
        results = list(pool.map(lambda path: _checked(path, decode), others))
    found = {path: result for path, result in zip(others, results, strict=True) if isinstance(result, Known)}
    known_files.remember(found.items())
    faults = [result for result in results if isinstance(result, str)]
    return check_images(paths) if faults and not decode else (known | found, faults)


def _checked(path: str, decode: bool) -> Known | str:
    """What is known about a readable image, or what is wrong with it."""
    try:
        _, data = read_image_file(path)
        image = open_image(data, name=path)
        width, height = image.size
        if (width, height) == (1, 1):
            return f"{path} is a single pixel: nothing to see"
        if decode:
            warn_of(image)
            image.rgb()
        return Known(hashlib.sha256(data).digest(), (height, width), decode)
    except OSError as error:
        return str(error) if error.errno is None and path in str(error) else f"{path} {reason_of(error)}"
    except Exception as error:  # decoders raise whatever they meet
        return " ".join(str(error).split()) or f"{path} cannot be read"
