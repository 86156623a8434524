"""Makes a run end in order when it is asked to stop: Ctrl-C (SIGINT), SIGTERM, or a closed terminal (SIGHUP).

The first signal raises `Stopped`, a KeyboardInterrupt, in the main thread, which ends as after any error: what is half
written is removed, what is done is kept. A second one does not wait for that, nor for a thread in a slow decoder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from mlx_aimv2.files import discard_unfinished

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; `exit_code` is the shell's for it, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        """Takes the number of the signal."""
        super().__init__("stopped" if number == signal.SIGINT else f"stopped ({signal.Signals(number).name})")
        self.exit_code = 128 + number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within it the signals end the process in order.

    Signals that the process ignores (as SIGHUP under nohup) stay ignored, and those that somebody else handles stay
    theirs. Outside the main thread, where Python lets nobody handle signals, nothing changes.
    """
    is_stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            discard_unfinished()
            os._exit(128 + number)
        is_stopping = True
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
        # Python waits for its threads before it ends, and one may be in a slow decoder: a second signal still ends it.
        if not (is_stopping and any(not thread.daemon for thread in others)):
            for number in ours:
                if signal.getsignal(number) is stop:
                    signal.signal(number, before[number])
