"""A signal ends a run within a second in a clean state, whatever the main thread is doing."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_aimv2.stopping import SIGNALS, Stopped, stoppable

# What the main thread is doing when the signal comes.
WORK = {
    "Python": "while True: pass",
    "C that does not look": "import ctypes; ctypes.CDLL(None).sleep(60)",
    "waiting for a slow decoder": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(1) as pool: pool.submit(time.sleep, 60).result()"
    ),
    "a destructor, where what is raised is lost": (
        "class Holder:\n"
        "    def __del__(self):\n"
        "        until = time.monotonic() + 1\n"
        "        while time.monotonic() < until: pass\n"
        "Holder()\ntime.sleep(60)"
    ),
    "MLX": ("import mlx.core as mx\na = mx.ones((3001, 3001))\nfor _ in range(50): a = a @ a\nmx.eval(a)"),
}

PROGRAM = """
import sys, time
from pathlib import Path
from mlx_aimv2.files import atomic_folder
from mlx_aimv2.stopping import Stopped, finishing, stoppable

def say(line):
    print(line, file=sys.stderr, flush=True)

def work():
    print("ready", flush=True)
    exec(sys.argv[2])

try:
    with stoppable(say), atomic_folder(Path(sys.argv[1]) / "mlx") as place:
        (place / "half").touch()
        work()
except Stopped as stop:
    say(stop)
    sys.exit(stop.exit_code)
"""


def start(folder, work):
    command = [sys.executable, "-c", PROGRAM, str(folder), work]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    return process


@pytest.fixture(scope="module", params=SIGNALS, ids=[number.name for number in SIGNALS])
def stopped(request, tmp_path_factory):
    """The signal, and for each kind of work, all at once, what it came to: (exit code, stderr, seconds, folder)."""
    folders = {kind: tmp_path_factory.mktemp("stopped") for kind in WORK}
    processes = {kind: start(folders[kind], work) for kind, work in WORK.items()}
    begun = time.monotonic()
    for process in processes.values():
        process.send_signal(request.param)

    def end(kind):
        errors = processes[kind].communicate(timeout=30)[1]
        return processes[kind].returncode, errors, time.monotonic() - begun, folders[kind]

    with ThreadPoolExecutor(len(WORK)) as pool:
        return request.param, dict(zip(WORK, pool.map(end, WORK), strict=True))


@pytest.mark.parametrize("kind", WORK)
def test_a_signal_ends_the_run_and_leaves_nothing(stopped, kind):
    number, runs = stopped
    exit_code, errors, seconds, folder = runs[kind]
    assert exit_code == 128 + number
    assert errors == ("stopped\n" if number == signal.SIGINT else f"stopped ({number.name})\n")
    assert seconds < 2  # the goal is one second; a loaded machine may take longer
    assert not list(folder.iterdir())


FINISHING = """
with finishing("the index to be written"):
    try:
        time.sleep(60)
    except Stopped:
        time.sleep(float({seconds}))
        print("written", flush=True)
        raise
"""


def test_work_that_must_be_brought_to_an_end_is_waited_for(tmp_path):
    process = start(tmp_path, FINISHING.format(seconds=1))
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=30)
    assert out == "written\n"
    wanted = ["stopping: waiting for the index to be written; once more to stop at once", "stopped (SIGTERM)"]
    assert errors.splitlines() == wanted
    assert process.returncode == 128 + signal.SIGTERM


def test_a_second_signal_does_not_wait(tmp_path):
    process = start(tmp_path, FINISHING.format(seconds=60))
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("stopping: waiting for the index")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=5) == ("", "stopped\n")
    assert not list(tmp_path.iterdir())


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    command = ["nohup", sys.executable, "-c", PROGRAM, str(tmp_path), "time.sleep(0.5)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 0
    process.stdout.close()


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
