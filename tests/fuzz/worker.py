"""A process that takes one input after another and says how each ended; its parent watches time and memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

LONGEST_LINE = 2000


def main() -> None:
    """Reads `kind seed` a line on stdin, and writes a line of JSON for each on what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)  # decoders in C write what they find strange
    whole = Path(sys.argv[1])
    names = sys.argv[2].split(",")
    if "hub" in names:
        from tests.fuzz.hub import set_environment

        set_environment()
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ |= {"MLX_AIMV2_CACHE": str(whole / "cache"), "HOME": str(whole / "home")}
    from tests.fuzz import kinds

    kinds.prepare(names)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        kind, seed = line.split()
        print(json.dumps(tried(kind, int(seed), whole)), file=answers, flush=True)


def tried(kind: str, seed: int, whole: Path, *, keep: Path | None = None) -> dict[str, object]:
    """Makes one input and uses it: `-> {"outcome": "well" | "refused" | "finding", "detail": …, "growth": bytes}`."""
    from tests.fuzz.kinds import KINDS

    around = Path(tempfile.mkdtemp(prefix="fuzz-"))
    place, nowhere = around / "a" / "input", around / "nowhere"
    for folder in (place, nowhere):
        folder.mkdir(parents=True)
    os.chdir(nowhere)
    try:
        call = KINDS[kind][0](random.Random(f"{kind} {seed}"), whole, place)
        if keep is not None:
            shutil.copytree(place, keep, dirs_exist_ok=True)
        before, peak = resident(), _peak()
        outcome, detail = judged(call)
        growth = _peak() - before if _peak() > peak else 0
        left = [str(path) for path in around.rglob("*") if place not in (path, *path.parents)]
        if sorted(left) != [str(place.parent), str(nowhere)]:
            outcome, detail = "finding", f"written outside its target: {left}"
        return {"outcome": outcome, "detail": detail, "growth": growth}
    finally:
        shutil.rmtree(around, ignore_errors=True)


def judged(call: object) -> tuple[str, str]:
    """Whether a call ends well, is refused in one clear line, or in anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()  # type: ignore[operator]
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, UnicodeError | json.JSONDecodeError):
            return "finding", f"{type(error).__name__}: {_trace()}"
        if not text.strip() or len(text.splitlines()) != 1 or len(text) > LONGEST_LINE or text.startswith("[Errno"):
            return "finding", f"no clear line: {type(error).__name__}({text[:300]!r}): {_trace()}"
        return "refused", text
    except BaseException:
        return "finding", _trace()
    return "well", ""


def resident() -> int:
    """Bytes of this process in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: the peak is the best that is known
        return _peak()


def _peak() -> int:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def _trace() -> str:
    lines = traceback.format_exc().strip().splitlines()
    return "\n".join(lines if len(lines) < 40 else [*lines[:4], "…", *lines[-30:]])


if __name__ == "__main__":
    main()
