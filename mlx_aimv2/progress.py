"""How far is a long run, how fast, and when will it be done? A bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

ON_TERMINAL = 0.1
IN_LOG = 10.0
"""Seconds between two updates."""

WINDOW = 20.0
"""Seconds over which the rate is taken."""

NOTES = 10

BLOCKS = " ▏▎▍▌▋▊▉█"


class Progress:
    """Counts things done: `with Progress(10000, "images") as progress: progress.advance(16)`."""

    def __init__(self, total: int, unit: str, *, stream: TextIO | None = None) -> None:
        """Writes to `stream`, by default stderr."""
        self.total = total
        self.unit = unit
        self.done = 0
        self.stream: TextIO | None = stream or sys.stderr
        self.is_terminal = self.stream is not None and self.stream.isatty()
        self._shown = time.monotonic()
        self._history = deque([(self._shown, 0)])
        self._line = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def advance(self, count: int = 1) -> None:
        """Counts, and shows it if the last time is long enough ago."""
        self.done += count
        now = time.monotonic()
        if now - self._shown < (ON_TERMINAL if self.is_terminal else IN_LOG):
            return
        self._shown = now
        self._history.append((now, self.done))
        while now - self._history[0][0] > WINDOW and len(self._history) > 2:
            self._history.popleft()
        self._show(now)

    def say(self, line: str) -> None:
        """Writes a line of its own above the bar."""
        self.clear()
        self._write(line + "\n")

    def clear(self) -> None:
        """Takes the bar off the terminal."""
        if self._line:
            self._write("\r" + " " * len(self._line) + "\r")
            self._line = ""

    @contextmanager
    def warnings_as_lines(self) -> Iterator[None]:
        """Within it, warnings become lines for users; after the first few they are only counted."""
        count = 0

        def show(message: Warning | str, *_: object, **__: object) -> None:
            nonlocal count
            count += 1
            if count <= NOTES:
                self.say(f"mlx-aimv2: note: {message}")

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield
        if count > NOTES:
            self.say(f"mlx-aimv2: note: {count - NOTES:,} more notes like these")

    def _show(self, now: float) -> None:
        start, before = self._history[0]
        rate = (self.done - before) / max(now - start, 1e-9)
        left = f"{clock((self.total - self.done) / rate)} left" if rate > 0 else "waiting"
        text = f"{self.done:,} of {self.total:,} {self.unit}  {rate:,.1f} a second  {left}"
        if not self.is_terminal:
            self._write(f"{text}\n")
        else:
            width = min(30, shutil.get_terminal_size().columns - len(text) - 3)
            self.clear()
            self._line = f"{bar(self.done / self.total, width)}  {text}" if width > 4 else text
            self._write(self._line)

    def _write(self, text: str) -> None:
        """Writes if it can be: a log on a full disk does not stop the work that it tells of."""
        _attempt(self.stream, text)


def say(line: str) -> None:
    """Writes a line to stderr if that can be written to."""
    _attempt(sys.stderr, line + "\n")


def _attempt(stream: TextIO | None, text: str) -> None:
    if stream is not None:  # as stderr is where the caller closed it
        with suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()


def bar(share: float, width: int) -> str:
    """A bar of `width` characters, filled to eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return (BLOCKS[8] * full + (BLOCKS[rest] if rest else "")).ljust(width)


def clock(seconds: float) -> str:
    """A duration as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
