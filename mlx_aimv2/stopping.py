"""Ends a run within a second when a signal asks it to stop: Ctrl-C (SIGINT), SIGTERM, or a closed terminal (SIGHUP).

The first signal raises `Stopped` in the main thread, which ends as after any error: what is half written is removed.
The main thread only notices between two steps of Python, and may be inside a long computation, a slow decoder or a
download. So a thread of its own hears the signal too, waits for a moment, and then ends the process itself, after it
has removed what is unfinished. Work that must not be cut off is marked with `finishing`: it is said what is waited
for, and a second signal does not wait any longer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from mlx_aimv2.files import discard_unfinished

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PATIENCE = 0.7
"""Seconds that the main thread has to end by itself."""

Say = Callable[[str], None]


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; `exit_code` is the shell's for it, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        """Takes the number of the signal."""
        super().__init__("stopped" if number == signal.SIGINT else f"stopped ({signal.Signals(number).name})")
        self.exit_code = 128 + number


_unfinished_business: list[str] = []
"""What must be brought to an end before the process may, innermost last."""


_kept_open: list[socket.socket] = []
"""What a watcher listens to that outlives `stoppable`."""


@contextlib.contextmanager
def finishing(what: str) -> Iterator[None]:
    """Marks work of the main thread that a signal must not cut off; `what` completes "waiting for …"."""
    _unfinished_business.append(what)
    try:
        yield
    finally:
        _unfinished_business.pop()


@contextlib.contextmanager
def stoppable(say: Say, *, patience: float = PATIENCE) -> Iterator[None]:
    """Within it the signals end the process in order; `say` writes a line for the user.

    Signals that the process ignores (as SIGHUP under nohup) stay ignored, and those that somebody else handles stay
    his. Outside the main thread, where Python lets nobody handle signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    handlers = {number: old for number, old in handlers.items() if old in (signal.SIG_DFL, signal.default_int_handler)}
    for number in handlers:
        signal.signal(number, _stop)
    heard_before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    left = threading.Event()
    watched = (ear, left, handlers, say, patience)
    watcher = threading.Thread(target=_watch, args=watched, name="signals", daemon=True)
    watcher.start()
    hook = sys.unraisablehook

    def without_ours(report: sys.UnraisableHookArgs) -> None:
        if not isinstance(report.exc_value, Stopped):
            hook(report)

    sys.unraisablehook = without_ours  # what is raised in a destructor is lost: then the watcher ends the process
    stopped = False
    try:
        yield
    except Stopped:
        stopped = True
        discard_unfinished()  # the signal may have come while something was being removed
        raise
    finally:
        left.set()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(heard_before)
        for number, handler in handlers.items():
            if _is_ours(number):
                signal.signal(number, handler)
        # Python waits for its threads before it ends, and one may be inside a slow decoder: the watcher does not wait.
        if stopped and _others_alive():
            _kept_open.append(mouth)
        else:
            mouth.close()
            watcher.join()
            ear.close()


def _stop(number: int, frame: FrameType | None) -> None:
    """The first signal raises; the second is the watcher's alone, since the clean-up may be under way."""
    for each in SIGNALS:
        if _is_ours(each):
            signal.signal(each, _leave_it_to_the_watcher)
    raise Stopped(number)


def _leave_it_to_the_watcher(number: int, frame: FrameType | None) -> None:
    pass


def _is_ours(number: int) -> bool:
    return signal.getsignal(number) in (_stop, _leave_it_to_the_watcher)


def _others_alive() -> bool:
    return any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def _watch(
    ear: socket.socket, left: threading.Event, handlers: Mapping[signal.Signals, object], say: Say, patience: float
) -> None:
    """Hears each signal as it comes, whatever the main thread is doing, and sees to it that the process ends.

    `left` is set when the main thread has come out of `stoppable`: then it says itself what happened.
    """
    number = _heard(ear, handlers, None)
    if not number:
        return
    deadline = time.monotonic() + patience
    said = ""
    while True:
        waiting = _unfinished_business[-1] if _unfinished_business else ""
        rest = deadline - time.monotonic()
        if rest <= 0 and not waiting:
            break
        if rest <= 0 and waiting != said:
            say(f"stopping: waiting for {waiting}; once more to stop at once")
            said = waiting
        again = _heard(ear, handlers, rest if rest > 0 else 0.05)
        if again == 0:
            return  # the main thread came to its end
        if again is not None:
            number = again
            break
    discard_unfinished()
    if not left.is_set():
        say(str(Stopped(number)))
    os._exit(128 + number)


def _heard(ear: socket.socket, handlers: Mapping[signal.Signals, object], seconds: float | None) -> int | None:
    """The number of the next of our signals; 0 when `stoppable` has ended; None when nothing came in time.

    A signal for which somebody has put his own handler since is left alone, unless the old handler is back.
    """
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        rest = None if until is None else until - time.monotonic()
        if rest is not None and rest <= 0:
            return None
        ear.settimeout(rest)
        try:
            data = ear.recv(1)
        except socket.timeout:  # noqa: UP041 - in Python 3.10 it is not yet TimeoutError
            return None
        if not data:
            return 0
        for number, old in handlers.items():
            if data[0] == number and (_is_ours(number) or signal.getsignal(number) == old):
                return data[0]
