"""Measures the memory and time of converting a checkpoint of the size of AIMv2-3B.

`python -m benchmarks.convert_memory FOLDER [--size large|huge|1B|3B] [--keep]`: writes a checkpoint of random numbers
in Apple's layout (3B: 10.9 GB in float32) into FOLDER, converts it in fresh processes, and compares each with reading
the checkpoint and writing as many bytes as the result has. FOLDER needs about twice the checkpoint's size.

The peak is what the kernel reports for the converting process (ru_maxrss): everything resident, Python and its
libraries included, the page cache not. Every time includes bringing the result to the disk (fsync). Each timed step
comes right after a result of the same size was removed, so that both find as much free memory for the page cache; the
conversion is run once before, untimed, for that.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_aimv2 import Aimv2Processor
from mlx_aimv2.checkpoint.layouts import layout_for
from mlx_aimv2.config import WIDTHS, released
from mlx_aimv2.conversion import folder as folders
from mlx_aimv2.conversion.folder import write_safetensors
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.loading import build, parameter_shapes

CASES = {
    "float16": ["--dtype", "float16"],
    "8 bit": ["--dtype", "float16", "-q", "--q-bits", "8"],
}
CHUNK = 16 << 20


def write_checkpoint(folder: Path, size: str) -> Path:
    """A checkpoint of random numbers in Apple's layout, one tensor after another."""
    config = released(f"{size}-patch14-224").config.vision
    shapes = layout_for("apple", pair=False).source_shapes(parameter_shapes(build(config)))
    folder.mkdir(parents=True, exist_ok=True)
    folders.save_config(folder, folders.config_for(config, "apple"))
    Aimv2Processor(published(224)).save_to(folder)
    tensors = {name: mx.random.normal(shape, scale=0.02) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    return folder


def in_a_child(work: Callable[[], None]) -> tuple[float, float, float]:
    """Runs `work` in a process of its own: seconds, seconds on the processor, peak of its resident memory in GB."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"a step failed with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e9


def copy_bytes(source: Path, target: Path, count: int) -> None:
    """Reads a file to its end and writes `count` bytes to another, to the disk."""
    left = count
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while chunk := reader.read(CHUNK):
            left -= writer.write(chunk[:left]) if left else 0
        os.fsync(writer.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(WIDTHS), default="3B")
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoint afterwards")
    arguments = parser.parse_args()
    source = arguments.folder / f"synthetic-{arguments.size}"
    if not source.exists():
        write_checkpoint(source, arguments.size)
    weights = source / "model.safetensors"
    print(f"checkpoint: {weights.stat().st_size / 1e9:.2f} GB")
    result, copied = arguments.folder / "converted", arguments.folder / "copied"
    for name, flags in CASES.items():
        command = [sys.executable, "-m", "mlx_aimv2.convert", "--model", str(source), "--mlx-path", str(result)]
        shutil.rmtree(result, ignore_errors=True)
        conversion = partial(os.execv, command[0], [*command, *flags, "--no-verify"])
        in_a_child(conversion)
        shutil.rmtree(result)
        seconds, cpu, peak = in_a_child(conversion)
        shards = [file.stat().st_size for file in result.glob("*.safetensors")]
        shutil.rmtree(result)
        baseline, baseline_cpu, _ = in_a_child(partial(copy_bytes, weights, copied, sum(shards)))
        copied.unlink()
        print(
            f"{name}: peak {peak:.2f} GB, largest shard {max(shards) / 1e9:.2f} GB of {sum(shards) / 1e9:.2f} GB; "
            f"{seconds:.1f} s (processor {cpu:.1f} s), reading and writing the same bytes {baseline:.1f} s "
            f"(processor {baseline_cpu:.1f} s), ratio {seconds / baseline:.2f}; load {os.getloadavg()[0]:.1f}"
        )
    if not arguments.keep:
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
