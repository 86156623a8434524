"""The fuzzer tells a clear refusal from a finding, and what it has found stays mended."""

import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mlx_aimv2.images import to_rgb
from tests.fuzz import __main__ as fuzz
from tests.fuzz import kinds
from tests.fuzz.mutate import broken_bytes, broken_json
from tests.fuzz.worker import judged, tried


def raising(error: BaseException):
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("config.json: not JSON"), "refused"),
        (FileNotFoundError("no such file"), "refused"),
        (ValueError("two\nlines"), "finding"),
        (ValueError(""), "finding"),
        (OSError(28, "No space left on device"), "finding"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "finding"),
        (KeyError("hidden_size"), "finding"),
        (MemoryError(), "finding"),
        (SystemExit(1), "finding"),
    ],
    ids=repr,
)
def test_only_one_clear_line_is_a_refusal(error, outcome):
    assert judged(raising(error))[0] == outcome


def test_an_input_comes_back_by_its_seed():
    for seed in range(50):
        one, two = (broken_bytes(bytes(range(97)), random.Random(f"images {seed}")) for _ in range(2))
        assert one == two
    value = {"a": [1, {"b": None}], "c": "x"}
    assert repr(broken_json(value, random.Random(3))) == repr(broken_json(value, random.Random(3)))
    assert value == {"a": [1, {"b": None}], "c": "x"}


def test_the_shares_of_the_kinds_add_up():
    jobs = fuzz.plan(list(kinds.KINDS), 20_000, 7)
    assert len(jobs) == len(set(jobs)) == 20_000
    assert {kind for kind, _ in jobs} == set(kinds.KINDS)


SILENT = "import sys, time\nprint('{\"ready\": true}', flush=True)\n"
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much memory another has, /proc says")
ENDS = {
    "hangs": ("time.sleep(300)", 1, "takes over 1 s"),
    "dies": ("sys.exit(3)", 60, "the process ended with 3"),
    "grows": ("x = b'x' * (300 << 20); time.sleep(300)", 60, "grows"),
}


@pytest.mark.parametrize("end", ["hangs", "dies", pytest.param("grows", marks=needs_proc)])
def test_a_worker_that_does_not_answer_is_a_finding(monkeypatch, end):
    code, seconds, found = ENDS[end]
    if end == "grows":
        monkeypatch.setattr(fuzz, "GROWTH", 1 << 26)
    worker = fuzz.Worker(Path(), [])
    worker.command = [sys.executable, "-c", f"{SILENT}sys.stdin.readline()\n{code}"]
    begun = time.monotonic()
    assert worker.answer(("images", 1), seconds=seconds)["detail"] == found
    worker.close()
    assert time.monotonic() - begun < 150  # nobody waits for its end


def test_a_big_tiff_whose_offset_is_no_offset_is_one_line(tmp_path):
    (tmp_path / "big.tif").write_bytes(b"II+\0" + struct.pack("<HHQ", 8, 0, 2**64 - 1) + bytes(40))
    with pytest.raises(ValueError, match=r"big\.tif"):
        to_rgb(tmp_path / "big.tif")


def test_a_library_that_panics_is_one_line(tmp_path, capsys):
    from mlx_aimv2.cli.dispatch import one_line_errors

    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    def work() -> int:
        raise PanicException("range end index 28 out of range")

    assert one_line_errors(work) == 1
    assert "PanicException: range end index 28" in capsys.readouterr().err


OTHER = next((Path(place) for place in ("/dev/shm", "/tmp") if os.access(place, os.W_OK)), None)


def test_a_finding_is_kept_in_another_file_system(tmp_path, monkeypatch):
    """Its files are made beside the whole inputs, to which they may have links; those are not kept."""
    if OTHER is None or OTHER.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here")

    def broken(rng, whole, place):
        os.link(whole / "whole.png", place / "whole.png")
        (place / "deep").mkdir()
        (place / "deep" / "broken.json").write_bytes(rng.randbytes(7))

    monkeypatch.setitem(kinds.KINDS, "made up", (broken, 1))
    with tempfile.TemporaryDirectory(dir=OTHER) as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        (whole / "whole.png").write_bytes(b"whole")
        fuzz.keep(fuzz.Finding("made up", 3, "a \udcff name"), whole, tmp_path / "kept")
    kept = sorted(path.name for path in (tmp_path / "kept" / "made up-3").rglob("*") if path.is_file())
    assert kept == ["broken.json", "finding.txt"]


@pytest.mark.parametrize(
    ("escape", "what"),
    [
        (lambda place: (place.parent / "beside").touch(), "beside"),
        (lambda place: Path("here").touch(), "here"),
        (lambda place: (place / "within").touch(), ""),
    ],
    ids=["beside", "where it runs", "within"],
)
def test_what_is_written_outside_the_target_is_a_finding(tmp_path, monkeypatch, escape, what):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(kinds.KINDS, "made up", (lambda rng, whole, place: lambda: escape(place), 1))
    found = tried("made up", 1, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert found["outcome"] == ("finding" if what else "well")
    assert what in found["detail"]


@pytest.mark.slow
def test_two_hundred_inputs_of_all_kinds_end_well_or_in_one_line(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "200", "--seed", "11", "--keep", str(tmp_path / "found")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
