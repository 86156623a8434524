"""The help of each verb begins with an example that works, and its flags stand in groups on at most 100 columns."""

import re
import shlex
import subprocess
import sys

import pytest

from mlx_aimv2.cli import main, parser
from mlx_aimv2.cli.dispatch import EXAMPLES, VERBS, Parser

SHARED = ("--revision", "--dtype", "--decode", "--max-pixels", "--truncated", "--max-patches", "--threads", "--seed")
SHARED += ("--resume", "--weight-decay", "--vocab-size", "--tokenizer", "--min-area", "--jitter", "--grey")
SHARED += ("--batch-size", "--iters", "--learning-rate", "--grad-accumulation-steps", "--warm-up", "--first-caption")
SHARED += ("--steps-per-report", "--steps-per-eval", "--save-every")


@pytest.fixture(autouse=True)
def terminal_of_100_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def verbs() -> dict[str, Parser]:
    return dict(parser().verbs.choices)


def entries(text: str) -> dict[str, dict[str, str]]:
    """What a help lists: titles -> what stands at the left, such as `-o, --output DIR` -> its words."""
    found: dict[str, dict[str, str]] = {}
    own: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if match := re.fullmatch(r"(\S.*):", line):
            own = found[match[1]] = {}
        elif match := re.fullmatch(r"  (\S.*?)(?:  +(.*))?", line):
            name = match[1]
            own[name] = match[2] or ""
        elif line.startswith("   ") and name:
            own[name] = f"{own[name]} {line.strip()}".strip()
    return found


def flags(text: str) -> dict[str, tuple[str, str]]:
    """Each flag of a help -> what follows it, and its words without the default."""
    listed = {left: words for group in entries(text).values() for left, words in group.items()}
    result = {}
    for left, words in listed.items():
        *_, metavar = left.split(" ", left.count(", ") + 1) if " " in left.split(", ")[-1] else [""]
        for name in left.split(", "):  # "-o DIR, --output DIR", from Python 3.13 on "-o, --output DIR"
            if name.startswith("-"):
                result[name.split(" ")[0]] = (metavar, words.split(" (default")[0])
    return result


@pytest.mark.parametrize("columns", ["60", "100", "300"])
def test_no_help_is_wider_than_the_terminal_or_100_columns(columns, verbs, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    helps = {verb: parser.format_help().splitlines() for verb, parser in verbs.items()}
    for verb, (first, *rest) in helps.items():
        assert len(first) <= 100, verb  # the example is not wrapped, so that it can be copied
        assert max(map(len, rest)) <= min(int(columns), 100), verb
    assert max(map(len, parser().format_help().splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_begins_with_an_example_that_the_verb_accepts(verb, verbs):
    example = EXAMPLES[verb]
    assert verbs[verb].format_help().splitlines()[0] == f"example: mlx-aimv2 {verb} {example}"
    assert parser(verb).parse_args([verb, *shlex.split(example)]).verb == verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_stands_in_a_group_with_a_title_and_has_words_of_its_own(verb, verbs):
    groups = entries(verbs[verb].format_help())
    assert set(groups.pop("options", {"-h, --help": ""})) == {"-h, --help"}
    assert groups and not {title for title in groups if title.startswith(("positional", "optional"))}
    for title, group in groups.items():
        assert group, title
        assert all(group.values()), title
    for name, (metavar, _) in flags(verbs[verb].format_help()).items():
        assert "_" not in metavar, f"{name} has no word for its value"


def test_usage_is_one_line_with_what_must_be_given(verbs):
    usages = {verb: parser.format_help().splitlines()[2] for verb, parser in verbs.items()}
    assert usages["embed"] == "usage: mlx-aimv2 embed PATH... -o FILE [flags]"
    assert usages["bench"] == "usage: mlx-aimv2 bench (-m MODEL | --random SIZE) [flags]"
    assert all(usage.startswith("usage: ") and usage.endswith(" [flags]") for usage in usages.values())


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_usage_names_all_that_must_be_given_and_nothing_else(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb])
    missing = re.search(r"(?:required: |one of the arguments )(.*?)(?: is required)?;", capsys.readouterr().err)
    wanted = [name.split("/")[0] for name in re.split(r", | (?=-)", missing[1])]
    assert all(name in VERBS[verb][1] for name in wanted)
    words = [word for word in re.split(r"[ |()]+", VERBS[verb][1]) if word.startswith("-")]
    assert sorted(words) == sorted(name for name in wanted if name.startswith("-") if name in words)


@pytest.mark.parametrize("flag", SHARED)
def test_the_same_flag_has_the_same_words_in_every_verb(flag, verbs):
    weights = {("convert", "--dtype"), ("compare", "--revision"), ("bench", "--dtype")}  # others by their nature
    helps = {verb: flags(parser.format_help()) for verb, parser in verbs.items()}
    found = {verb: own[flag] for verb, own in helps.items() if flag in own and (verb, flag) not in weights}
    assert found
    assert len(set(found.values())) == 1, found


def test_the_list_names_each_verb_once_in_its_group():
    titles, listed = "", []
    for line in parser().format_help().split("\n\n", 2)[2].splitlines():
        if line.endswith(":"):
            titles = line[:-1]
        elif line.startswith("  "):
            listed.append((line.split()[0], titles))
    assert listed == [(verb, group) for verb, (group, *_) in VERBS.items()]


def test_the_converters_own_command_shows_the_same_help():
    command = [sys.executable, "-W", "error", "-m", "mlx_aimv2.convert", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not run.stderr
    assert run.stdout == parser("convert").verbs.choices["convert"].format_help()


def test_a_shells_completion_is_made_from_the_parser():
    shtab = pytest.importorskip("shtab")
    for shell in ("bash", "zsh"):
        script = shtab.complete(parser(), shell)
        assert "--grad-accumulation-steps" in script and "evaluate" in script
