"""Programs that tests start: they hear signals as from a terminal, import this package, and end with their test."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_aimv2
from mlx_aimv2.cli.dispatch import SIGNALS

LAUNCH = Path(sys.executable).parent / "mlx.launch"
needs_launch = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")

HANGS = 300
"""Seconds after which a program that has not ended hangs: only a guard, so far more than a busy machine takes."""

# Under nohup, or in a shell's background, signals are ignored, and a program inherits that.
HEARING = f"""
import os, signal, sys
for number in {[int(number) for number in SIGNALS]}:
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def environment(**more: str) -> dict[str, str]:
    """That of the tests, in which Python imports the package that is under test, from any folder."""
    return os.environ | {"PYTHONPATH": str(Path(mlx_aimv2.__file__).parents[1])} | more


@contextlib.contextmanager
def running(*command: str, **settings) -> Iterator[subprocess.Popen[str]]:
    """Starts a program; `settings` are Popen's, pipes being the rule. With its children it is gone after the block."""
    settings = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"env": environment()} | settings
    hearing = [sys.executable, "-I", "-S", "-c", HEARING, *command]
    with subprocess.Popen(hearing, text=True, start_new_session=True, **settings) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(OSError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)


def launched(*arguments: str, ranks: int = 2) -> tuple[str, str]:
    """Runs Python with these arguments as ranks of mlx.launch: -> (stdout, stderr). It exits with 0 in any case."""
    launcher = [str(LAUNCH), "-n", str(ranks), "--backend", "ring", "-p", str(free_port(ranks))]
    # An end of input would keep the launcher busy: it is waited for before its pipes are read to their ends.
    with running(sys.executable, *launcher, sys.executable, *arguments) as process:
        process.wait(HANGS)
        return process.stdout.read(), process.stderr.read()


def free_port(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            first = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for port in range(first + 1, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
