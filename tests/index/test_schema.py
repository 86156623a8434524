"""A file whose schema holds what an index has not is refused, and an index is made whole or not at all."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_aimv2
from mlx_aimv2.cli import main
from mlx_aimv2.files import UNFINISHED
from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.index.writer import IndexWriter

WIDTH = 7
ENDLESS = (
    "DROP TABLE images; CREATE VIEW images AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
    "SELECT n AS id, x'2f61' AS path, 1 AS size, 1 AS mtime_ns, x'00' AS sha256, 1.0 AS length, NULL AS rows, "
    "NULL AS columns, 1 AS block FROM r"
)
EMPTIES = "CREATE TRIGGER t BEFORE INSERT ON images BEGIN DELETE FROM images; DELETE FROM blocks; END"
TAMPERED = {
    "a view in place of a table": (ENDLESS, "view"),
    "a view besides": ("CREATE VIEW v AS SELECT 1", "view"),
    "a trigger": (EMPTIES, "trigger"),
    "another table": ("CREATE TABLE more (x)", "table"),
    "a generated column": ("ALTER TABLE images ADD COLUMN g INTEGER GENERATED ALWAYS AS (id * 2)", "table"),
    "an index of an expression": ("CREATE INDEX i ON images (abs(size))", "index"),
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(3).normal(size=(5, WIDTH)).astype(np.float32)
    with IndexWriter.create("photos.db", provenance={}, width=WIDTH, dtype="float16") as index:
        index.add(Embedding(f"/{number}.jpg", 5, 6, bytes(32), vector) for number, vector in enumerate(vectors))
    return Path("photos.db")


def change(path: Path, script: str) -> None:
    db = sqlite3.connect(path)
    db.executescript(script)
    db.close()


@pytest.mark.parametrize(("script", "kind"), TAMPERED.values(), ids=TAMPERED.keys())
def test_code_in_the_schema_is_refused_before_it_runs(photos, script, kind, capsys):
    change(photos, script)
    for opener in (Index, IndexWriter):
        with pytest.raises(ValueError, match=f"photos.db is damaged or was tampered with: it has the {kind} "):
            opener.open(photos)
    for arguments in (["info", "photos.db"], ["search", "photos.db", "x"], ["embed", "x", "-o", "photos.db"]):
        assert main(arguments) == 2
        assert "tampered" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["images", "blocks"])
def test_an_index_without_one_of_its_tables_is_damaged_as_soon_as_it_is_opened(photos, table):
    change(photos, f"DROP TABLE {table}")
    with pytest.raises(ValueError, match=f"photos.db is damaged .no such table: {table}"):
        Index.open(photos)


def test_another_programs_database_is_not_taken_for_an_index_that_was_begun(tmp_path):
    change(tmp_path / "other.db", "PRAGMA application_id = 7")
    with pytest.raises(FileExistsError, match=r"other\.db already exists"):
        IndexWriter.create(tmp_path / "other.db", provenance={}, width=WIDTH, dtype="float16")


def test_what_sqlite_itself_adds_is_no_offence(photos):
    change(photos, "ANALYZE; VACUUM")
    with Index.open(photos) as index:
        assert len(index.search(np.ones(WIDTH), 9)) == 5


def test_an_index_of_an_earlier_release_is_known_without_its_comments(photos):
    change(photos, "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = replace(sql, '  -- ', ' --older ')")
    with Index.open(photos) as index:
        assert len(index) == 5


def test_functions_with_side_effects_are_off(photos):
    with Index.open(photos) as index:
        assert index._db.execute("PRAGMA trusted_schema").fetchone() == (0,)


def test_a_width_that_would_ask_for_all_memory_is_damage(photos):
    change(photos, "UPDATE about SET value = '1000000000000' WHERE name = 'width'")
    with pytest.raises(ValueError, match="is damaged"):
        Index.open(photos)


KILLED = """
import os, signal, sqlite3, sys
from mlx_aimv2.index import writer
moment, connect = int(sys.argv[1]), writer.connect
class Dying(sqlite3.Connection):
    done = 0
    def _step(self, what, *arguments):
        if Dying.done == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        Dying.done += 1
        return getattr(super(), what)(*arguments)
    def executescript(self, *a): return self._step("executescript", *a)
    def executemany(self, *a): return self._step("executemany", *a)
    def execute(self, *a): return self._step("execute", *a)
real = sqlite3.connect
sqlite3.connect = lambda *a, **k: real(*a, factory=Dying, **k)
writer.IndexWriter.create("photos.db", provenance={}, width=7, dtype="float16").close()
"""


@pytest.mark.parametrize("moment", range(5))
def test_killed_while_the_index_is_made_there_is_none(tmp_path, moment):
    command = [sys.executable, "-c", KILLED, str(moment)]
    environment = os.environ | {"PYTHONPATH": str(Path(mlx_aimv2.__file__).parents[1])}
    code = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode
    assert code in (0, -signal.SIGKILL)
    left = [path.name for path in tmp_path.iterdir() if not path.name.endswith(UNFINISHED)]
    assert left in ([], ["photos.db"])
    if left:
        Index.open(tmp_path / "photos.db").close()
    IndexWriter.create(tmp_path / "other.db", provenance={}, width=7, dtype="float16").close()
    if not left:
        IndexWriter.create(tmp_path / "photos.db", provenance={}, width=7, dtype="float16").close()
    IndexWriter.open(tmp_path / "photos.db").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.db", "photos.db"]


def test_two_that_make_one_index_end_with_one(photos, tmp_path):
    shutil.copy(photos, "kept.db")
    with pytest.raises(FileExistsError, match="already exists"):
        IndexWriter.create(photos, provenance={}, width=7, dtype="float16")
    assert photos.read_bytes() == Path("kept.db").read_bytes()
