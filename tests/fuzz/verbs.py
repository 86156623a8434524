"""Commands with hostile names among their arguments: each ends with a code from 0 to 2 and short lines."""

from __future__ import annotations

import io
import os
import random
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

LONGEST_LINE = 1020
"""Characters of a line on stderr: `output.MAX_LINE` with the name of the program before it."""

VERBS: dict[str, tuple[str, ...]] = {
    "embed": ("NAME", "-m", "MODEL", "-o", "OUT"),
    "embed -o": ("IMAGE", "-m", "MODEL", "-o", "NAME"),
    "embed --exclude": ("IMAGE", "-m", "MODEL", "-o", "OUT", "--exclude", "NAME"),
    "search": ("INDEX", "NAME"),
    "search index": ("NAME", "IMAGE"),
    "classify": ("IMAGE", "NAME", "-m", "PAIR", "--labels", "a,b"),
    "classify --labels": ("IMAGE", "-m", "PAIR", "--labels", "NAME,NAME"),
    "map": ("NAME", "-m", "MODEL", "-o", "OUT"),
    "map -o": ("IMAGE", "-m", "MODEL", "-o", "NAME"),
    "info": ("NAME",),
    "convert": ("--hf-path", "NAME", "--mlx-path", "OUT", "--no-verify"),
    "convert --mlx-path": ("--hf-path", "MODEL", "--mlx-path", "NAME", "--no-verify"),
    "compare": ("MODEL", "NAME"),
    "export": ("-m", "NAME", "-o", "FUNCTION"),
    "export -o": ("-m", "MODEL", "-o", "NAME.mlxfn"),
    "fuse": ("--adapter-path", "NAME", "--save-path", "OUT"),
    "fuse --save-path": ("--adapter-path", "HEAD", "--save-path", "NAME"),
    "upload": ("NAME", "owner/name"),
    "upload to": ("MODEL", "NAME"),
    "fit": ("NAME", "-m", "MODEL", "-o", "OUT"),
    "fit -m": ("DATA", "-m", "NAME", "-o", "OUT"),
    "fit -o": ("DATA", "-m", "MODEL", "-o", "NAME"),
    "fit --labels": ("DATA", "-m", "MODEL", "-o", "OUT", "--labels", "NAME"),
    "predict": ("HEAD", "NAME"),
    "predict head": ("NAME", "IMAGE"),
    "predict -o": ("HEAD", "IMAGE", "-o", "NAME"),
    "evaluate": ("HEAD", "NAME"),
    "evaluate head": ("NAME", "DATA"),
    "pretrain": ("NAME", "-o", "OUT"),
    "lit": ("NAME", "--encoder", "MODEL", "-o", "OUT"),
    "lit --encoder": ("DATA", "--encoder", "NAME", "-o", "OUT"),
    "nothing": ("NAME",),
}
"""Verb, and what part of it is hostile -> its arguments; NAME is the hostile one."""

WRITES = (" -o", " --mlx-path", " --save-path")
"""How a verb ends whose hostile name is written to: below the folder of the input."""

PARTS = (
    "x" * 300, "é" * 99, "e\u0301" * 9, "\udcff\udcfe", "a\udce9b.png", "\ud83d", "\x1b[2J", "a\nb", "\u2028", "\u202e",
    "~", "~nobody", "~nobody/x", "-", "--", "-x", "*", "[", "[z-a]", "**", "?", "..", ".", "/dev/null", "/dev/zero",
    "/proc/self/mem", "CON", "%s", "{}", "a b", "'", '"', "$(x)", ";", "x" * 5000, "x/" * 2500, "http://x/y.png",
    "data:image/png;base64,xx", "owner/name:main", "a" * 97 + "/" + "b" * 97, "1e999", "nan", "",
)  # fmt: skip


def hostile_command(rng: random.Random, whole: Path, place: Path) -> Callable[[], object]:
    """What to call to run a verb with a hostile name, which sometimes is there as a file or folder."""
    learned = whole / "learning"
    name = "".join(rng.choice(PARTS) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    verb = rng.choice(list(VERBS))
    if rng.random() < 0.5 or verb.endswith(WRITES):
        name = f"{place}/{name}"
    if verb.endswith(WRITES) and not Path(os.path.normpath(name)).is_relative_to(place):  # which may be written to
        name = f"{place}/out"
    if rng.random() < 0.3 and "\0" not in name and Path(name).parent == place and not name.endswith(("/.", "/..")):
        _make(rng, Path(name), learned)
    known = {
        "NAME": name,
        "OUT": str(place / "out"),
        "FUNCTION": str(place / "out.mlxfn"),
        "IMAGE": str(learned / "1.png"),
        "INDEX": str(whole / "axes1.db"),
        "MODEL": str(learned / "encoder"),
        "PAIR": str(whole / "mlx-lit"),
        "DATA": str(learned / "classify"),
        "HEAD": str(learned / "heads" / rng.choice(("linear", "lora", "detect"))),
    }
    words = [known.get(word, word.replace("NAME", name)) for word in VERBS[verb]]
    return lambda: run([verb.split()[0], *words])


def _make(rng: random.Random, path: Path, learned: Path) -> None:
    try:
        if rng.random() < 0.5:
            path.write_bytes((learned / "2.png").read_bytes())
        else:
            path.mkdir()
            for label in ("a", "e\u0301", "é", "b\udcff"):
                (path / label).mkdir()
                for number in range(2):
                    os.link(learned / f"{number}.png", path / label / f"{number}.png")
    except (OSError, ValueError):  # a name that no file can have is one that is not there
        pass


def run(words: list[str]) -> None:
    """Runs a command; raises AssertionError for what no command may do, ValueError for one that was refused."""
    from mlx_aimv2.cli import main

    out, err = io.StringIO(), io.StringIO()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b""))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdin = stdin
    said = err.getvalue()
    for line in said.splitlines():
        assert len(line) <= LONGEST_LINE, f"a line of {len(line):,} characters: {line[:300]}"
    for text in ("a bug in mlx-aimv2", "Traceback", "force-reinstall"):
        assert text not in said, said[:2000]
    assert code in (0, 1, 2), f"exit code {code}"
    said.encode()
    out.getvalue().encode()
    if code:
        lines = said.splitlines()
        assert lines, "refused without a word"
        raise ValueError("; ".join(lines[-1:]))
