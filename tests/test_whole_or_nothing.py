"""A conversion that is killed, or loses its disk or its source, leaves either a whole folder or nothing."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_aimv2 import load
from mlx_aimv2.convert import convert
from mlx_aimv2.files import atomic_folder
from tests import programs
from tests.small_encoder import small_encoder

ENCODER = small_encoder()


@pytest.fixture
def source(tmp_path):
    shutil.copytree(ENCODER, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a small disk of its own at `tmp_path/disk`; needs the rights to."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root on Linux may mount a disk")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def test_a_folder_that_another_process_is_writing_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.files.PATIENCE", 0.1)
    code = f"""
import sys
from pathlib import Path
from mlx_aimv2.files import atomic_folder
with atomic_folder(Path({str(tmp_path / "mlx")!r})) as place:
    (place / "theirs").touch()
    print("writing", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=programs.environment(), **pipes) as other:
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(FileExistsError, match="mlx: another process is writing there"):
            convert(ENCODER, tmp_path / "mlx", verify=False)
        other.communicate("")
    assert [path.name for path in tmp_path.rglob("*")] == ["mlx", "theirs"]


def test_two_at_once_end_with_one_whole_folder(tmp_path):
    command = [sys.executable, "-m", "mlx_aimv2.convert", "--model", str(ENCODER), "--mlx-path", str(tmp_path / "mlx")]
    command.append("--no-verify")
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate()[1].splitlines()[-1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 2]
    assert "already exists" in errors[codes.index(2)]
    assert load(tmp_path / "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["mlx"]


def test_an_interruption_by_hand_leaves_nothing(tmp_path):
    def stop(line):
        if "Quantizing" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ENCODER, tmp_path / "mlx", quantize=True, log=stop)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(disk):
    place = disk("size=1m")
    with pytest.raises(
        OSError, match=r"^Cannot save to the path .*mlx: No space left on device. Make room, or choose another one.$"
    ):
        convert(ENCODER, place / "mlx")
    assert not list(place.iterdir())


def test_a_file_that_may_not_grow_is_one_line_and_leaves_nothing(tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [sys.executable, "-m", "mlx_aimv2.convert", "--model", str(ENCODER), "--mlx-path", str(tmp_path / "mlx")]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == (
        f"mlx-aimv2: Cannot save to the path {tmp_path / 'mlx'}: File too large. Make room, or choose another one."
    )
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_target_on_a_read_only_disk_is_one_line_before_anything_is_read(disk):
    place, lines = disk("size=1m", "ro"), []
    with pytest.raises(PermissionError, match=f"^Cannot save to the path .*{place} is not writable"):
        convert(ENCODER, place / "mlx", log=lines.append)
    assert not lines


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_without_the_right_to_write_is_one_line(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="is not writable"):
            convert(ENCODER, tmp_path / "mlx")
    finally:
        tmp_path.chmod(0o755)


def test_a_target_inside_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^Cannot save to the path .*file/mlx"):
        convert(ENCODER, tmp_path / "file" / "mlx")


@pytest.mark.parametrize("moment", ["Using dtype", "Quantizing", "Comparing"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_source_deleted_meanwhile_is_one_line_or_a_whole_folder(source, tmp_path, moment, verify):
    def delete(line):
        if moment in line:
            shutil.rmtree(source)

    target = tmp_path / "mlx"
    with contextlib.suppress(FileNotFoundError):
        convert(source, target, quantize=True, verify=verify, log=delete)
        assert load(target)
        assert (target / "preprocessor_config.json").is_file()
        assert (target / "fidelity.json").is_file() == verify
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "mlx"}
    if moment == "Using dtype":
        assert not target.exists()


def test_a_source_that_vanishes_says_so(source, tmp_path):
    def delete(line):
        if "Using dtype" in line:
            shutil.rmtree(source)

    with pytest.raises(FileNotFoundError, match="source disappeared while it was read; nothing was written"):
        convert(source, tmp_path / "mlx", verify=False, log=delete)


def test_a_source_cut_short_meanwhile_is_one_line_that_names_a_tensor(source, tmp_path):
    def cut(line):
        if "Using dtype" in line:
            os.truncate(source / "model.safetensors", 1 << 20)

    with pytest.raises(OSError, match=r"can no longer be read at .*: was it truncated or changed") as caught:
        convert(source, tmp_path / "mlx", verify=False, log=cut)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_error_in_a_block_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "mlx") as place:
        (place / "half").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "mlx"):
        (tmp_path / "mlx").mkdir()
        (tmp_path / "mlx" / "other").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["mlx", "other"]


def test_the_parent_folders_of_the_target_are_made(tmp_path):
    assert load(convert(ENCODER, Path(tmp_path / "a" / "b" / "mlx"), verify=False))
