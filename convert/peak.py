"""Runs a command of mlx-aimv2 in this process, and prints the most memory that it took as a last line of JSON.

python -m convert.peak embed photos -m MODEL -o photos.db
"""

from __future__ import annotations

import json
import platform
import resource
import sys

import mlx.core as mx

from mlx_aimv2.cli import main as command_line


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code: stdout ends with `{"mlx": bytes, "resident": bytes}`."""
    code = command_line(argv)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if platform.system() == "Darwin" else 1024  # Linux counts in KiB
    print(json.dumps({"mlx": mx.get_peak_memory(), "resident": most * unit}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
