"""Describes the machine: its chip, MLX's backend, cores and BLAS, and from which threads MLX may be called.

`auto` is float32 on a CPU, where MLX's half-precision products are slow. On a GPU it is float16, which is eight times
as precise as bfloat16, if the checkpoint's fidelity report leaves headroom in float16's range, else bfloat16. Without a
report it is bfloat16, except on M1 and M2, which compute it slowly: there it is float16. Which of the two is faster on
a later chip is for `mlx-aimv2 bench` to measure.

A lazy MLX array belongs to the thread that made it. In the main thread results of models stay lazy, to overlap
computing and reading. In any other thread, such as a web server's handler, they are evaluated before they are returned
and can then be read anywhere. In a process forked after MLX was used, MLX hangs.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_aimv2.config import dtype_name
from mlx_aimv2.files import read_json

T = TypeVar("T")

AUTO = "auto"

REPORT = "fidelity.json"
"""The converter's report in an MLX folder; its `largest_activation` decides whether float16 is safe."""

FLOAT16_LARGEST = 65504.0
HEADROOM = 2.0
"""How many times the report's largest activation, measured on a few images, must fit into float16."""

FIRST_WITH_BFLOAT16 = 15
"""The first Metal GPU family with native bfloat16: applegpu_g13 is M1, g14 M2, g15 M3, g16 M4, g17 M5."""

FIRST_WITH_MATRIX_UNITS = 17

TF32 = "MLX_ENABLE_TF32"
"""MLX's variable that turns TensorFloat32 off when "0"; MLX reads it once, at its first product on a GPU."""

MAX_STREAMS = 8
"""CPU streams in use at once: MLX runs about twenty operations at a time and queues the rest; a stream has 2 or 3."""


@dataclass(frozen=True)
class Machine:
    """What MLX computes on: `kind` cpu, metal or cuda; `chip` its name; `family` the Metal GPU's number, or None."""

    kind: str
    chip: str
    family: int | None = None

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether a GPU computes bfloat16 natively; an unknown Metal chip is taken for a newer one."""
        return self.kind != "cpu" and (self.family or FIRST_WITH_BFLOAT16) >= FIRST_WITH_BFLOAT16

    @property
    def has_tf32(self) -> bool:
        """Whether MLX rounds the factors of float32 products to TensorFloat32 (10 bits) by default."""
        return self.kind != "cpu" and (self.family or FIRST_WITH_MATRIX_UNITS) >= FIRST_WITH_MATRIX_UNITS


def slow_here(dtype: mx.Dtype) -> str | None:
    """A note with advice if MLX computes a dtype much more slowly than float32 on the default device, else None."""
    if dtype not in (mx.float16, mx.bfloat16) or mx.default_device().type != mx.DeviceType.cpu:
        return None
    return f"MLX computes {dtype_name(dtype)} slowly on a CPU; --dtype {AUTO} uses float32"


def machine() -> Machine:
    """The machine that MLX computes on by default."""
    device = mx.default_device()
    facts: dict[str, Any] = dict(mx.device_info(device))
    chip = str(facts.get("device_name") or facts.get("architecture") or platform.machine())
    if device.type == mx.DeviceType.cpu:
        return Machine("cpu", chip)
    if not mx.metal.is_available():
        return Machine("cuda", chip)
    found = re.match(r"applegpu_g(\d+)", str(facts.get("architecture", "")))
    return Machine("metal", chip, int(found[1]) if found else None)


def turn_tf32_off() -> None:
    """Makes float32 products exact for the whole process, unless the user has set this or MLX was already used."""
    if mx.get_peak_memory() == 0:
        os.environ.setdefault(TF32, "0")


def may_use_tf32() -> bool:
    """Whether float32 products may be rounded here; True if MLX was used before `turn_tf32_off`, to be safe."""
    return machine().has_tf32 and os.environ.get(TF32) != "0"


def suited_dtype(checkpoint: Path, *, on: Machine | None = None) -> str:
    """The dtype that `auto` means for a checkpoint's folder: `folder -> "float32", "float16" or "bfloat16"`."""
    on = on or machine()
    if on.kind == "cpu":
        return "float32"
    largest = largest_activation(checkpoint)
    if largest is None:
        return "bfloat16" if on.has_fast_bfloat16 else "float16"
    return "float16" if largest * HEADROOM <= FLOAT16_LARGEST else "bfloat16"


def largest_activation(checkpoint: Path) -> float | None:
    """The largest activation in the folder's fidelity report, None without one."""
    try:
        value = read_json(checkpoint / REPORT)["largest_activation"]["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def cpu_count() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def is_x86() -> bool:
    """Whether the CPU is an x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


@cache
def suits_haswell(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether OpenBLAS is faster with its kernels for Haswell than with those it chooses: on AMD with AVX-512."""
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    return "AuthenticAMD" in text and " avx512f" in text


def blas_threads() -> int:
    """Threads of the BLAS behind MLX's products; only OpenBLAS is known to have several."""
    library = openblas()
    return 1 if library is None else int(library.openblas_get_num_threads())


@cache
def openblas() -> ctypes.CDLL | None:
    """OpenBLAS, if MLX's products use it: preloaded or linked. NumPy's own copy is neither."""
    linked = str(Path(mx.__file__).parent / "lib" / "libmlx.so")
    for path in (None, linked) if platform.system() == "Linux" else ():  # None: what this process has already loaded
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(path)
            library.openblas_get_num_threads.restype = ctypes.c_int
            return library
    return None


def mlx_build() -> str:
    """MLX's version and the installed backends, as `0.32.4 cpu`."""
    found = [version("mlx")]
    for backend in ("metal", "cpu", "cuda-12", "cuda-13"):
        with suppress(PackageNotFoundError):
            found += [backend] if version(f"mlx-{backend}") else []
    return " ".join(found)


def advice(on: Machine) -> str | None:
    """What slows this machine down and how to fix it; None if nothing is known."""
    if on.kind == "metal" and (on.family or 0) >= FIRST_WITH_MATRIX_UNITS:
        # MLX has wheels for macOS 14, 15 and 26; only the last has kernels for these units, which need 26.2.
        with suppress(PackageNotFoundError):
            tags = distribution("mlx-metal").read_text("WHEEL") or ""
            if (found := re.search(r"macosx_(\d+)_", tags)) and int(found[1]) < 26:
                return (
                    f"this chip's matrix units are not used: MLX was built for macOS {found[1]}; "
                    "on macOS 26.2 or later run pip install --force-reinstall mlx mlx-metal"
                )
        if tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit()) < (26, 2):
            return "this chip's matrix units need macOS 26.2 or later: update macOS, then reinstall mlx"
    if on.kind == "cpu" and platform.system() == "Linux":
        # Few cores do better with a shard each than with a BLAS of several threads (`x86`).
        one_thread = " OPENBLAS_NUM_THREADS=1" if is_x86() and cpu_count() <= MAX_STREAMS else ""
        if openblas() is None:
            return (
                "MLX multiplies with the BLAS in its wheel, which is slow; with libopenblas0-pthread "
                f"installed, run with LD_PRELOAD=libopenblas.so.0{one_thread}"
            )
        if one_thread and blas_threads() > 1:
            return (
                f"OpenBLAS splits each product among {blas_threads()} threads; on few cores it is faster to "
                f"give each core its own images or tokens: run with{one_thread}"
            )
        if suits_haswell() and "OPENBLAS_CORETYPE" not in os.environ:
            return "OpenBLAS chooses AVX-512 kernels, which are slower on AMD: run with OPENBLAS_CORETYPE=Haswell"
    return None


# Processes and threads

_fork = {"mlx_in_use": False, "is_child": False}
os.register_at_fork(
    before=lambda: _fork.update(mlx_in_use=mx.get_peak_memory() > 0),
    after_in_child=lambda: _fork.update(is_child=True),
)


def check_process() -> None:
    """Raises ChildProcessError in a process forked after MLX was used: MLX would hang there forever."""
    if _fork["is_child"] and _fork["mlx_in_use"]:
        raise ChildProcessError(
            "this process was forked after MLX was used, and MLX would hang in it: start it with "
            'multiprocessing.get_context("spawn")'
        )


_lock = threading.Lock()


def mark_lazy(model: nn.Module, thread: int | None) -> None:
    """Remembers the only thread in which this model's weights can be read; None once they have been."""
    for module in model.modules():
        object.__setattr__(module, "_lazy_thread", thread)


def any_thread(method: Callable[..., T]) -> Callable[..., T]:
    """Makes a method of a model safe to call in any thread.

    Raises ChildProcessError in a forked process, RuntimeError in a thread other than the one that loaded a model with
    `lazy=True`.
    """

    @wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> T:
        check_process()
        _check_weights(self)
        result = method(self, *args, **kwargs)
        if threading.current_thread() is not threading.main_thread():
            arrays = [getattr(result, field.name) for field in fields(result)] if is_dataclass(result) else result
            with suppress(ValueError):  # nothing can be evaluated inside mx.compile and mx.vmap
                mx.eval(arrays)
        return result

    return call


def _check_weights(model: nn.Module) -> None:
    """Raises RuntimeError if the weights can only be read in another thread."""
    if getattr(model, "_lazy_thread", None) in (None, threading.get_ident()):
        return
    with _lock:  # two threads evaluating one lazy array crash the process
        try:
            mx.eval(model.parameters())
        except RuntimeError as error:
            raise RuntimeError(
                "this model was loaded with lazy=True in another thread, and MLX can read its weights only there: "
                f"load it with lazy=False, or in the thread that uses it ({error})"
            ) from None
        mark_lazy(model, None)
