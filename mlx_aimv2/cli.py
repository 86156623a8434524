"""What does `mlx-aimv2 VERB` do: which verbs are there, and how does a user's mistake end in one line?"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from mlx_aimv2 import __version__

VERBS = {
    "convert": "mlx_aimv2.convert",
    "embed": "mlx_aimv2.commands.embed",
    "search": "mlx_aimv2.commands.search",
    "map": "mlx_aimv2.commands.map",
    "classify": "mlx_aimv2.commands.classify",
    "compare": "mlx_aimv2.commands.compare",
    "info": "mlx_aimv2.commands.info",
    "bench": "mlx_aimv2.commands.bench",
}
"""Verb -> the module that has its `HELP`, `add_arguments(parser)` and `run(arguments) -> exit code`."""


class Parser(argparse.ArgumentParser):
    """argparse's parser whose complaints are one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the arguments and where help is, and exits with 2."""
        _say(f"{message}; see {self.prog} --help")
        self.exit(2)


def main(argv: list[str] | None = None) -> int:
    """The command line: `arguments -> exit code` (0 done, 1 some inputs failed, 2 wrong use)."""
    return one_line_errors(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: list[str]) -> int:
    parser = Parser(prog="mlx-aimv2", description="Apple's AIMv2 vision encoders on MLX: images in, features out.")
    parser.add_argument("--version", action="version", version=f"mlx-aimv2 {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    asked = argv[0] if argv and argv[0] in VERBS else None
    # Only the verb that is asked for is imported; the list of all needs every one's help.
    modules = {verb: import_module(name) for verb, name in VERBS.items() if asked in (None, verb)}
    for verb in VERBS:
        explained = {"help": modules[verb].HELP, "description": modules[verb].HELP} if verb in modules else {}
        under = verbs.add_parser(verb, **explained)
        if verb in modules:
            modules[verb].add_arguments(under)
    arguments = parser.parse_args(argv)
    code: int = modules[arguments.verb].run(arguments)
    return code


def one_line_errors(work: Callable[[], int]) -> int:
    """Runs `work`; what a user can cause ends as one line on stderr and exit code 2 instead of a traceback.

    Notes (`warnings.warn`) become one line each too. A reader that has seen enough, as `head` has,
    ends the run quietly.
    """
    try:
        _usable_streams()
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(message)
            code = work()
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
        return 0
    except (ValueError, OSError) as error:
        _say(error)
        return 2
    except KeyboardInterrupt:
        _say("stopped")
        return 130


def _usable_streams() -> None:
    """Opens streams that the caller closed, and lets names of files that are not text pass through them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def _say(message: object) -> None:
    print(f"mlx-aimv2: {' '.join(str(message).split())}", file=sys.stderr)
