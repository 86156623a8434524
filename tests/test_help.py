"""The help of every verb: an example that is accepted, flags in groups, at most 100 columns."""

import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest

from mlx_aimv2 import cli


def help_of(capsys, *verb):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*verb, "--help"])
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "170")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_begins_with_an_example_that_the_verb_accepts(verb, capsys):
    module = import_module(cli.VERBS[verb])
    assert help_of(capsys, verb).splitlines()[0] == f"example: {module.EXAMPLE}"
    program, name, *arguments = shlex.split(module.EXAMPLE)
    assert (program, name) == ("mlx-aimv2", verb)
    assert cli.parser(only=verb).parse_args([verb, *arguments]).verb == verb


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_fits_a_screen_of_a_hundred_columns(verb, capsys):
    lines = help_of(capsys, verb).splitlines()
    assert max(map(len, lines)) <= cli.WIDTH
    assert len(lines) <= 66


@pytest.mark.parametrize("verb", cli.VERBS)
def test_usage_names_what_must_be_given_and_every_other_flag_has_a_group(verb):
    parser = cli.Parser(prog=verb)
    import_module(cli.VERBS[verb]).add_arguments(parser)
    usage = parser.format_usage()
    untitled = [action for group in parser._action_groups[:2] for action in group._group_actions]
    for action in untitled:
        if action.option_strings and action.dest not in ("help", "output", "top", "mlx_path", "save_path"):
            assert action.required, action.dest
    for action in parser._actions:
        assert not action.required or (action.metavar or action.dest) in usage


def test_the_list_of_verbs_is_in_groups_and_each_stands_once(capsys):
    lines = help_of(capsys).splitlines()
    assert max(map(len, lines)) <= cli.WIDTH
    found, group = [], None
    for line in lines:
        if match := re.fullmatch(r"(\w+):", line):
            group = match[1]
        elif group in cli.GROUPS and (match := re.match(r"  (\w+) ", line)):
            found.append((group, match[1]))
    assert found == [(group, verb) for group, verbs in cli.GROUPS.items() for verb in verbs]


@pytest.mark.parametrize("module", ["mlx_aimv2", "mlx_aimv2.convert"])
def test_help_gives_no_warning(module):
    command = [sys.executable, "-W", "error", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_verb_is_parsed_without_the_modules_of_the_others():
    code = (
        "import sys; from mlx_aimv2 import cli; cli.parser(only='info'); print('mlx_aimv2.commands.fit' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
