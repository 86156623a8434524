"""Runs that are killed at any moment, and two runs into one target: whole results, none of them mixed."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mlx_aimv2.index.reader import Index
from tests import programs
from tests.small_training import CaptionWorkshop, Workshop, result

KILLS = 4
"""Times that each run is killed: sixty all together."""

PAIRS = 10
"""Of each run, fifty all together."""

# Every run is a process of its own, forked before MLX has started anything: its code, and the last line that it said.
FORK = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import mlx_aimv2.cli.embed_search, mlx_aimv2.cli.pretrain_lit, mlx_aimv2.learn.fit_head
from mlx_aimv2.cli import main
folder, seed, times, command = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
rng = random.Random(seed)
def started(output, *more, cache="cache"):
    said = folder / f"said-{rng.random()}"
    said.touch()
    child = os.fork()
    if child == 0:
        os.environ["MLX_AIMV2_CACHE"] = str(folder / cache)
        for number in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os._exit(main([*command, "-o", str(folder / output), *more]))
    return child, said
def ended(child, said):
    status = os.waitpid(child, 0)[1]
    lines = said.read_text().splitlines()
    said.unlink()
    return os.waitstatus_to_exitcode(status), (lines or [""])[-1]
"""

KILLED = (
    FORK
    + """
begun = time.monotonic()
runs = [["whole", 0, *ended(*started("whole"))]]
lasts = time.monotonic() - begun
for i in range(times):
    child, said = started(f"killed-{i}", cache=f"cache-{i}")
    time.sleep(rng.uniform(0, lasts))
    os.kill(child, signal.SIGKILL)
    ended(child, said)
    state = (folder / f"killed-{i}.training" / "state.safetensors").exists()
    if not (folder / f"killed-{i}").is_dir():
        runs.append([f"killed-{i}", state, *ended(*started(f"killed-{i}", *["--resume"] * state, cache=f"cache-{i}"))])
    else:
        runs.append([f"killed-{i}", "done", 0, ""])
print(json.dumps(runs))
"""
)

PAIRED = (
    FORK
    + """
runs = [[seed, ended(*started(f"whole-{seed}", "--seed", seed))] for seed in ("1", "2")]
for i in range(times):
    both = [started(f"pair-{i}", "--seed", "1")]
    time.sleep(rng.uniform(0, 0.06))
    both.append(started(f"pair-{i}", "--seed", "2"))
    runs.append([f"pair-{i}", *(ended(*one) for one in both)])
print(json.dumps(runs))
"""
)

FITS = {
    "linear": ("classify", "linear"),
    "knn": ("classify", "knn"),
    "attentive": ("classify", "attentive"),
    "lora": ("classify", "lora"),
    "dora": ("classify", "dora"),
    "full": ("classify", "full"),
    "segment linear": ("segment", "linear"),
    "segment decoder": ("segment", "decoder"),
    "segment lora": ("segment", "lora"),
    "detect decoder": ("detect", "decoder"),
    "detect full": ("detect", "full"),
}


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shops")
    return Workshop(folder / "labels"), CaptionWorkshop(folder / "captions")


def runs_of(script, shops, folder, name, times):
    """What the runs of a script say, by the names of their outputs; and the seed that their moments were drawn with."""
    labels, captions = shops
    if name in FITS:
        task, kind = FITS[name]
        command = ["fit", labels.data[task], "-m", labels.encoder, "--fine-tune-type", kind]
        command += [] if kind in ("linear", "knn") else ["--iters", 6, "--batch-size", 4, "--steps-per-eval", 1]
    elif name == "embed":
        command = ["embed", labels.data["classify"], "-m", labels.encoder]
    else:
        command = captions.words(name, "--iters", 6, "--save-every", 1)
    seed = random.randrange(1 << 30)
    words = [sys.executable, "-c", script, str(folder), str(seed), str(times), json.dumps([*map(str, command)])]
    run = subprocess.run(words, capture_output=True, text=True, env=programs.environment())
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), seed


def contents(output: Path):
    """The weights of a result, or the vectors of an index."""
    if output.is_dir():
        return result(output)
    with Index.open(output) as index:
        return {one.path: one.vector.tobytes() for one in index.embeddings()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FITS, "pretrain", "pretrain --native", "lit", "embed"])
def test_killed_at_a_random_moment_and_gone_on_with_it_is_as_if_it_had_not_been(shops, tmp_path, name):
    runs, seed = runs_of(KILLED, shops, tmp_path, name, KILLS)
    whole = contents(tmp_path / "whole")
    for output, state, code, line in runs:
        assert code == 0, (seed, state, line)
        assert contents(tmp_path / output) == whole, (seed, output, state)
    print(name, Counter(str(state) for _, state, _, _ in runs[1:]))
    left = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert left <= {"whole", "whole.training", "killed", "cache"}, (seed, left)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attentive", "lora", "full", "pretrain", "lit"])
def test_of_two_runs_into_one_target_one_is_whole_and_the_other_is_refused(shops, tmp_path, name):
    runs, seed = runs_of(PAIRED, shops, tmp_path, name, PAIRS)
    wholes = [contents(tmp_path / f"whole-{number}") for number in (1, 2)]
    assert wholes[0] != wholes[1]
    winners = Counter()
    for output, *both in runs[2:]:
        codes = [code for code, _ in both]
        assert sorted(codes) == [0, 2], (seed, both)
        refusal = both[codes.index(2)][1]
        assert "another process is writing there" in refusal or "already exists" in refusal, refusal
        assert contents(tmp_path / output) == wholes[codes.index(0)], seed
        winners[codes.index(0)] += 1
    print(name, winners)
    left = sorted({path.name.split("-")[0] for path in tmp_path.iterdir()})
    assert left == ["cache", "pair", "whole"], left
    assert not list((tmp_path / "cache" / "locks").iterdir())
