"""Which machine is this, and which dtype suits it and a checkpoint?

`auto` is float32 on a CPU, whose half-precision products are slow in MLX. On a GPU it is float16, which has eight times
the digits of bfloat16, if the checkpoint's fidelity report shows room in float16's range, and bfloat16 if it shows
none. Without a report it is bfloat16, except on M1 and M2, which compute it slowly: there it is float16. Which of the
two is faster on a later chip is for `mlx-aimv2 bench` to measure.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2 import cores

AUTO = "auto"

REPORT = "fidelity.json"
"""The converter's report in an MLX folder; its `largest_activation` decides whether float16 is safe."""

FLOAT16_LARGEST = 65504.0
HEADROOM = 2.0
"""How many times a report's largest activation, seen on a few pictures, must fit into float16."""

FIRST_WITH_BFLOAT16 = 15
"""Metal's family of GPUs that first computes bfloat16 natively: applegpu_g13 is M1, g14 M2, g15 M3, g16 M4, g17 M5."""

FIRST_WITH_MATRIX_UNITS = 17


@dataclass(frozen=True)
class Machine:
    """What computes: `kind` cpu, metal or cuda; `chip` by its name; `family`, Metal's number of the GPU, else None."""

    kind: str
    chip: str
    family: int | None = None

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether bfloat16 is computed natively; an unknown Metal chip is newer than this list."""
        return self.kind == "cuda" or (
            self.kind == "metal" and (self.family or FIRST_WITH_BFLOAT16) >= FIRST_WITH_BFLOAT16
        )


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
    """What the folder's fidelity report measured inside the network, None without a report that says so."""
    try:
        value = json.loads((checkpoint / REPORT).read_text(encoding="utf-8"))["largest_activation"]["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def mlx_build() -> str:
    """MLX's version and the backends that are installed, as `0.32.4 cpu`."""
    names = {"mlx-metal": "metal", "mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13"}
    return " ".join([version("mlx"), *(short for name, short in names.items() if _installed(name))])


def remark(on: Machine) -> str | None:
    """What keeps this machine from its speed, with what to do about it; None where nothing is known to."""
    if on.kind == "metal" and (on.family or 0) >= FIRST_WITH_MATRIX_UNITS:
        # MLX has wheels for macOS 14, 15 and 26; only the last holds the kernels for these units, which need 26.2.
        if (built_for := _wheel_macos()) is not None and built_for < 26:
            return (
                f"this chip's matrix units are idle: MLX was built for macOS {built_for}; "
                "on macOS 26.2 or later run pip install --force-reinstall mlx mlx-metal"
            )
        if _macos() < (26, 2):
            return "this chip's matrix units need macOS 26.2 or later: update macOS, then install mlx again"
    if on.kind == "cpu" and platform.system() == "Linux":
        one_thread = " OPENBLAS_NUM_THREADS=1" if cores.prefer_one_blas_thread() else ""
        if cores.openblas() is None:
            return (
                "MLX multiplies with the BLAS that its wheel was built with, which is slow; with libopenblas0-pthread "
                f"installed, run with LD_PRELOAD=libopenblas.so.0{one_thread}"
            )
        if one_thread and cores.blas_threads() > 1:
            return (
                f"OpenBLAS shares each product among {cores.blas_threads()} threads; on few cores it is faster that "
                f"each core takes its own pictures or tokens: run with{one_thread}"
            )
    return None


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def _wheel_macos() -> int | None:
    """The macOS that the installed wheel of MLX's Metal backend was built for."""
    try:
        tags = distribution("mlx-metal").read_text("WHEEL") or ""
    except PackageNotFoundError:
        return None
    found = re.search(r"macosx_(\d+)_", tags)
    return int(found[1]) if found else None


def _macos() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit())
