"""What does a JSON file of a checkpoint say, or in one line, why can it not be read?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError or ValueError that names the file."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path}: wanted a file, got a folder, a pipe or a device")
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no {path.name}; a checkpoint has one beside its weights")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted an object, got a {type(content).__name__}")
    return content
