"""A signal ends a run at once and in a clean state, and a second one whatever it is waiting for."""

import contextlib
import os
import random
import signal
import sys
import threading
import time
from contextlib import ExitStack

import mlx.core as mx
import pytest

from mlx_aimv2 import load
from mlx_aimv2.cli.dispatch import SIGNALS, Stopped, stoppable
from mlx_aimv2.files import UNFINISHED
from tests.programs import HANGS, running
from tests.small_encoder import small_encoder

SOON = 30
"""Seconds in which a run ends, a tenth of what its work would take: about one, but for a machine that is busy."""

# What the main thread is doing when the signal comes, which is when it has said `ready`.
WORK = {
    "Python": "ready()\nwhile True: pass",
    "a system call": f"ready()\ntime.sleep({HANGS})",
    "waiting for a thread": (  # as futures wait; Thread.join releases a lock of the thread's when it is interrupted
        "done = threading.Event()\n"
        f"threading.Thread(target=lambda: (time.sleep({HANGS}), done.set()), daemon=True).start()\n"
        "ready()\ndone.wait()"
    ),
    # Python prints what such a callback raises and goes on: as that of a module's lock, within any import.
    "a weak reference's callback": (
        "class Thing: pass\nthing = Thing()\n"
        f"reference = weakref.ref(thing, lambda _: (ready(), time.sleep({HANGS})))\n"
        f"del thing\ntime.sleep({HANGS})"
    ),
}

PROGRAM = """
import sys, threading, time, weakref
from pathlib import Path
from mlx_aimv2.files import atomic_folder
from mlx_aimv2.cli.dispatch import Stopped, stoppable

def ready():
    print("ready", flush=True)

try:
    with stoppable(), atomic_folder(Path(sys.argv[1]) / "mlx") as place:
        (place / "half").touch()
        exec(sys.argv[2])
except Stopped as stop:
    print(stop, file=sys.stderr, flush=True)
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


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_what_the_first_has_not_and_leaves_nothing(tmp_path, first, second):
    work = f"try: ready(); time.sleep({HANGS})\nfinally: ready(); time.sleep({HANGS})"
    with started(tmp_path, work) as process:
        assert is_ready(process)
        process.send_signal(first)
        assert is_ready(process)
        process.send_signal(second)
        assert process.wait(HANGS) == 128 + second
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_second_signal_does_not_wait_for_a_thread_in_a_slow_decoder(tmp_path):
    with started(tmp_path, f"threading.Thread(target=time.sleep, args=[{HANGS}]).start()\n{WORK['Python']}") as process:
        assert is_ready(process)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopped\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(HANGS) == 128 + signal.SIGINT
        assert process.stderr.read() == ""


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
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert threading.active_count() == threads


def test_in_another_thread_nothing_changes():
    def work():
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_the_handler_of_somebody_else_stays_theirs():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("theirs"))
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["theirs"]


def test_a_signal_is_an_interruption_to_whoever_looks_for_one():
    with pytest.raises(KeyboardInterrupt, match="SIGHUP") as caught, stoppable():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(5)
    assert isinstance(caught.value, Stopped)
    assert caught.value.exit_code == 129


# Conversions stopped at random moments

MAX_RUNS = 200
# A fresh process of its own would take ten times as long to import everything: it is forked when all is imported.
CONVERTING = """
import os, sys
from mlx_aimv2.cli import main
import mlx_aimv2.convert, mlx_aimv2.conversion.model_card, huggingface_hub, PIL.Image
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(["convert", *line.split()]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "runs"), [(SIGNALS, 50), ((signal.SIGKILL,), 20)], ids=["stopped", "killed"])
def test_conversions_that_end_at_random_moments_leave_only_whole_folders(tmp_path, signals, runs):
    seed = random.randrange(1 << 30)
    rng, lasts, stopped = random.Random(seed), None, 0
    slowest = 0.0
    with running(sys.executable, "-c", CONVERTING) as run:
        for number in range(MAX_RUNS):
            if stopped == runs:
                break
            target, one = tmp_path / f"mlx-{number}", signals[number % len(signals)]
            flags = "-q --q-bits 8" if number % 2 else "--no-verify"
            begun = time.monotonic()
            print(f"--hf-path {small_encoder()} --mlx-path {target} {flags}", file=run.stdin, flush=True)
            child = int(run.stdout.readline())
            if lasts is not None:
                time.sleep(rng.uniform(0, lasts))
                sent = time.monotonic()
                with contextlib.suppress(ProcessLookupError):  # done already
                    os.kill(child, one)
            code = int(run.stdout.readline())
            if lasts is None:
                lasts = time.monotonic() - begun
            elif code == 0:
                lasts = min(lasts, time.monotonic() - begun)
            else:
                slowest = max(slowest, time.monotonic() - sent)
                # Before the command line has its handlers the signal ends the process as it always does.
                assert code in (128 + one, -one, 1), f"seed {seed}"
                stopped += 1
        _, errors = run.communicate()
    assert "Traceback" not in errors or "KeyboardInterrupt" in errors, f"{errors}, seed {seed}"
    assert stopped == runs, f"seed {seed}"
    assert slowest < SOON
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert all(signals is not SIGNALS and name.endswith(UNFINISHED) for name in hidden), f"{hidden}, seed {seed}"
    whole = [path for path in tmp_path.iterdir() if path.name not in hidden]
    for path in whole:
        assert load(path)[0].encode_image(mx.zeros((1, 56, 56, 3))).shape == (1, 128), f"{path.name}, seed {seed}"
    print(f"{stopped} stopped, the slowest after {slowest:.2f} s; {len(whole)} were whole before")


def test_the_signals_are_those_of_a_terminal_and_of_a_service_manager():
    assert SIGNALS == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
