"""Describes this machine and times computations on it.

`python -m convert.machine` prints the description and, beside the yardstick, how long a pass of random weights takes.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlx_aimv2 import __version__
from mlx_aimv2.backend.device import may_use_tf32
from mlx_aimv2.cli.bench import measure_speed, random_model, random_pixels
from mlx_aimv2.config import released

YARDSTICK = {"large-patch14-224": 63, "large-patch14-336": 133, "large-patch14-448": 252}
"""Milliseconds of a pass over one image on an M4 with ten GPU cores: from SigLIP2-L's 62, 130 and 247 ms on MLX."""


def section() -> str:
    """The machine as a Markdown table, the head of a report."""
    lines = [f"| {what} | {value} |" for what, value in facts().items()]
    return "\n".join(["### Machine", "", "| | |", "|---|---|", *lines])


def facts() -> dict[str, str]:
    """What a measurement depends on: chip, memory, systems and versions. No name of a person or a machine."""
    tf32 = "TF32 may be on" if may_use_tf32() else "TF32 off"
    info = {name: str(value) for name, value in mx.device_info(mx.default_device()).items()}
    if any("paravirtual" in value.lower() for value in info.values()):
        info["note"] = "the device is paravirtual, part of a virtual machine: its times are no measurement of a Mac"
    return {
        "chip": chip(),
        "memory": _memory(),
        "system": _system(),
        "python": platform.python_version(),
        "mlx": f"{version('mlx')}, {'GPU' if mx.default_device().type == mx.DeviceType.gpu else 'CPU'}, {tf32}",
        "device": ", ".join(f"{name} {value}" for name, value in info.items()),
        "mlx-aimv2": __version__,
    }


def yardstick() -> str:
    """What a pass takes on a machine that is not here, with where it is from."""
    times = ", ".join(f"{name.replace('patch14-', '')} {milliseconds} ms" for name, milliseconds in YARDSTICK.items())
    return f"{times}: an M4 with ten GPU cores, computed from SigLIP2-L's published times, not measured"


def main() -> int:
    """Prints the description of this machine, and times beside the yardstick."""
    print(section())
    dtype = mx.float16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
    for name in YARDSTICK:
        config = released(name).config.vision
        speed = measure_speed(random_model(config, dtype), random_pixels(config, batch=1), runs=3)
        print(f"| {name}, random weights, {speed['dtype']} | {1e3 * speed['seconds']:.0f} ms |")
    print(f"| yardstick | {yardstick()} |")
    return 0


def chip() -> str:
    """The name of the processor."""
    if platform.system() == "Darwin":
        return _ask("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.machine()


def median_seconds(work: Callable[[], mx.array], repeats: int) -> float:
    """Median time of evaluating what `work` gives, after one run that does not count."""
    mx.eval(work())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}, {platform.machine()}"
    return f"{platform.system()}, {platform.machine()}"


def _memory() -> str:
    if platform.system() == "Darwin":
        total = int(_ask("sysctl", "-n", "hw.memsize") or 0)
    else:
        meminfo = Path("/proc/meminfo")
        total = int(meminfo.read_text().split()[1]) * 1024 if meminfo.is_file() else 0
    return f"{total / 2**30:.0f} GiB" if total else "unknown"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(errors="replace").splitlines() if file.is_file() else []


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
