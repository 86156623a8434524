"""What a newcomer meets in the first hour: defaults that suit the machine, mistakes in one line, equal exit codes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_aimv2.backend import device
from mlx_aimv2.bundled import emoji_checkpoint, photographs
from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from mlx_aimv2.index.reader import Index
from mlx_aimv2.loading import Source

IMAGE = str(photographs()[0])


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> str:
    """The bundled pair in float16."""
    return str(convert(emoji_checkpoint(), tmp_path_factory.mktemp("half") / "pair", dtype="float16", verify=False))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with a cache of its own."""
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# dtypes


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("embed", (IMAGE, "-m", "HALF", "-o", "a.db")),
        ("classify", (IMAGE, "-m", "HALF", "--labels", "cat,dog")),
        ("map", (IMAGE, "-m", "HALF")),
        ("compare", (str(emoji_checkpoint()), "HALF")),
    ],
)
def test_a_half_checkpoint_runs_in_what_suits_the_machine(verb, arguments, half, capsys, monkeypatch):
    used: list[mx.Dtype] = []

    def load(source: Source, **settings: object) -> object:
        loaded = real(source, **settings)
        used.append(loaded.model.dtype)
        return loaded

    real = Source.load
    monkeypatch.setattr(Source, "load", load)
    arguments = tuple(half if argument == "HALF" else argument for argument in arguments)
    for on, auto in (("cpu", mx.float32), ("metal", mx.bfloat16)):
        monkeypatch.setattr(device, "machine", lambda kind=on: device.Machine(kind, "a chip", None))
        for flags, wanted in (((), auto), (("--dtype", "float16"), mx.float16)):
            Path("a.db").unlink(missing_ok=True)
            assert run(capsys, verb, *arguments, *flags)[0] == 0
            assert used[-1] == wanted, (on, flags)


def test_an_index_keeps_the_dtype_that_it_was_made_with(half, capsys):
    assert run(capsys, "embed", IMAGE, "-m", half, "-o", "a.db", "--dtype", "float16")[0] == 0
    for arguments in ((), ("-m", half)):
        code, _, err = run(capsys, "embed", photographs()[1], "-o", "a.db", *arguments)
        assert (code, "differently" in err) == (0, False)
    with Index.open(Path("a.db")) as index:
        assert (len(index), index.provenance["dtype"]) == (2, "float16")
