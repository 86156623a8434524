"""`python -m tests.mutations`: breaks a copy of the package in one place at a time, and says which test notices.

It prints a table in Markdown and ends with 1 if a fault was not noticed. `--only WORDS` tries those whose names hold
the words.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.util import cache_from_source
from pathlib import Path

from tests.mutations import Mutation
from tests.mutations.checkpoints import CHECKPOINTS
from tests.mutations.learning import LEARNING
from tests.mutations.network import NETWORK

ROOT = Path(__file__).parents[2]

MUTATIONS = (*NETWORK, *CHECKPOINTS, *LEARNING)

SECONDS = 120
"""A fault that keeps its tests running longer than this counts as noticed."""

SURVIVED = "SURVIVED"

FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


def counted(mutation: Mutation, root: Path) -> int:
    """How often the text that is to be replaced stands in its file: it must be once."""
    return (root / mutation.file).read_text(encoding="utf-8").count(mutation.old)


def copied(root: Path, target: Path) -> None:
    """Copies what git tracks, and what it would: no environment, no caches."""
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0"):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


def run_tests(place: Path, tests: Iterable[str]) -> str | None:
    """The first test that fails, None if all pass. Raises RuntimeError where they cannot be run at all."""
    # A mutated file may have the size and the second of the file before: nothing compiled is kept.
    environment = os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    try:
        run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"not finished after {SECONDS} s"
    if run.returncode == 0:
        return None
    if run.returncode != 1 or (found := FAILED.search(run.stdout)) is None:
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return found[1].split("[")[0]


def tried(mutation: Mutation, place: Path) -> str:
    """The test that notices a mutation, or `SURVIVED`; the file is as before when this ends."""
    file = place / mutation.file
    before = file.read_text(encoding="utf-8")
    try:
        Path(cache_from_source(str(file))).unlink(missing_ok=True)
        file.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
        return run_tests(place, mutation.tests) or SURVIVED
    finally:
        file.write_text(before, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tests without a mutation and then with each; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="mutations whose names hold these words")
    only = parser.parse_args(argv).only
    chosen = [mutation for mutation in MUTATIONS if only in mutation.name]
    if not chosen:
        parser.error(f"no mutation's name holds {only!r}")
    if wrong := [mutation.name for mutation in chosen if counted(mutation, ROOT) != 1]:
        parser.error(f"the text to replace must stand once in its file, it does not for: {'; '.join(wrong)}")
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        place = Path(folder)
        copied(ROOT, place)
        if (failed := run_tests(place, sorted({test for mutation in chosen for test in mutation.tests}))) is not None:
            print(f"{failed} fails without any mutation: mend that first", file=sys.stderr)
            return 2
        print("| Fault | File | Noticed by | Seconds |\n|---|---|---|---|", flush=True)
        survivors = 0
        for mutation in chosen:
            began = time.monotonic()
            by = tried(mutation, place)
            survivors += by == SURVIVED
            seconds = time.monotonic() - began
            print(f"| {mutation.name} | `{mutation.file}` | `{by}` | {seconds:.1f} |", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} noticed", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
