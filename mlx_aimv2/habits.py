"""What transformers' users write by habit, each with the line that says how it is written here."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, TypeVar

Class = TypeVar("Class", bound=type)

_LOAD = "model, processor = mlx_aimv2.load(NAME)"
_MOVE = "MLX's arrays need no device: leave it out; load(NAME, dtype=…) chooses the numbers"

ATTRIBUTES = {
    "from_pretrained": _LOAD,
    "save_pretrained": "mlx_aimv2.save(model, processor, FOLDER)",
    "push_to_hub": "mlx_aimv2.save(model, processor, FOLDER), then mlx-aimv2 upload FOLDER OWNER/NAME in a shell",
    "get_image_features": "model.encode_image(pixels) with pixels = processor(images)",
    "get_text_features": "model.encode_text(ids) with ids = processor.tokenize(texts)",
    "forward": "model(pixels)",
    "to": _MOVE,
    "cuda": _MOVE,
}
"""Attribute of transformers' models and processors -> what to write instead."""

KEYWORDS = {
    "pixel_values": "model(pixels) with pixels = processor(images)",
    "input_ids": "model(pixels, ids), or model.encode_text(ids), with ids = processor.tokenize(texts)",
    "attention_mask": "leave it out: ids are filled with EOS, behind which nothing counts",
    "return_dict": "leave it out: a model gives an object with last_hidden_state and pooler_output",
    "return_tensors": "leave it out: processor(images) gives an mlx array (B, H, W, 3)",
    "text": "ids = processor.tokenize(texts) beside pixels = processor(images)",
    "padding": "leave it out: processor.tokenize(texts) fills shorter texts with EOS",
}
"""Keyword of transformers' calls -> what to write instead."""


class _Missing:
    """An attribute that is not there, so that `hasattr` says no, and whose error says what is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__} has no {self.name}: {ATTRIBUTES[self.name]}")


def answers_habits(cls: Class) -> Class:
    """Makes a class answer transformers' attributes and keywords with our line, as AttributeError and TypeError."""
    for name in ATTRIBUTES.keys() - vars(cls).keys():
        setattr(cls, name, _Missing(name))
    for method in {"__call__", "encode_image", "encode_text"} & vars(cls).keys():
        setattr(cls, method, _checked(vars(cls)[method]))
    return cls


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: object, *args: Any, **kwargs: Any) -> Any:
        for name in filter(KEYWORDS.__contains__, kwargs):
            raise TypeError(f"{type(self).__name__} takes no {name}: {KEYWORDS[name]}")
        return method(self, *args, **kwargs)

    return call
