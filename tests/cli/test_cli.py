"""The command line ends a user's mistake in one line, escapes what it writes and shows progress."""

import contextlib
import logging
import os
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import mlx_aimv2
from mlx_aimv2 import bundled
from mlx_aimv2.cli import main, output
from mlx_aimv2.cli.dispatch import one_line_errors
from mlx_aimv2.cli.output import escape, progress, say

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["mlx-aimv2", mlx_aimv2.__version__]


def test_a_mistake_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "mlx_aimv2", "convert", "--hf-path", "nowhere", "--mlx-path", "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("mlx-aimv2: nowhere: no such file or folder")
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_a_note_is_one_line_without_the_place_in_the_code(capsys):
    def work() -> int:
        warnings.warn("images are prepared as for Apple's checkpoints", stacklevel=1)
        return 0

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert one_line_errors(work) == 0
    assert capsys.readouterr().err == "mlx-aimv2: note: images are prepared as for Apple's checkpoints\n"


def test_a_reader_that_has_seen_enough_ends_the_run_quietly():
    command = shlex.join([sys.executable, "-m", "mlx_aimv2", "info", str(bundled.emoji_checkpoint())]) + " | true"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["frob"], "there is no verb frob; the verbs are embed, search, "),
        (["map", "a.jpg", "-m", "x", "--patch", "x"], "whole numbers such as 3,5, got 'x'; see mlx-aimv2 map --help"),
        (["info", "aimv2-large-patch14-448"], "did you mean apple/aimv2-large-patch14-448?"),
        (["info", str(ROOT / "README.md")], "README.md: not a weight file; wanted .safetensors"),
    ],
)
def test_wrong_arguments_are_one_line_too(arguments, wanted, capsys):
    with contextlib.suppress(SystemExit):
        assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("mlx-aimv2: ") and wanted in line
    assert line.count("\n") == 1


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = command.replace("mlx-aimv2", f"{shlex.quote(sys.executable)} -m mlx_aimv2")
    return subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | environment, check=False)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_mistake(closed):
    result = shell(f"mlx-aimv2 info {shlex.quote(str(bundled.emoji_checkpoint()))} {closed}")
    assert (result.returncode, result.stderr) == (0, b"")


def test_names_that_a_terminal_cannot_show_do_not_undo_the_work(tmp_path):
    target = tmp_path / "ünï"
    words = shlex.join(["--hf-path", str(bundled.emoji_checkpoint()), "--mlx-path", str(target), "--no-verify"])
    result = shell(f"mlx-aimv2 convert {words} 2>/dev/null", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert (target / "config.json").is_file()


def test_only_the_verb_that_is_asked_for_is_imported():
    code = """import sys
from mlx_aimv2.cli import main
try:
    main(["compare", "--help"])
finally:
    print(*sys.modules)"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.split()
    assert "mlx_aimv2.cli.info_compare_export_upload" in loaded
    assert "mlx_aimv2.cli.embed_search_duplicates" not in loaded


def test_a_line_has_no_control_characters():
    name = os.fsdecode(b"a\nb\x1b[2J\xff.jpg")
    assert escape(name) == r"a\x0ab\x1b[2J\xff.jpg"
    assert escape("\u202egpj.exe\x9b") == r"\u202egpj.exe\x9b"
    assert escape("Größe 大.jpg") == "Größe 大.jpg"
    escape(name).encode()


def test_an_error_with_a_newline_in_a_name_is_one_line(capsys):
    def work() -> int:
        raise ValueError("a\n\x1b[31mb.jpg is not an image")

    assert one_line_errors(work) == 2
    assert capsys.readouterr().err == "mlx-aimv2: a\\x0a\\x1b[31mb.jpg is not an image\n"


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with progress() as advance:
        for done in range(20, 520, 20):
            now[0] += 1
            advance(done, 1000, "images")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "mlx-aimv2: 20% 200/1000 [00:10<00:40, 20.00 images/s]",
        "mlx-aimv2: 40% 400/1000 [00:20<00:30, 20.00 images/s]",
    ]


def test_progress_on_a_terminal_is_a_bar_with_lines_above_it(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress() as advance:
        advance(1, 4, "images")
        say("a line")
        time.sleep(0.15)
        advance(2, 4, "images")
    err = capsys.readouterr().err
    assert "1/4" in err and "2/4" in err
    assert "images" in err
    assert "\rmlx-aimv2: a line\n" in err
    assert err.rstrip(" ").endswith("\r")
    assert output._bar is None


def test_bars_that_follow_each_other_count_from_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress() as bar:
        for total, unit in ((5, "images"), (7, "steps")):
            for done in (1, 2):
                time.sleep(0.15)
                bar(done, total, unit)
    err = capsys.readouterr().err
    assert "2/5" in err and "2/7" in err and "steps/s" in err.split("2/7")[1]


def test_the_packages_logger_is_afterwards_as_before():
    logger = logging.getLogger("mlx_aimv2")
    before = (logger.level, list(logger.handlers))
    with progress():
        assert logger.isEnabledFor(logging.DEBUG)
    assert (logger.level, list(logger.handlers)) == before


def test_the_first_ten_notes_are_written_and_the_others_counted(capsys):
    with progress():
        for number in range(13):
            warnings.warn(f"note {number}", stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:10] == [f"mlx-aimv2: note: note {number}" for number in range(10)]
    assert lines[10:] == ["mlx-aimv2: note: 3 more notes like these"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["info", "x", "--frobnicate"], "unrecognized arguments: --frobnicate; see mlx-aimv2 info --help"),
        (
            ["embed", "x", "-o", "y", "--prun"],
            "unrecognized arguments: --prun (did you mean --prune?); see mlx-aimv2 embed",
        ),
        (["search", "a.db", "a", "dog"], "unrecognized arguments: dog (words that belong together need quotes)"),
    ],
)
def test_what_a_verb_does_not_take_is_named_with_the_verbs_own_help(arguments, wanted, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.startswith(f"mlx-aimv2: {wanted}")
