"""What is written appears whole or not at all, replaces nothing of others, and leaves nothing of killed processes."""

import contextlib
import errno
import os
import pwd
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_aimv2.files import (
    UNFINISHED,
    atomic_file,
    atomic_folder,
    check_file,
    check_target,
    discard_unfinished,
    is_file,
    is_unchanged,
    marks_of,
    read_bytes,
    read_image_file,
    temporary_folder,
)
from tests import programs

OWN = b"own"


@pytest.mark.parametrize("name", ["folder", "pipe", "file"])
@pytest.mark.parametrize("read", [read_image_file, read_bytes], ids=lambda read: read.__name__)
def test_reading_leaves_nothing_open(tmp_path, name, read):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    next_one = os.dup(0)
    os.close(next_one)
    with contextlib.suppress(OSError, ValueError):
        read(tmp_path / name)
    after = os.dup(0)
    os.close(after)
    assert after == next_one


def check(path: Path, **more: object) -> None:
    check_file(path, option="--html", is_own=lambda head: head.startswith(OWN), **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


KILLED = """
import os, sys
from pathlib import Path
from mlx_aimv2.files import atomic_file, atomic_folder
target = Path(sys.argv[1])
if sys.argv[2] == "file":
    with atomic_file(target) as file:
        file.write(b"half")
        file.flush()
        os._exit(9)
if sys.argv[2] == "moved":  # between the two renames of a replacement
    rename = Path.rename
    Path.rename = lambda self, to: os._exit(9) if self.name == "folder" else rename(self, to)
with atomic_folder(target, overwrite=True, is_own=lambda folder: True) as folder:
    (folder / "half").touch()
    if sys.argv[2] == "folder":
        os._exit(9)
"""


def killed(target: Path, moment: str) -> None:
    """A process that is killed while it writes to the target leaves what it has."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], env=programs.environment())
    assert run.returncode == 9
    assert any(path.name.endswith(UNFINISHED) for path in target.parent.iterdir())


@pytest.mark.parametrize("moment", ["file", "folder"])
def test_the_next_one_to_write_clears_what_a_killed_process_left(tmp_path, moment):
    killed(tmp_path / "page.html", moment)
    killed(tmp_path / "page2.html", moment)
    with atomic_file(tmp_path / "page.html") as file:
        file.write(b"whole")
    left = [name for name in names(tmp_path) if name != "page.html"]
    assert len(left) == 1 and left[0].startswith(".page2.html.")


def test_a_file_that_another_process_is_writing_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.files.PATIENCE", 0.1)
    code = f"""
import sys
from pathlib import Path
from mlx_aimv2.files import atomic_file
with atomic_file(Path({str(tmp_path / "page.html")!r})) as file:
    file.write(b"other")
    print("writing", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=programs.environment(), **pipes) as other:
        assert other.stdout.readline() == "writing\n"
        wanted = "page.html: another process is writing there. Wait for it, or choose another path."
        with pytest.raises(FileExistsError, match=wanted), atomic_file(tmp_path / "page.html"):
            pass
        with atomic_file(tmp_path / "page2.html") as file:
            file.write(b"mine")
        other.communicate("")
    assert other.returncode == 0
    assert (tmp_path / "page.html").read_bytes() == b"other"
    assert names(tmp_path) == ["page.html", "page2.html"]


def test_who_writes_for_a_moment_is_waited_for(tmp_path):
    writing, done = threading.Event(), threading.Event()

    def other():
        with atomic_file(tmp_path / "page.html") as file:
            writing.set()
            done.wait(30)
            file.write(b"other")

    thread = threading.Thread(target=other)
    thread.start()
    writing.wait(30)
    threading.Timer(0.05, done.set).start()
    with atomic_file(tmp_path / "page.html") as file:
        file.write(b"mine")
    thread.join()
    assert (tmp_path / "page.html").read_bytes() == b"mine"
    assert names(tmp_path) == ["page.html"]


def test_no_lock_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    for number in range(3):
        with atomic_file(tmp_path / f"{number}.png"):
            assert len(names(tmp_path / "cache" / "locks")) == 1
    assert names(tmp_path / "cache" / "locks") == []


def test_a_thread_that_is_refused_leaves_what_another_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.files.PATIENCE", 0.01)
    refused = []

    def other():
        with contextlib.suppress(FileExistsError), atomic_folder(tmp_path / "mlx"):
            refused.append("not")
        refused.append("refused")

    with atomic_folder(tmp_path / "mlx") as place:
        (place / "mine").touch()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused == ["refused"]
    assert [path.name for path in tmp_path.rglob("*")] == ["mlx", "mine"]


@pytest.mark.parametrize("cache", ["no folder", "/dev/null/cache"])
def test_without_a_cache_folder_is_written_all_the_same(tmp_path, monkeypatch, cache):
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / cache))
    with atomic_folder(tmp_path / "mlx") as place:
        (place / "config.json").touch()
    assert names(tmp_path) == ["mlx", "no folder"]


@pytest.mark.parametrize("variables", [{}, {"MLX_AIMV2_CACHE": "~nobody-of-this-name/cache"}], ids=["HOME", "cache"])
def test_without_a_home_what_may_be_computed_again_goes_to_the_temporary_folder(tmp_path, monkeypatch, variables):
    """As in a container whose user has neither HOME nor an entry in passwd: no folder is called `~`."""

    def nobody(name):
        raise KeyError(name)

    for name in ("HOME", "XDG_CACHE_HOME", "MLX_AIMV2_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_file(tmp_path / "page.html") as file:
        file.write(b"whole")
    assert names(tmp_path) == ["page.html", "tmp"]
    assert names(tmp_path / "tmp") == [f"mlx-aimv2-{os.getuid()}"]


@pytest.mark.parametrize("name", ["n" * 256, "a\0b", "\ud83d", ""], ids=ascii)
def test_a_name_that_no_file_can_have_is_one_that_is_not_there(tmp_path, name):
    assert not is_file(tmp_path / name)


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    with atomic_file(tmp_path / ("n" * 255)) as file:
        file.write(b"whole")
    assert names(tmp_path) == ["n" * 255]


def test_results_are_as_public_as_their_neighbours(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "mlx") as place:
            (place / "config.json").touch()
        with atomic_file(tmp_path / "page.html"):
            pass
    finally:
        os.umask(before)
    modes = [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("mlx", "mlx/config.json", "page.html")]
    assert modes == ["0o750", "0o640", "0o640"]


def test_what_is_not_finished_can_be_discarded_before_its_end(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "mlx") as place:
        (place / "half").touch()
        discard_unfinished()
        assert names(tmp_path) == []
    assert names(tmp_path) == []


def test_a_folder_of_ours_is_replaced_when_that_is_asked_for(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "old").touch()
    with atomic_folder(tmp_path / "mlx", overwrite=True, is_own=lambda folder: True) as place:
        (place / "new").touch()
        assert names(tmp_path / "mlx") == ["old"]
    assert [path.name for path in tmp_path.rglob("*")] == ["mlx", "new"]


def test_the_old_folder_stays_when_the_new_one_does_not_come(tmp_path, monkeypatch):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "old").touch()
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    folder = atomic_folder(tmp_path / "mlx", overwrite=True, is_own=lambda folder: True)
    with pytest.raises(OSError, match="Input/output error"), folder as place:
        (place / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["mlx", "old"]


def test_a_folder_moved_away_by_a_killed_process_comes_back(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "old").touch()
    killed(tmp_path / "mlx", "moved")
    assert not (tmp_path / "mlx").exists()
    with pytest.raises(KeyError), temporary_folder(tmp_path / "mlx"):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["mlx", "old"]


@pytest.mark.parametrize("near", ["mlx", "mlx/inside", "."])
def test_a_folder_that_is_read_is_not_overwritten(tmp_path, near):
    (tmp_path / "mlx" / "inside").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is an input, inside or around it"):
        check_target(tmp_path / "mlx", overwrite=True, is_own=lambda folder: True, inputs=[tmp_path / near])


def test_a_folder_of_others_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="only a folder written by convert is overwritten"):
        check_target(tmp_path, overwrite=True, is_own=lambda folder: False)


def test_a_file_of_ours_and_an_empty_one_are_replaced(tmp_path):
    for content in (OWN + b" and more", b""):
        (tmp_path / "page").write_bytes(content)
        check(tmp_path / "page")


def test_a_file_of_others_is_refused_and_the_remedy_named_works(tmp_path):
    (tmp_path / "page").write_bytes(b"other")
    with pytest.raises(FileExistsError, match=r"was not written by mlx-aimv2: choose another name, or add --over"):
        check(tmp_path / "page")
    check(tmp_path / "page", overwrite=True)


@pytest.mark.parametrize("name", ["photo.jpg", "link.jpg", "hard.jpg"])
def test_an_input_is_never_replaced_by_whatever_name(tmp_path, name):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(OWN)
    (tmp_path / "link.jpg").symlink_to(photo)
    (tmp_path / "hard.jpg").hardlink_to(photo)
    with pytest.raises(FileExistsError, match=r"would replace the input .*photo\.jpg"):
        check(tmp_path / name, overwrite=True, inputs=[tmp_path / "gone.jpg", photo])


def test_devices_and_folders_are_no_targets(tmp_path):
    with pytest.raises(FileExistsError, match="is a device: name a file"):
        check(Path(os.devnull), overwrite=True)
    with pytest.raises(FileExistsError, match="is a folder: name a file"):
        check(tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="create it first"):
        check(tmp_path / "nowhere" / "page")


def test_behind_a_link_the_file_that_it_leads_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "page"
    link.symlink_to(tmp_path / "there" / "page")
    with atomic_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (tmp_path / "there" / "page").read_bytes() == b"new"
    assert names(tmp_path / "there") == ["page"]


MARKS = {
    "nothing": ({}, True),
    "its size": ({"st_size": 6}, False),
    "its content": ({"st_mtime_ns": 8}, False),
    "its entry": ({"st_ctime_ns": 8}, False),
    "another file": ({"st_ino": 8}, False),
}


@pytest.mark.parametrize(("changed", "same"), MARKS.values(), ids=MARKS.keys())
def test_a_file_is_unchanged_while_all_that_tells_of_it_is(changed, same):
    about = SimpleNamespace(**{"st_size": 5, "st_mtime_ns": 6, "st_ctime_ns": 7, "st_ino": 9} | changed)
    assert is_unchanged(about, 5, 6, 7, 9) == same
    earlier = changed.keys() & {"st_size", "st_mtime_ns"}
    assert is_unchanged(about, 5, 6, None, None) == (not earlier)


def test_a_number_that_each_mount_gives_anew_does_not_count():
    """exFAT and FUSE keep no time of the entry: it is that of the content."""
    about = SimpleNamespace(st_size=5, st_mtime_ns=6, st_ctime_ns=6, st_ino=(1 << 64) - 1)
    assert is_unchanged(about, 5, 6, 6, 9)
    assert marks_of(about)[3] < 1 << 63
