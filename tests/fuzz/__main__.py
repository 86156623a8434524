"""`python -m tests.fuzz`: 20,000 broken inputs, each in a worker process with 20 seconds and a gigabyte to grow.

Anything but a result or one clear line is a finding: it is printed with its kind and seed, and its files are kept.
`--kind KIND --seed SEED --inputs 1` brings one back.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import random
import select
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz import kinds

SECONDS = 20.0
START_SECONDS = 120.0
GROWTH = 1 << 30
POLL = 0.05
IN_MEMORY = "/dev/shm"

Job = tuple[str, int]


@dataclass
class Finding:
    """An input that did not end as it should."""

    kind: str
    seed: int
    what: str


class Worker:
    """A process that is replaced when an input has ended or stopped it."""

    def __init__(self, whole: Path, names: list[str]) -> None:
        """Starts when the first input comes."""
        self.command = [sys.executable, "-m", "tests.fuzz.worker", str(whole), ",".join(names)]
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def answer(self, job: Job, *, seconds: float = SECONDS) -> dict[str, Any]:
        """Has one input tried: `-> {"outcome", "detail", "growth"}`; a worker that hangs or grows is killed."""
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.buffer = b""
            if "ready" not in self._line(START_SECONDS):
                raise RuntimeError("the worker does not start: python -m tests.fuzz.worker says why")
        assert self.process.stdin is not None
        self.process.stdin.write(f"{job[0]} {job[1]}\n".encode())
        self.process.stdin.flush()
        return self._line(seconds)

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _line(self, seconds: float) -> dict[str, Any]:
        process = self.process
        assert process is not None and process.stdout is not None
        until, start = time.monotonic() + seconds, _resident(process.pid)
        while b"\n" not in self.buffer:
            grown = _resident(process.pid) - start
            if time.monotonic() > until or grown > 2 * GROWTH:
                self.close()
                return {"outcome": "finding", "detail": "grows" if grown > GROWTH else f"takes over {seconds:g} s"}
            if select.select([process.stdout], [], [], POLL)[0]:
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    code = process.wait()
                    self.close()
                    return {"outcome": "finding", "detail": f"the process ended with {code}"}
                self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        if found.get("growth", 0) > GROWTH:
            found |= {"outcome": "finding", "detail": f"grew by {found['growth'] / 1e9:.1f} GB"}
        return found


def main() -> int:
    """Runs as the flags say; 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="how many in all (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the first input; each further one has the next (default: random)")
    parser.add_argument("--kind", nargs="+", choices=list(kinds.KINDS), help="only these kinds")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where findings go (%(default)s)")
    arguments = parser.parse_args()
    names = arguments.kind or kinds.available()
    seed = random.SystemRandom().randrange(1 << 30) if arguments.seed is None else arguments.seed
    jobs = plan(names, arguments.inputs, seed)
    print(f"fuzz: seed {seed}, {len(jobs):,} inputs: {', '.join(names)}")
    begun = time.monotonic()
    if os.access(IN_MEMORY, os.W_OK):
        os.environ["TMPDIR"] = tempfile.tempdir = IN_MEMORY  # a disk takes longer to sync than an input to be tried
    with tempfile.TemporaryDirectory(prefix="fuzz-whole-") as folder:
        kinds.make_whole_inputs(Path(folder))
        before = _stamps(Path(folder))
        counts, findings = run(jobs, Path(folder), names, arguments.workers)
        if changed := set(before.items()) ^ set(_stamps(Path(folder)).items()):
            print(f"fuzz: FINDING inputs were changed: {sorted({name for name, _ in changed})}")
            findings.append(Finding("whole", seed, f"changed: {sorted(changed)}"))
        for finding in findings:
            keep(finding, Path(folder), arguments.keep)
    for name in names:
        each = ", ".join(f"{counts[name, outcome]:,} {outcome}" for outcome in ("well", "refused", "finding"))
        print(f"fuzz: {name}: {each}")
    print(f"fuzz: {len(jobs):,} inputs in {time.monotonic() - begun:.0f} s, {len(findings)} findings")
    return 1 if findings else 0


def plan(names: list[str], inputs: int, seed: int) -> list[Job]:
    """Which inputs are tried: each kind's share of them, with seeds that follow each other."""
    shares = {name: kinds.KINDS[name][1] for name in names}
    total, done, jobs = sum(shares.values()), 0, []
    for number, (name, share) in enumerate(shares.items(), start=1):
        count = inputs - done if number == len(shares) else round(inputs * share / total)
        jobs += [(name, seed + i) for i in range(count)]
        done += count
    return jobs


def run(
    jobs: list[Job], whole: Path, names: list[str], workers: int
) -> tuple[collections.Counter[tuple[str, str]], list[Finding]]:
    """Has every input tried by one of some workers; prints findings as they come."""
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    findings: list[Finding] = []
    lock = threading.Lock()

    def work() -> None:
        worker = Worker(whole, names)
        try:
            while True:
                try:
                    kind, seed = todo.get_nowait()
                except queue.Empty:
                    return
                answer = worker.answer((kind, seed))
                with lock:
                    counts[kind, answer["outcome"]] += 1
                    if answer["outcome"] == "finding":
                        findings.append(Finding(kind, seed, answer["detail"]))
                        print(f"fuzz: FINDING --kind {kind} --seed {seed} --inputs 1\n{answer['detail']}\n", flush=True)
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts, findings


def keep(finding: Finding, whole: Path, folder: Path) -> None:
    """Makes the input again and puts its files aside; it is not used."""
    place = folder / f"{finding.kind}-{finding.seed}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "finding.txt").write_text(finding.what + "\n", errors="backslashreplace")
    # Beside the whole inputs, to whose files it may have links, which lead into no other file system.
    with tempfile.TemporaryDirectory(dir=whole.parent) as made:
        if finding.kind in kinds.KINDS and finding.kind != "hub":
            kinds.KINDS[finding.kind][0](random.Random(f"{finding.kind} {finding.seed}"), whole, Path(made))
        for file in Path(made).rglob("*"):
            if file.is_file() and file.stat().st_nlink == 1:  # the others are links to whole ones
                target = place / file.relative_to(made)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, by which one shows that was written to."""
    files = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.relative_to(folder).parts)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
