"""Losing a stream stops no work, every error is one line, and nothing raw reaches the terminal."""

import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_aimv2 import bundled
from mlx_aimv2.cli import main
from mlx_aimv2.cli.dispatch import TRACEBACK, one_line_errors
from mlx_aimv2.cli.output import MAX_LINE, MAX_RESULT, as_line, show
from tests import programs
from tests.small_models import FIXED, edit_config, pair_with_words

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
PHOTOGRAPH = str(bundled.photographs()[0])
SLOW = 60
"""Seconds that a slow import or decoder takes: a run that Ctrl-C ends has ended long before."""


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = command.replace("mlx-aimv2", f"{shlex.quote(sys.executable)} -m mlx_aimv2")
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=folder, env=programs.environment(**environment)
    )


@pytest.mark.parametrize("lost", [pytest.param("2>/dev/full", marks=needs_full), "2>&-", "2>&1 >/dev/null | head -1"])
def test_a_conversion_without_a_reader_of_stderr_is_done_all_the_same(tmp_path, lost):
    command = f"set -o pipefail; mlx-aimv2 convert --hf-path {shlex.quote(str(FIXED))} --mlx-path mlx --no-verify"
    assert shell(f"{command} {lost}", tmp_path).returncode == 0
    assert (tmp_path / "mlx" / "model.safetensors").is_file()


@pytest.mark.parametrize("lost", [pytest.param("2>/dev/full", marks=needs_full), "2>&-", "2> >(true)"])
def test_without_a_reader_of_stderr_a_mistake_is_no_success(tmp_path, lost):
    assert shell(f"mlx-aimv2 convert --hf-path nowhere --mlx-path mlx {lost}", tmp_path).returncode == 2


@needs_full
def test_a_full_disk_below_stdout_is_no_success(tmp_path):
    result = shell(f"mlx-aimv2 info {shlex.quote(str(FIXED))} >/dev/full", tmp_path)
    assert (result.returncode, result.stderr) == (2, "mlx-aimv2: No space left on device\n")


def test_maps_are_drawn_although_nobody_reads_their_names(tmp_path):
    many = tmp_path / "in"
    many.mkdir()
    for number in range(4):
        shutil.copy(PHOTOGRAPH, many / f"{number}.jpg")
    result = shell(f"set -o pipefail; mlx-aimv2 map in -m {shlex.quote(str(FIXED))} -o out | true", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_labels_are_json_under_an_ascii_locale(tmp_path):
    lit = pair_with_words(tmp_path / "lit")
    command = f"mlx-aimv2 classify {shlex.quote(PHOTOGRAPH)} -m {shlex.quote(str(lit))} --labels käse,hund --json"
    result = shell(command, tmp_path, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONCOERCECLOCALE="0")
    assert result.returncode == 0, result.stderr
    (labels,) = [{one["label"] for one in json.loads(line)["labels"]} for line in result.stdout.splitlines()]
    assert "hund" in labels and len(labels) == 2


ERRORS = {
    "memory": (MemoryError("cannot allocate 5 GB"), "not enough memory (cannot allocate 5 GB)"),
    "type": (TypeError("'int' object is not iterable"), "a bug in mlx-aimv2, TypeError: 'int' object"),
    "import": (ModuleNotFoundError("No module named 'tokenizers'"), "No module named 'tokenizers': a package is miss"),
    "MLX": (RuntimeError("[eval] Not implemented\non the CPU"), "RuntimeError: [eval] Not implemented\\x0aon the CPU"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth"),
}


@pytest.mark.parametrize(("error", "wanted"), ERRORS.values(), ids=ERRORS.keys())
def test_what_nobody_thought_of_is_one_line_too(capsys, error, wanted, monkeypatch):
    def work() -> int:
        raise error

    monkeypatch.delenv(TRACEBACK, raising=False)
    assert one_line_errors(work) == 1
    found = capsys.readouterr().err
    assert wanted in found and found.startswith("mlx-aimv2: ") and found.count("\n") == 1


def test_the_traceback_can_be_had(capsys, monkeypatch):
    monkeypatch.setenv(TRACEBACK, "1")
    assert one_line_errors(lambda: 1 // 0) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and "lambda: 1 // 0" in "".join(lines)
    assert lines[-1].startswith("mlx-aimv2: a bug in mlx-aimv2, ZeroDivisionError")


def test_a_broken_pipe_of_something_else_is_no_success(capsys):
    def work() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    assert one_line_errors(work) == 2
    assert capsys.readouterr().err == "mlx-aimv2: Broken pipe\n"


@pytest.mark.parametrize("program", ["-m mlx_aimv2 convert", "-m mlx_aimv2.convert"])
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path, program):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text(f"print('importing', flush=True)\nimport time\ntime.sleep({SLOW})\n")
    ours = programs.environment()
    path = ours | {"PYTHONPATH": f"{tmp_path}:{ours['PYTHONPATH']}"}
    with programs.running(sys.executable, *program.split(), "--model", str(FIXED), env=path, cwd=tmp_path) as run:
        assert run.stdout.readline() == "importing\n"
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=SLOW / 2)
    assert (run.returncode, errors) == (130, "mlx-aimv2: stopped\n")


def test_an_import_that_a_signal_breaks_is_no_broken_package(capsys):
    """A module in C that is interrupted while it is loaded says ImportError, which asks to reinstall it."""

    def work() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise ImportError("numpy._core.multiarray failed to import")

    assert one_line_errors(work) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "mlx-aimv2: stopped (SIGTERM)\n"


LONG = {
    "an error": lambda name: ["info", name],
    "an argument": lambda name: ["map", "x.jpg", f"--{name}"],
    "a verb": lambda name: [name],
    "a label": lambda name: ["fit", ".", "-m", str(FIXED), "-o", "head", "--labels", name],
}


@pytest.mark.parametrize("words", LONG.values(), ids=LONG)
@pytest.mark.parametrize("name", ["n" * 100_000, "a b " * 25_000, "\x1b" * 30_000], ids=["word", "words", "escaped"])
def test_a_line_is_shortened_where_it_is_written(tmp_path, monkeypatch, capsys, words, name):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        main(words(name))
    out, err = capsys.readouterr()
    assert err and max(map(len, (out + err).splitlines())) <= len("mlx-aimv2: ") + MAX_LINE


def test_a_shortened_line_keeps_its_start_and_its_advice():
    line = as_line(f"start {'n' * 100_000} advice")
    assert MAX_LINE - 2 <= len(line) <= MAX_LINE and line.startswith("start n") and line.endswith("n advice")
    assert f" … ({100_013:,} characters) … " in line
    assert as_line("n" * MAX_LINE) == "n" * MAX_LINE


def test_a_result_is_shortened_beyond_any_path(capsys):
    show("p" * 4096)
    show("p" * 100_000)
    whole, cut = capsys.readouterr().out.splitlines()
    assert len(whole) == 4096 and MAX_RESULT - 2 <= len(cut) <= MAX_RESULT


def test_control_characters_of_headers_and_arguments_are_escaped(tmp_path, capsys):
    escape = "\x1b]0;title\x07"
    folder = Path(shutil.copytree(FIXED, tmp_path / "fixed"))
    edit_config(folder, rms_norm_eps=escape)
    for arguments in (["info", str(folder)], ["info", f"/no{escape}where"], ["map", escape, "-m", escape]):
        assert main(arguments) in (1, 2)
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\x07" not in out + err
        assert "\\x1b]0;title\\x07" in err


def test_one_ctrl_c_stops_a_run_and_a_second_one_a_slow_decoder(tmp_path):
    code = f"""
import sys, time
from mlx_aimv2 import images
from mlx_aimv2.cli import main
from mlx_aimv2.cli.dispatch import TRACEBACK, one_line_errors
from mlx_aimv2.embed import loader
def slowly(*_, **__):
    print("decoding", flush=True)
    time.sleep({SLOW})
loader.open_image = slowly
sys.exit(main(["embed", {PHOTOGRAPH!r}, "-m", {str(FIXED)!r}, "-o", "photos.db"]))
"""
    with programs.running(sys.executable, "-c", code, cwd=tmp_path) as run:
        assert run.stdout.readline() == "decoding\n"
        run.send_signal(signal.SIGINT)
        assert run.stderr.readline() == "mlx-aimv2: stopped; nothing is stored yet; run it again to continue\n"
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=SLOW / 2)
    assert errors == ""
    assert run.returncode == 130
    assert not list(tmp_path.iterdir())
