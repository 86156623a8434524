"""A signal ends a run at once and in a clean state, whatever the main thread is doing."""

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from mlx_aimv2.stopping import SIGNALS, Stopped, stoppable
from tests.programs import HANGS, running

SOON = 30
"""Seconds in which a run ends, a tenth of what its work would take: about one, but for a machine that is busy."""

# What the main thread is doing when the signal comes, which is when it has said `ready`: where nothing of the work
# itself can say so, a moment after it was begun.
WORK = {
    "Python": "ready()\nwhile True: pass",
    "C that does not look": f"import ctypes\nsleep = ctypes.CDLL(None).sleep\nsoon()\nsleep({HANGS})",
    "waiting for a slow decoder": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        f"with ThreadPoolExecutor(1) as pool: pool.submit(lambda: (soon(), time.sleep({HANGS}))).result()"
    ),
    "a destructor, where what is raised is lost": (
        "class Holder:\n"
        "    def __del__(self):\n"
        "        until = time.monotonic() + 1\n"
        "        ready()\n"
        "        while time.monotonic() < until: pass\n"
        f"Holder()\ntime.sleep({HANGS})"
    ),
    "MLX": ("import mlx.core as mx\na = mx.ones((3001, 3001))\nfor _ in range(2000): a = a @ a\nsoon()\nmx.eval(a)"),
}

PROGRAM = """
import sys, threading, time
from pathlib import Path
from mlx_aimv2.safe_write import atomic_folder
from mlx_aimv2.stopping import Stopped, finishing, stoppable

def say(line):
    print(line, file=sys.stderr, flush=True)

def ready():
    print("ready", flush=True)

def soon():
    timer = threading.Timer(0.2, ready)
    timer.daemon = True
    timer.start()

try:
    with stoppable(say), atomic_folder(Path(sys.argv[1]) / "mlx") as place:
        (place / "half").touch()
        exec(sys.argv[2])
except Stopped as stop:
    say(stop)
    sys.exit(stop.exit_code)
"""


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Under nohup SIGHUP is ignored, and what is ignored stays so."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def started(folder, work, *before):
    """The program at its work, for as long as the block lasts."""
    return running(*before, sys.executable, "-c", PROGRAM, str(folder), work)


def is_ready(process):
    return process.stdout.readline() == "ready\n"


@pytest.fixture(scope="module", params=SIGNALS, ids=[number.name for number in SIGNALS])
def stopped(request, tmp_path_factory):
    """The signal, and for each kind of work what it came to: (exit code, stderr, folder)."""
    folders = {kind: tmp_path_factory.mktemp("stopped") for kind in WORK}
    found = {}
    with ExitStack() as stack:
        processes = {kind: stack.enter_context(started(folders[kind], work)) for kind, work in WORK.items()}
        for process in processes.values():
            assert is_ready(process)
            process.send_signal(request.param)
        for kind, process in processes.items():
            errors = process.communicate(timeout=SOON)[1]
            found[kind] = process.returncode, errors, folders[kind]
    return request.param, found


@pytest.mark.parametrize("kind", WORK)
def test_a_signal_ends_the_run_and_leaves_nothing(stopped, kind):
    number, runs = stopped
    exit_code, errors, folder = runs[kind]
    assert exit_code == 128 + number
    assert errors == ("stopped\n" if number == signal.SIGINT else f"stopped ({number.name})\n")
    assert not list(folder.iterdir())


FINISHING = f"""
with finishing("the index to be written"):
    try:
        ready()
        time.sleep({HANGS})
    except Stopped:
        sys.stdin.readline()
        print("written", flush=True)
        raise
"""


def test_work_that_must_be_brought_to_an_end_is_waited_for(tmp_path):
    with started(tmp_path, FINISHING) as process:
        assert is_ready(process)
        process.send_signal(signal.SIGTERM)
        wanted = "stopping: waiting for the index to be written; once more to stop at once\n"
        assert process.stderr.readline() == wanted
        assert process.communicate("go on\n", timeout=HANGS) == ("written\n", "stopped (SIGTERM)\n")
    assert process.returncode == 128 + signal.SIGTERM


def test_a_second_signal_does_not_wait(tmp_path):
    with started(tmp_path, FINISHING) as process:
        assert is_ready(process)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("stopping: waiting for the index")
        process.send_signal(signal.SIGINT)
        assert process.wait(HANGS) == 128 + signal.SIGINT
        assert (process.stdout.read(), process.stderr.read()) == ("", "stopped\n")
    assert not list(tmp_path.iterdir())


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    with started(tmp_path, "ready()\nsys.stdin.readline()\nready()", "nohup") as process:
        assert is_ready(process)
        process.send_signal(signal.SIGHUP)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert is_ready(process)
        assert process.wait(HANGS) == 0


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    with stoppable(print):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert threading.active_count() == threads


def test_in_another_thread_nothing_changes():
    def work():
        with stoppable(print):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_the_handler_of_somebody_else_stays_his():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("his"))
    try:
        with stoppable(print, patience=0.01):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["his"]


def test_a_signal_is_an_interruption_to_whoever_looks_for_one():
    with pytest.raises(KeyboardInterrupt, match="SIGHUP") as caught, stoppable(print):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(5)
    assert isinstance(caught.value, Stopped)
    assert caught.value.exit_code == 129
