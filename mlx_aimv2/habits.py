"""Names that users of transformers type out of habit, each with its equivalent here."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

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
    "attention_mask": "leave it out: ids are padded with EOS, and nothing after EOS counts",
    "return_dict": "leave it out: a model returns an object with last_hidden_state and pooler_output",
    "return_tensors": "leave it out: processor(images) returns an mlx array (B, H, W, 3)",
    "text": "ids = processor.tokenize(texts) beside pixels = processor(images)",
    "padding": "leave it out: processor.tokenize(texts) pads shorter texts with EOS",
}
"""Keyword of transformers' calls -> what to write instead."""


class _Answering(type):
    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> NoReturn:
            raise AttributeError(_answer(cls, name) or f"type object {cls.__name__!r} has no attribute {name!r}")


class AnswersHabits(metaclass=_Answering):
    """Answers transformers' attributes with AttributeError and its keywords with TypeError, naming ours.

    The attributes do not exist: `hasattr` is False, and `dir` does not list them.
    """

    def __init_subclass__(cls) -> None:
        for method in {"__call__", "encode_image", "encode_text"} & vars(cls).keys():
            setattr(cls, method, _checked(vars(cls)[method]))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if (answer := _answer(type(self), name)) is not None:
                raise AttributeError(answer)
            if hasattr(super(), "__getattr__"):  # an MLX module's parameters
                return super().__getattr__(name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _answer(cls: type, name: str) -> str | None:
    return f"{cls.__name__} has no {name}: {ATTRIBUTES[name]}" if name in ATTRIBUTES else None


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: object, *args: Any, **kwargs: Any) -> Any:
        for name in filter(KEYWORDS.__contains__, kwargs):
            raise TypeError(f"{type(self).__name__} takes no {name}: {KEYWORDS[name]}")
        return method(self, *args, **kwargs)

    return call
