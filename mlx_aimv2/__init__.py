"""Apple's AIMv2 vision encoders on MLX: a photograph in, features out.

    from mlx_aimv2 import load

    model, processor = load("apple/aimv2-large-patch14-224")
    vectors = model.encode_image(processor(["cat.jpg", "dog.jpg"]), normalize=True)  # (2, 1024)

The public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
    from mlx_aimv2.conversion.folder import save
    from mlx_aimv2.images.processor import Aimv2Processor
    from mlx_aimv2.loading import load
    from mlx_aimv2.model import Aimv2Model, Aimv2TextModel, Aimv2VisionModel
    from mlx_aimv2.zero_shot_classifier import ZeroShotClassifier, zero_shot

__version__ = "0.1.0"

__all__ = [
    "Aimv2Config",
    "Aimv2Model",
    "Aimv2Processor",
    "Aimv2TextConfig",
    "Aimv2TextModel",
    "Aimv2VisionConfig",
    "Aimv2VisionModel",
    "ZeroShotClassifier",
    "load",
    "save",
    "zero_shot",
]

_HOME = {
    "Aimv2Config": "config",
    "Aimv2TextConfig": "config",
    "Aimv2VisionConfig": "config",
    "Aimv2Model": "model",
    "Aimv2TextModel": "model",
    "Aimv2VisionModel": "model",
    "Aimv2Processor": "images.processor",
    "ZeroShotClassifier": "zero_shot_classifier",
    "load": "loading",
    "save": "conversion.folder",
    "zero_shot": "zero_shot_classifier",
}
"""Public name -> the file that it is defined in."""


def lazily(module: dict[str, Any], home: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`, by which its public names are loaded when they are first used."""

    def load_name(name: str) -> Any:
        if name not in home:
            if name.startswith("Auto"):  # transformers' AutoModel, AutoProcessor, AutoTokenizer
                raise AttributeError(f"{module['__name__']} has no {name}: model, processor = load(NAME)")
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{module['__name__']}.{home[name]}"), name)
        module[name] = value  # from now on found without this function
        return value

    return load_name, lambda: sorted({*module, *home})


__getattr__, __dir__ = lazily(globals(), _HOME)
