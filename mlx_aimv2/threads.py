"""Lets models be called from any thread: a lazy array of MLX belongs to the thread that made it.

In the main thread results stay lazy, so that computing and reading overlap. In any other thread, such as a handler of a
web server, they are evaluated before they are returned and can then be read anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.device import check_process

T = TypeVar("T")

_lock = threading.Lock()


def mark_lazy(model: nn.Module) -> None:
    """Remembers that this model's weights are not read yet, and in which thread they can be."""
    _set_lazy_thread(model, threading.get_ident())


def any_thread(method: Callable[..., T]) -> Callable[..., T]:
    """Makes a method of a model safe to call in any thread.

    Raises RuntimeError in a forked process, and in another thread than the one that loaded a model with `lazy=True`.
    """

    @wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> T:
        check_process()
        _check_weights(self)
        result = method(self, *args, **kwargs)
        if threading.current_thread() is not threading.main_thread():
            _evaluate(result)
        return result

    return call


def _check_weights(model: nn.Module) -> None:
    """Raises RuntimeError if the weights can only be read in another thread."""
    if getattr(model, "_lazy_thread", None) in (None, threading.get_ident()):
        return
    with _lock:  # two threads that evaluate one lazy array crash the process
        try:
            mx.eval(model.parameters())
        except RuntimeError as error:
            raise RuntimeError(
                "this model was loaded with lazy=True in another thread, and MLX can read its weights only there: "
                f"load it with lazy=False, or in the thread that uses it ({error})"
            ) from None
        _set_lazy_thread(model, None)


def _set_lazy_thread(model: nn.Module, thread: int | None) -> None:
    for module in model.modules():
        object.__setattr__(module, "_lazy_thread", thread)


def _evaluate(result: object) -> None:
    arrays = [getattr(result, field.name) for field in fields(result)] if is_dataclass(result) else result
    try:
        mx.eval(arrays)
    except ValueError:  # within mx.compile and mx.vmap nothing can be evaluated
        return
