"""A disk that is full at any moment: every verb that writes ends with one line that names what cannot be written."""

import json
import shutil
import subprocess
import sys

import pytest

from mlx_aimv2.cli import main
from tests import programs
from tests.small_training import CaptionWorkshop, Workshop

FREE = (0, 8, 24, 64, 192)
"""Kilobytes that the disk has left."""

# Runs a command with so much room, then again with all of it, going on where there is a state, and in the end afresh.
# In a process of its own, since a full disk under a memory map ends one by a signal.
DRIVER = """
import contextlib, io, json, shutil, sys
from pathlib import Path
from mlx_aimv2.cli import main
disk, free, command = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
def run(*more):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        return main([*command, *more]), said.getvalue()
def weights():
    return [path.read_bytes().hex() for path in sorted(disk.glob("out/*.safetensors"))]
runs = []
for size in [*free, 8 << 10]:
    (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 1024 * size)))
    code, said = run()
    (disk / "filler").unlink()
    left = sorted(path.name for path in disk.iterdir())
    again = (code, said)
    if code:
        again = run(*(["--resume"] if (disk / "out.training" / "state.safetensors").exists() else []))
    runs.append([size, code, said, left, *again, weights()])
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
print(json.dumps(runs))
"""

VERBS = (
    *("fit linear", "fit knn", "fit attentive", "fit lora", "fit full", "fit segment", "pretrain", "lit"),
    *("embed", "embed exports", "convert", "export", "fuse", "map", "search"),
    *(f"{verb} {task}" for verb in ("predict", "evaluate") for task in ("classify", "segment", "detect")),
)


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shops")
    labels, captions = Workshop(folder / "labels"), CaptionWorkshop(folder / "captions")
    assert main(["embed", str(labels.data["classify"]), "-m", str(labels.encoder), "-o", str(folder / "x.db")]) == 0
    return labels, captions, folder / "x.db"


def command(labels, captions, index, disk, name):
    """A command that writes to the disk alone, its caches too."""
    verb, kind = f"{name} ".split(" ", 1)
    kind, out, images = kind.strip(), disk / "out", labels.data["classify"]
    if verb == "fit":
        loop = [] if kind in ("linear", "knn") else ["--iters", 3, "--batch-size", 4, "--steps-per-eval", 1]
        data, types = (labels.data["segment"], []) if kind == "segment" else (images, ["--fine-tune-type", kind])
        return ["fit", data, "-m", labels.encoder, "-o", out, *types, *loop]
    if verb in ("predict", "evaluate"):
        head = labels.head(kind, "lora", iters=1, batch_size=4)
        return [verb, head, labels.data[kind], "-o" if verb == "predict" else "--card", out]
    exports = ["--export", "npz"] if kind else []
    steps = ["--save-every", 1, "--iters", 2]
    return {
        "pretrain": lambda: [*captions.words("pretrain", *steps, "--samples-every", 1), "-o", out],
        "lit": lambda: [*captions.words("lit", *steps), "-o", out],
        "embed": lambda: ["embed", images, "-m", labels.encoder, "-o", disk / "out.db", *exports],
        "convert": lambda: ["convert", "--hf-path", labels.encoder, "--mlx-path", out],
        "export": lambda: ["export", "-m", labels.encoder, "-o", disk / "out.mlxfn"],
        "fuse": lambda: ["fuse", "--adapter-path", labels.head("classify", "lora", iters=1), "--save-path", out],
        "map": lambda: ["map", images / "dark" / "0.png", "-m", labels.encoder, "-o", disk / "out.png"],
        "search": lambda: ["search", index, images / "dark" / "0.png", "--html", disk / "out.html"],
    }[verb]()


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_a_disk_that_fills_is_one_line_and_what_was_done_is_kept(shops, tmp_path, name):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root on Linux may mount a disk")
    try:
        words = [str(word) for word in command(*shops, disk, name)]
        driver = [sys.executable, "-c", DRIVER, str(disk), json.dumps(FREE), json.dumps(words)]
        environment = programs.environment(MLX_AIMV2_CACHE=str(disk / "cache"))
        run = subprocess.run(driver, capture_output=True, text=True, env=environment)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert run.returncode == 0, run.stderr
    runs = json.loads(run.stdout)
    assert runs[0][1] == 2 and runs[-1][1] == 0
    for size, code, said, left, code_again, said_again, weights in runs:
        assert code in (0, 2), (size, said)
        if code:
            line = said.splitlines()[-1]
            assert line.startswith("mlx-aimv2: ") and str(disk) in line and "a fault" not in line, line
            assert any(advice in line for advice in ("ake room", "free some", "is full")), line
            assert set(left) <= {"cache", "out.training", "out.db"}, (size, left)
            assert ("out.training" in left) == ("--resume" in line), (size, line)
        assert code_again == 0, (size, said_again)
        assert weights == runs[-1][-1], size
