"""Says on which machine a benchmark ran."""

from mlx_aimv2.backend import device


def summary() -> str:
    """The machine in one line: `AMD EPYC (cpu), 2 cores`."""
    on = device.machine()
    return f"{on.chip} ({on.kind}), {device.cpu_count()} cores"
