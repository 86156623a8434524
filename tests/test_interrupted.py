"""A run that is killed at any moment leaves an index that the next run completes, vector for vector."""

import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.cli import main
from mlx_aimv2.embed.loader import CHUNK
from mlx_aimv2.index.reader import Index
from tests.programs import running

FIXED = Path(__file__).parent / "golden" / "reference" / "fixed"
IMAGES = 9 * CHUNK + 13
KILLS = 20

# Commits after every chunk and decodes slowly, so that a kill meets every stage of the work.
DRIVER = """
import sys, time
from mlx_aimv2.cli import main
from mlx_aimv2.embed import job, loader
job.COMMIT_SECONDS = 0
read = loader.read_image_file
def slowly(path):
    time.sleep(0.003)
    return read(path)
loader.read_image_file = slowly
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dice = np.random.default_rng(4)
    Path("in").mkdir()
    for number in range(IMAGES):
        low = Image.fromarray(dice.integers(0, 256, (4, 4, 3), np.uint8))
        low.resize((44, 42), Image.Resampling.BILINEAR).save(f"in/{number:03d}.png", compress_level=1)
    Path("in/100a.png").write_bytes(b"broken")  # tried again in every run, which must not shift the batches
    return tmp_path


@contextlib.contextmanager
def started() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", DRIVER, "embed", "in", "-m", str(FIXED), "-o", "killed.db"]
    with running(*command, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def contents(name: str) -> dict[str, tuple[object, ...]]:
    with Index.open(name) as index:
        return {one.path: (one.size, one.mtime_ns, one.sha256, one.vector.tobytes()) for one in index.embeddings()}


@pytest.mark.slow
def test_a_killed_run_is_completed_by_the_next_one(folder):
    assert main(["embed", "in", "-m", str(FIXED), "-o", "whole.db"]) == 1  # one image is broken
    whole = contents("whole.db")
    assert len(whole) == IMAGES
    begun = time.monotonic()
    with started() as process:
        process.communicate()
    lasts = time.monotonic() - begun
    dice = random.Random(7)
    Path("killed.db").unlink()
    found = set()
    for _ in range(KILLS):
        with started():  # and killed at the end of the block
            time.sleep(dice.uniform(0, 0.8 * lasts))
        if Path("killed.db").exists() and Path("killed.db").stat().st_size:
            partly = contents("killed.db")
            assert partly.items() <= whole.items()
            found.add(len(partly))
            with sqlite3.connect("killed.db") as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            database.close()
            if len(partly) == len(whole):
                Path("killed.db").unlink()
    assert len(found) >= 2  # the kills met different stages
    assert main(["embed", "in", "-m", str(FIXED), "-o", "killed.db"]) == 1
    assert contents("killed.db") == whole
    assert sorted(file.name for file in folder.iterdir()) == ["in", "killed.db", "whole.db"]


def test_ctrl_c_keeps_what_was_done(folder):
    with started() as process:
        while not (Path("killed.db").exists() and Path("killed.db").stat().st_size and contents("killed.db")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode in (130, 1)  # 1 where it was done already
    with Index.open("killed.db") as index:
        assert len(index) >= CHUNK
