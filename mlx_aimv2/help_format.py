"""Writes the help of the command line: an example, a short usage, flags in groups, at most 100 columns wide."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Mapping

WIDTH = 100
"""Columns at most, however wide the terminal is; a narrower one gets shorter lines."""

FLAG_COLUMN = 32
"""The descriptions begin here at the latest, for two columns behind `--grad-accumulation-steps N`."""


class HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter with `-o, --output FILE` for a flag that has two names, as in Python 3.13."""

    def __init__(self, prog: str, **settings: int) -> None:
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
        super().__init__(prog, **({"max_help_position": FLAG_COLUMN, "width": width} | settings))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        return f"{names} {self._format_args(action, (action.dest or '').upper())}"


def verb_help(parser: argparse.ArgumentParser, example: str) -> str:
    """The help of one verb. The example is not wrapped, so that it can be copied."""
    formatter = parser._get_formatter()
    formatter.add_usage(short_usage(parser), [], [])
    formatter.add_text(parser.description)
    for group in parser._action_groups:
        _add_section(formatter, group.title, group._group_actions)
    return f"example: {parser.prog} {example}\n\n{formatter.format_help()}"


def list_help(parser: argparse.ArgumentParser, groups: Mapping[str, Iterable[argparse.Action]], more: str) -> str:
    """The help of the whole program: its verbs in groups, then `more` as it is."""
    formatter = parser._get_formatter()
    formatter.add_usage(f"{parser.prog} VERB [flags]", [], [])
    formatter.add_text(parser.description)
    for title, verbs in groups.items():
        _add_section(formatter, title, verbs)
    return f"{formatter.format_help()}\n{more}\n"


def short_usage(parser: argparse.ArgumentParser) -> str:
    """What must be given: `mlx-aimv2 embed PATH... -o FILE [flags]`."""
    given = [f"{action.metavar}{'...' * (action.nargs == '+')}" for action in parser._get_positional_actions()]
    given += [_short(action) for action in parser._get_optional_actions() if action.required]
    either = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    given += [f"({' | '.join(map(_short, actions))})" for actions in either]
    return " ".join([parser.prog, *given, "[flags]"])


def _short(action: argparse.Action) -> str:
    return f"{action.option_strings[0]} {action.metavar}"


def _add_section(formatter: argparse.HelpFormatter, title: str | None, actions: Iterable[argparse.Action]) -> None:
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()
