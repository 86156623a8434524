"""What does embedding a folder cost beside decoding and encoding alone, and does memory stay level?

python -m benchmarks.folder [--pictures 10000] [--side 320] [--model FOLDER] [--threads N] [--rounds 3]

Makes a folder of JPEG pictures and, in a new process for each round, measures three things in turns: the files decoded
by the same threads with nothing else to do; the model alone on batches that are ready; and `embed` into an index, from
the list of files to the last commit. Memory is what the process holds after 1,000 pictures and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_aimv2.bundled import ASSETS
from mlx_aimv2.decoding import Decoder
from mlx_aimv2.embed import embed_sheets, sheets_of
from mlx_aimv2.indexing import IndexWriter
from mlx_aimv2.listing import list_pictures
from mlx_aimv2.loading import load
from mlx_aimv2.pooling import Pooling
from mlx_aimv2.updating import Plan, Update

KINDS = ("decode", "model", "embed")


def make(folder: Path, count: int, side: int) -> None:
    """Fills a folder with pictures of soft random colours, a third of them upright, a third lying."""
    random = np.random.default_rng(0)
    sizes = ((side, side), (side, side * 3 // 4), (side * 3 // 4, side))
    for number in range(count):
        low = Image.fromarray(random.integers(0, 256, (7, 7, 3), np.uint8))
        low.resize(sizes[number % 3], Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=88)


def resident() -> float:
    """Memory that the process holds now, in MB; its peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(kind: str, folder: Path, model_folder: str, threads: int) -> dict[str, float]:
    """Seconds of one kind of work over the whole folder, and memory on the way."""
    model, processor = load(model_folder)
    pooling = Pooling.of(model)
    files = list_pictures([folder]).files
    sheets = sheets_of(files)
    batch = mx.array(np.stack([processor.pixels(file) for file in sheets[0]]))
    mx.eval(pooling(model, batch))
    works: dict[str, Callable[[], dict[str, float]]] = {
        "decode": lambda: _decode(Decoder(processor), files, threads),
        "model": lambda: _encode(lambda: pooling(model, batch), len(sheets)),
        "embed": lambda: _embed(folder, sheets, model, processor, pooling, threads),
    }
    start, processor_start = time.perf_counter(), time.process_time()
    memory = works[kind]()
    return {
        "seconds": time.perf_counter() - start,
        "processor seconds": time.process_time() - processor_start,
        **memory,
    }


def _decode(decoder: Decoder, files: list[str], threads: int) -> dict[str, float]:
    with ThreadPoolExecutor(threads) as pool:
        for _ in decoder.ahead(files, pool, 4 * threads):
            pass
    return {}


def _encode(work: Callable[[], mx.array], count: int) -> dict[str, float]:
    for _ in range(count):
        np.array(work())
    return {}


def _embed(folder, sheets, model, processor, pooling, threads) -> dict[str, float]:  # type: ignore[no-untyped-def]
    target = folder / "pictures.db"
    target.unlink(missing_ok=True)

    def create() -> IndexWriter:
        return IndexWriter.create(target, provenance={}, width=pooling.width(model), dtype="float16")

    update = Update(Plan(sheets=sheets), None, create)
    memory: dict[str, float] = {}
    done = 0
    for sheet in embed_sheets(sheets, model, processor, pooling=pooling, threads=threads):
        update.take(sheet)
        done += len(sheet)
        if done >= 1000:
            memory.setdefault("MB after 1,000", resident())
    update.finish()
    return memory | {"MB at the end": resident()}


def main() -> None:
    """Makes the folder and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--model", default=str(ASSETS / "digits"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="use these pictures")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.folder, arguments.model, arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.folder is None:
            make(folder, arguments.pictures, arguments.side)
        rounds = [{kind: _in_process(kind, folder, arguments) for kind in KINDS} for _ in range(arguments.rounds)]
    count = len(list_pictures([folder]).files) or arguments.pictures
    print(
        f"{count} pictures, {arguments.threads} threads that decode, {os.cpu_count()} cores of {platform.machine()}, "
        f"MLX {mx.__version__} on {mx.default_device()}"
    )
    for kind in KINDS:
        wall, processor = (
            statistics.median(one[kind][unit] for one in rounds) for unit in ("seconds", "processor seconds")
        )
        print(f"{kind:<8}{wall:8.2f} s {count / wall:9.1f} pictures a second {processor:8.2f} s of processor time")
    ratios = [one["embed"]["seconds"] / max(one["decode"]["seconds"], one["model"]["seconds"]) for one in rounds]
    print(f"embed / the larger of both, each round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    effort = [
        one["embed"]["processor seconds"] / sum(one[kind]["processor seconds"] for kind in ("decode", "model"))
        for one in rounds
    ]
    print(f"processor time, embed / the sum of both: {', '.join(f'{ratio:.2f}' for ratio in effort)}")
    early, late = (
        statistics.median(one["embed"][key] for one in rounds) for key in ("MB after 1,000", "MB at the end")
    )
    print(f"memory: {early:.0f} MB after 1,000 pictures, {late:.0f} MB at the end, {late / early - 1:+.1%}")


def _in_process(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.folder", "--only", kind, "--folder", str(folder)]
    command += ["--model", arguments.model, "--threads", str(arguments.threads)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


if __name__ == "__main__":
    main()
