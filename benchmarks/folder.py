"""Measures embedding a folder beside decoding and encoding alone, and how the cost grows with the images.

python -m benchmarks.folder [--images 100 1000 10000] [--side 320] [--model FOLDER] [--threads N] [--rounds 3]

Makes a folder of JPEG images and adds images until it has each of these numbers. Three things are measured, each in a
new process and alternating over the rounds: decoding the files with the same threads; the model on prepared batches, as
large as those of `embed`; and `embed` into an index, from the list of files to the last commit. Memory is the resident
memory of the process after 1,000 images and at the end (on a Mac: its maximum until then). The table is Markdown, with
medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from benchmarks.machine import summary
from mlx_aimv2.backend import device
from mlx_aimv2.bundled import ASSETS
from mlx_aimv2.embed.encode import Pooling, embed_chunks
from mlx_aimv2.embed.job import COMMIT_IMAGES
from mlx_aimv2.embed.loader import Decoder, ahead, images_at_once, split_into_chunks
from mlx_aimv2.images.find import list_images
from mlx_aimv2.index import Embedding
from mlx_aimv2.index.writer import IndexWriter
from mlx_aimv2.loading import load

KINDS = ("decode", "model", "embed")


HEAD = (
    "| images | decode, s | model, s | embed, s | ms per image | embed over the larger of both "
    "| processor time over the sum of both | MB after 1,000 | MB at the end |\n" + "|---" * 9 + "|"
)


def make(folder: Path, numbers: range, side: int) -> None:
    """Adds images of smooth random colours to a folder: a third square, a third landscape, a third portrait."""
    random = np.random.default_rng(numbers.start)
    sizes = ((side, side), (side, side * 3 // 4), (side * 3 // 4, side))
    for number in numbers:
        low = Image.fromarray(random.integers(0, 256, (7, 7, 3), np.uint8))
        low.resize(sizes[number % 3], Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=88)


def resident() -> float:
    """Resident memory of the process in MB; its peak where the system reports only that."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(kind: str, folder: Path, model_folder: str, threads: int) -> dict[str, float]:
    """Seconds of one kind of work over the whole folder, and memory in between."""
    model, processor = load(model_folder, dtype="auto")
    pooling = Pooling.of(model)
    files = list_images([folder]).files
    chunks = split_into_chunks(files)
    if model.vision.config.is_native:
        raise SystemExit("a native model makes a batch of its own for each size; give a model of one size")
    pixels = mx.array(np.stack([processor.pixels(file) for file in chunks[0]]))
    at_once = images_at_once(model.vision.config.num_patches)
    batches = [
        pixels[: len(chunk[first : first + at_once])] for chunk in chunks for first in range(0, len(chunk), at_once)
    ]
    mx.eval(pooling(model, batches[0]))
    works: dict[str, Callable[[], dict[str, float]]] = {
        "decode": lambda: _decode(Decoder(processor), files, threads),
        "model": lambda: _encode(partial(pooling, model), batches),
        "embed": lambda: _embed(chunks, model, processor, pooling, threads),
    }
    start, processor_start = time.perf_counter(), time.process_time()
    memory = works[kind]()
    return {
        "seconds": time.perf_counter() - start,
        "processor seconds": time.process_time() - processor_start,
        **memory,
    }


def _decode(decoder: Decoder, files: list[str], threads: int) -> dict[str, float]:
    with ahead(files, decoder, count=4 * threads, threads=threads) as coming:
        for _ in coming:
            pass
    return {}


def _encode(work: Callable[[mx.array], mx.array], batches: list[mx.array]) -> dict[str, float]:
    for batch in batches:
        np.array(work(batch))
    return {}


def _embed(chunks, model, processor, pooling, threads) -> dict[str, float]:  # type: ignore[no-untyped-def]
    memory: dict[str, float] = {}
    pending: list[Embedding] = []
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "images.db"
        with IndexWriter.create(target, provenance={}, width=pooling.width(model), dtype="float16") as index:
            for result in embed_chunks(chunks, Decoder(processor), model, pooling, threads=threads):
                pending += result.embeddings
                if len(pending) >= COMMIT_IMAGES:
                    index.add(pending)
                    pending = []
                    memory.setdefault("MB after 1,000", resident())
            index.add(pending)
        return memory | {"MB at the end": resident()}


def main() -> None:
    """Makes the folder and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--model", default=str(ASSETS / "emoji"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="use these images, which stay as they are")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.folder, arguments.model, arguments.threads)))
        return
    print(f"{summary()}; mlx {device.mlx_build()}; {arguments.threads} threads decode")
    print(f"{Path(arguments.model).name}, {arguments.rounds} rounds\n\n{HEAD}", flush=True)
    if arguments.folder:
        _row(arguments.folder, arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        made = 0
        for count in sorted(arguments.images):
            make(Path(temporary), range(made, count), arguments.side)
            made = count
            _row(Path(temporary), arguments)


def _row(folder: Path, arguments: argparse.Namespace) -> None:
    """Measures one folder and prints its row of the table."""
    rounds = [{kind: _in_process(kind, folder, arguments) for kind in KINDS} for _ in range(arguments.rounds)]
    count = len(list_images([folder]).files)
    seconds = {kind: statistics.median(one[kind]["seconds"] for one in rounds) for kind in KINDS}
    wall = [one["embed"]["seconds"] / max(one[kind]["seconds"] for kind in ("decode", "model")) for one in rounds]
    effort = [
        one["embed"]["processor seconds"] / sum(one[kind]["processor seconds"] for kind in ("decode", "model"))
        for one in rounds
    ]
    cells = [f"{count:,}", *(f"{seconds[kind]:.2f}" for kind in KINDS), f"{seconds['embed'] / count * 1e3:.2f}"]
    cells += [f"{statistics.median(ratios):.2f}" for ratios in (wall, effort)]
    for key in ("MB after 1,000", "MB at the end"):
        held = [one["embed"][key] for one in rounds if key in one["embed"]]
        cells.append(f"{statistics.median(held):.0f}" if held else "")
    print(f"| {' | '.join(cells)} |", flush=True)


def _in_process(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.folder", "--only", kind, "--folder", str(folder)]
    command += ["--model", arguments.model, "--threads", str(arguments.threads)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)  # the process has printed why
    result: dict[str, float] = json.loads(finished.stdout)
    return result


if __name__ == "__main__":
    main()
