"""Writes a command's output: results on stdout, progress and notes on stderr, one line each, escaped only here."""

from __future__ import annotations

import json
import logging
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
"""Between two lines of progress when stderr is not a terminal."""

MAX_LINE, MAX_RESULT = 1000, 8192
"""Characters of a line on stderr, and on stdout, where a path of 4,096 bytes stays whole. A longer line quotes a name
or a value that was hardly meant as one."""

NOTE = "note: "

NOTES = 10
"""Notes written in full during a long run; the others are counted."""

_bar: tqdm[Any] | None = None
"""The progress bar on the terminal, above which lines are written."""

_shown: Progress | None = None
"""The progress of the run."""


def say(message: object) -> None:
    """Writes a message as one line on stderr; a full disk or a closed stream is ignored."""
    text = as_line(str(message).strip())
    if _shown is not None and text.startswith(NOTE):
        if text in _shown.notes:
            return
        if len(_shown.notes) == NOTES:
            _shown.more_notes += 1
            return
        _shown.notes.append(text)
    log(f"mlx-aimv2: {text}")


def log(text: str) -> None:
    """Writes the lines of a log on stderr unchanged, but escaped."""
    with _above_bar():
        for line in text.splitlines():
            _attempt(f"{as_line(line)}\n")


def show(line: str) -> None:
    """Writes one line of a result on stdout."""
    with _above_bar():
        print(as_line(line, MAX_RESULT), flush=True)


def show_json(value: object) -> None:
    """Writes a result on stdout as JSON in one line, however long."""
    with _above_bar():
        print(json.dumps(value), flush=True)


class Failures(list[str]):
    """The images that failed, each reported once; a run with any of them exits with 1."""

    def __call__(self, path: str, reason: str) -> None:
        """Takes a failure: `reason` continues a sentence that starts with the path."""
        self.append(path)
        say(f"{path} {reason}")


@contextmanager
def _above_bar() -> Iterator[None]:
    if _bar is not None:
        _bar.clear()
    yield
    if _bar is not None:
        _bar.refresh()


def show_progress(line: str) -> None:
    """Writes a line on stdout about a file that was written; the work continues even if nobody reads it any more."""
    try:
        show(line)
    except BrokenPipeError:
        abandon(sys.stdout)


def show_paths(paths: Iterable[str], *, null: bool) -> None:
    """Writes paths on stdout as raw bytes, for other commands; escaped on a terminal."""
    for path in paths:
        if sys.stdout.isatty() and not null:
            show(path)
        else:
            sys.stdout.buffer.write(os.fsencode(path) + (b"\0" if null else b"\n"))
    sys.stdout.flush()


def show_page(written: Path, *, is_named: bool, in_browser: bool) -> None:
    """Says where a page without a given name is, and opens it in the browser on request."""
    import webbrowser

    if not is_named:
        say(f"the page is {written}")
    if in_browser and not webbrowser.open(f"file://{written.absolute()}"):
        say(f"no browser could be opened: open {written} yourself")


def aligned(facts: Mapping[str, str]) -> list[str]:
    """Facts by name as lines, with the values aligned."""
    width = max(map(len, facts))
    return [f"{name:<{width}}  {value}" for name, value in facts.items()]


def as_line(text: str, limit: int = MAX_LINE) -> str:
    """Text as one line, escaped; beyond `limit` the middle is cut out, because advice is at the end."""
    line = escape(text)
    left = f" … ({len(line):,} characters) … "
    return line if len(line) <= limit else f"{line[: 2 * limit // 3]}{left}{line[len(left) - limit // 3 :]}"


def escape(text: str) -> str:
    """Text as one line for any terminal or log: unprintable characters are escaped, as in `a\\x0ab.jpg`."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


class Progress(logging.Handler):
    """The progress of a long run: a bar on a terminal, a line every ten seconds in a log. A call returns at once.

    What the package logs before there is something to count, such as "loading", is shown with a bar at 0 %; messages
    of level INFO are also written as a line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unit = ""
        self.started = self.last = time.monotonic()
        self.notes: list[str] = []
        self.more_notes = 0

    def __call__(self, done: int, total: int, unit: str) -> None:
        """Shows that `done` of `total` are done; a new unit ends the previous bar."""
        from tqdm import tqdm

        self._begin(unit, total, unit=f" {unit}")
        if _bar is not None:
            _bar.update(done - _bar.n)
        elif (now := time.monotonic()) - self.last >= SECONDS_IN_LOG:
            self.last = now
            say(tqdm.format_meter(done, total, now - self.started, ncols=0, unit=f" {unit}").strip())

    def emit(self, record: logging.LogRecord) -> None:
        """Shows what begins now."""
        words = as_line(record.getMessage())
        if record.levelno >= logging.INFO:
            say(words)
        self._begin(words, 1, desc=words, bar_format="{desc}: {percentage:3.0f}%|{bar}|")

    def _begin(self, what: str, total: int, **settings: Any) -> None:
        """Starts a new bar when something else is counted, only on a terminal."""
        global _bar
        from tqdm import tqdm

        if what == self.unit:
            return
        self.end()
        if self.unit:
            self.started = time.monotonic()
        self.unit = what
        if sys.stderr.isatty():
            _bar = tqdm(total=total, leave=False, dynamic_ncols=True, **settings)

    def end(self) -> None:
        """Removes the bar from the terminal."""
        global _bar
        if _bar is not None:
            _bar.close()
        _bar = None


def begin(what: str) -> None:
    """Shows what begins now, where there is nothing to count yet."""
    logging.getLogger("mlx_aimv2").debug(what)


@contextmanager
def progress() -> Iterator[Progress]:
    """Yields the progress of a run; inside another `progress` it is the same one.

    Each note is written once; after ten, the others are counted.
    """
    global _shown
    if _shown is not None:
        yield _shown
        return
    _shown = shown = Progress()
    logger = logging.getLogger("mlx_aimv2")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(shown)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = note
        try:
            yield shown
        finally:
            logger.removeHandler(shown)
            logger.setLevel(level)
            shown.end()
            _shown = None
            if shown.more_notes:
                say(f"note: {shown.more_notes:,} more notes like these")


def _attempt(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # a full disk, or a reader that went away
        abandon(sys.stderr)


def abandon(stream: TextIO) -> None:
    """Discards what is still buffered for a stream, which must not end the interpreter with an error."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()


def note(message: Warning | str, *_: object, **__: object) -> None:
    say(f"{NOTE}{message}")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as surrogateescape keeps it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
