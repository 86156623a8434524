"""Writes what a command says: results on stdout, progress and notes on stderr, each one line, escaped here alone."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS_IN_LOG = 10.0
"""Between two lines on progress where stderr is no terminal."""

MAX_LINE, MAX_RESULT = 1000, 8192
"""Characters of a line on stderr, and on stdout, where a path of 4,096 bytes stays whole. What is longer quotes a name
or a value that was hardly meant as one."""

NOTES = 10
"""Notes written in full during a long run; the others are counted."""

_bar: tqdm[Any] | None = None
"""The progress bar on the terminal, above which lines are written."""


def say(message: object) -> None:
    """Writes a message as one line on stderr, above a progress bar; a full disk or a closed stream stops nothing."""
    if _bar is not None:
        _bar.clear()
    _attempt(f"mlx-aimv2: {as_line(str(message).strip())}\n")
    if _bar is not None:
        _bar.refresh()


def log(text: str) -> None:
    """Writes the lines of a log on stderr as they are, but escaped."""
    for line in text.splitlines():
        _attempt(f"{as_line(line)}\n")


def show(line: str) -> None:
    """Writes one line of a result on stdout."""
    print(as_line(line, MAX_RESULT), flush=True)


def show_progress(line: str) -> None:
    """Writes a line on stdout about a file that was written; the work goes on when nobody reads it any more."""
    try:
        show(line)
    except BrokenPipeError:
        abandon(sys.stdout)


def show_paths(paths: Iterable[str], *, null: bool) -> None:
    """Writes paths on stdout as the bytes that they are, for other commands; escaped where a terminal shows them."""
    for path in paths:
        if sys.stdout.isatty() and not null:
            show(path)
        else:
            sys.stdout.buffer.write(os.fsencode(path) + (b"\0" if null else b"\n"))
    sys.stdout.flush()


def show_page(written: Path, *, is_named: bool, in_browser: bool) -> None:
    """Says where a page is that nobody gave a name, and shows it in the browser if that is asked for."""
    import webbrowser

    if not is_named:
        say(f"the page is {written}")
    if in_browser and not webbrowser.open(f"file://{written.absolute()}"):
        say(f"no browser could be opened: open {written} yourself")


def aligned(facts: Mapping[str, str]) -> list[str]:
    """Facts by their names as lines, the values one below the other."""
    width = max(map(len, facts))
    return [f"{name:<{width}}  {value}" for name, value in facts.items()]


def typed(text: str) -> str:
    """An argument that is text and not a path: the bytes that were typed as UTF-8, whatever the locale says."""
    with suppress(UnicodeError):
        return os.fsencode(text).decode()
    return text


def as_line(text: str, limit: int = MAX_LINE) -> str:
    """Text as one line, escaped; one that is longer than `limit` without its middle: advice stands at the end."""
    line = escape(text)
    left = f" … ({len(line):,} characters) … "
    return line if len(line) <= limit else f"{line[: 2 * limit // 3]}{left}{line[len(left) - limit // 3 :]}"


def escape(text: str) -> str:
    """Text as one line that any terminal and log can hold: what is not printable is escaped, as in `a\\x0ab.jpg`."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


class Progress:
    """How far a long run is: on a terminal a bar, in a log a line every ten seconds. A call returns at once."""

    def __init__(self) -> None:
        self.unit = "images"
        self.started = self.last = time.monotonic()

    def __call__(self, done: int, total: int, unit: str) -> None:
        """Shows that `done` of `total` are done; another unit ends the bar before."""
        global _bar
        from tqdm import tqdm

        if unit != self.unit:
            self.close()
            self.unit, self.started = unit, time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty():
            if _bar is None:
                _bar = tqdm(total=total, unit=f" {self.unit}", file=_Patient(), leave=False, dynamic_ncols=True)
            _bar.update(done - _bar.n)
        elif (now := time.monotonic()) - self.last >= SECONDS_IN_LOG:
            self.last = now
            say(tqdm.format_meter(done, total, now - self.started, ncols=0, unit=f" {self.unit}").strip())

    def close(self) -> None:
        """Takes the bar off the terminal."""
        global _bar
        if _bar is not None:
            _bar.close()
        _bar = None


@contextmanager
def progress() -> Iterator[Progress]:
    """Gives what shows the progress of a run. Within it the first ten notes are written, the others counted."""
    count, shown = 0, Progress()

    def limited(message: Warning | str, *_: object, **__: object) -> None:
        nonlocal count
        count += 1
        if count <= NOTES:
            note(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = limited
        try:
            yield shown
        finally:
            shown.close()
            if count > NOTES:
                say(f"note: {count - NOTES:,} more notes like these")


class _Patient:
    """Stderr for tqdm, whose writes may fail without an error."""

    def write(self, text: str) -> None:
        _attempt(text)

    def flush(self) -> None:
        _attempt("")

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def _attempt(text: str) -> None:
    if sys.stderr is None:  # as it is where the caller closed it
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # a full disk, or a reader that went away
        abandon(sys.stderr)


def abandon(stream: TextIO) -> None:
    """What is still buffered for a stream has nowhere to go, and must not end the interpreter with an error."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()


def note(message: Warning | str, *_: object, **__: object) -> None:
    say(f"note: {message}")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as surrogateescape keeps it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
