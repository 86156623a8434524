"""`python -m tests.mutations`: breaks a copy of the package in one place at a time, and says which test notices.

It prints a table in Markdown and ends with 1 if a fault was not noticed, or could not be tried because the code has
changed. `--only WORDS` tries those whose names hold the words; some copies are tried side by side.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import cache_from_source
from pathlib import Path
from queue import SimpleQueue

from tests.mutations import Mutation
from tests.mutations.checkpoints import CHECKPOINTS
from tests.mutations.learning import LEARNING
from tests.mutations.network import NETWORK
from tests.mutations.results import RESULTS
from tests.mutations.serve import SERVE
from tests.mutations.training import TRAINING

ROOT = Path(__file__).parents[2]

PACKAGE = "mlx_aimv2"

MUTATIONS = (*NETWORK, *CHECKPOINTS, *LEARNING, *TRAINING, *RESULTS, *SERVE)

SECONDS = 300
"""A fault that keeps its tests running longer than this counts as noticed."""

UNBROKEN_SECONDS = 1800
"""What all tests together may take before anything is broken."""

SURVIVED = "SURVIVED"

FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class MisfitError(Exception):
    """A mutation does not fit the code or the tests as they are now."""


def file_of(mutation: Mutation, root: Path) -> Path:
    """The file that a mutation changes. Raises MisfitError where it would change no one place, or leave no program."""
    sources = {file: file.read_text(encoding="utf-8") for file in sorted((root / PACKAGE).rglob("*.py"))}
    found = {file: count for file, text in sources.items() if (count := text.count(mutation.old))}
    if sum(found.values()) != 1:
        places = ", ".join(str(file.relative_to(root)) for file in found) or "nowhere"
        raise MisfitError(f"its text must stand once in {PACKAGE}/, it stands {sum(found.values())} times: {places}")
    (file,) = found
    try:
        compile(sources[file].replace(mutation.old, mutation.new), str(file), "exec")
    except SyntaxError as error:
        raise MisfitError(f"{file.relative_to(root)} is no program with it: {error}") from None
    for test in mutation.tests:
        path, _, name = test.partition("[")[0].partition("::")
        if not (root / path).exists() or f"def {name}" not in (root / path).read_text(encoding="utf-8"):
            raise MisfitError(f"there is no test {test}")
    return file


def copied(root: Path, target: Path) -> None:
    """Copies what git tracks, and what it would: no environment, no caches."""
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0"):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


def run_tests(place: Path, tests: Iterable[str], *, seconds: int = SECONDS) -> str | None:
    """The first test that fails, None if all pass. Raises RuntimeError where they cannot be run at all."""
    # A mutated file may have the size and the second of the file before: nothing compiled is kept.
    # A temporary folder for each copy: two pytests that clean up one folder get in each other's way.
    own = place / "tmp"
    own.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(own)}
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
        run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds} s"
    if run.returncode == 0:
        return None
    if run.returncode != 1:
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    found = FAILED.search(run.stdout)  # none where a warning about what was left open ends pytest itself
    return found[1].split("[")[0] if found else "a warning at the end"


def tried(mutation: Mutation, file: Path, place: Path) -> str:
    """The test that notices a mutation of the file, or `SURVIVED`; the file is as before when this ends."""
    before = file.read_text(encoding="utf-8")
    try:
        Path(cache_from_source(str(file))).unlink(missing_ok=True)
        file.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
        return run_tests(place, mutation.tests) or SURVIVED
    finally:
        file.write_text(before, encoding="utf-8")


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT, mutations: Sequence[Mutation] = MUTATIONS) -> int:
    """Runs the tests without a mutation and then with each; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="mutations whose names hold these words")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="copies at once")
    arguments = parser.parse_args(argv)
    only, workers = arguments.only, max(1, arguments.workers)
    chosen = [mutation for mutation in mutations if only in mutation.name]
    if not chosen:
        parser.error(f"no mutation's name holds {only!r}")
    with ExitStack() as stack:
        places = [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutations-"))) for _ in range(workers)]
        for place in places:
            copied(root, place)
        files: dict[str, Path] = {}
        misfits: list[str] = []
        for mutation in chosen:
            try:
                if mutation.name in files:
                    raise MisfitError("another mutation has this name")
                files[mutation.name] = file_of(mutation, places[0]).relative_to(places[0])
            except MisfitError as error:
                misfits.append(f"{mutation.name}: {error}")
        fitting = [mutation for mutation in chosen if mutation.name in files]
        tests = sorted({test for mutation in fitting for test in mutation.tests})
        if tests and (failed := run_tests(places[0], tests, seconds=UNBROKEN_SECONDS)) is not None:
            print(f"{failed} fails without any mutation: mend that first", file=sys.stderr)
            return 2
        print("| Fault | File | Noticed by | Seconds |\n|---|---|---|---|", flush=True)
        free: SimpleQueue[Path] = SimpleQueue()
        for place in places:
            free.put(place)

        def survives(mutation: Mutation) -> bool:
            place, file = free.get(), files[mutation.name]
            began = time.monotonic()
            try:
                by = tried(mutation, place / file, place)
            finally:
                free.put(place)
            print(f"| {mutation.name} | `{file}` | `{by}` | {time.monotonic() - began:.1f} |", flush=True)
            return by == SURVIVED

        with ThreadPoolExecutor(workers) as pool:
            survivors = sum(pool.map(survives, fitting))
    print(f"{len(fitting) - survivors} of {len(chosen)} noticed", file=sys.stderr)
    for misfit in misfits:
        print(f"not tried, {misfit}", file=sys.stderr)
    return 1 if survivors or misfits else 0


if __name__ == "__main__":
    sys.exit(main())
