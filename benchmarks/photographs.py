"""Measures what fast decoding of a phone's photographs gains, and what it costs in quality.

python -m benchmarks.photographs make FOLDER [--images 300] [--megapixels 12]
python -m benchmarks.photographs speed FOLDER [--before CHECKOUT] [--rounds 3] [--model FOLDER] [--threads N]
python -m benchmarks.photographs quality [FOLDER] [--random large-patch14-224]
python -m benchmarks.photographs ways FOLDER
python -m benchmarks.photographs memory FOLDER [--threads 8] [--model FOLDER]

`make` writes JPEGs of the bundled photographs, enlarged, with a sensor's noise so that they weigh 2 to 4 MB; every
tenth of them is a new scene, the others differ from it in a comment, which makes them other files to `embed`. `speed`
runs `mlx-aimv2 embed` in fresh processes, in turns: an older checkout (--before), --decode exact and --decode fast.
`quality` gives the cosine of features, exact against fast, on photographs and on synthetic detail. `ways` times other
ways to decode less. `memory` gives the peak of `embed` over that of one small image. Tables are Markdown.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from benchmarks.machine import summary
from mlx_aimv2 import bundled
from mlx_aimv2.backend import device
from mlx_aimv2.cli import bench
from mlx_aimv2.config import released
from mlx_aimv2.images import Policy, open_image
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.loading import load

ROOT = Path(__file__).parents[1]

SCENES = 10
"""Files that share a scene, which differ in a comment."""

GRAIN = 8.0
"""Standard deviation of the noise, in grey levels."""


def scene(number: int, megapixels: float) -> Image.Image:
    """A photograph of 4:3 with so many pixels: part of a bundled one, enlarged, with noise."""
    dice = np.random.default_rng(number)
    width, height = (int((megapixels * 1e6 * ratio) ** 0.5) // 16 * 16 for ratio in (4 / 3, 3 / 4))
    source = Image.open(bundled.photographs()[number % 4]).convert("RGB")
    high = int(source.height * dice.uniform(0.7, 1.0))
    wide = min(source.width, high * 4 // 3)
    left, top = (
        int(dice.integers(0, whole - part + 1)) for whole, part in ((source.width, wide), (source.height, high))
    )
    image = source.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
    levels = np.asarray(image).astype(np.float32)
    levels += dice.standard_normal(levels.shape[:2], np.float32)[..., None] * GRAIN
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def make(folder: Path, images: int, megapixels: float) -> None:
    """Writes the photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = []
    for number in range(images):
        if number % SCENES == 0:
            stream = io.BytesIO()
            scene(number // SCENES, megapixels).save(stream, "JPEG", quality=85)
            whole = stream.getvalue()
        comment = f"photograph {number}".encode()
        data = whole[:2] + struct.pack(">BBH", 0xFF, 0xFE, len(comment) + 2) + comment + whole[2:]
        (folder / f"{number:05d}.jpg").write_bytes(data)
        sizes.append(len(data) / 1e6)
    print(f"{images} JPEGs of {megapixels:g} megapixels, {min(sizes):.1f} to {max(sizes):.1f} MB")


def speed(arguments: argparse.Namespace) -> None:
    """Times `embed` on a folder, in turns."""
    contenders: dict[str, tuple[Path, list[str]]] = {"exact": (ROOT, ["--decode", "exact"]), "fast": (ROOT, [])}
    if arguments.before:
        contenders = {"before": (arguments.before, []), **contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, (root, flags) in contenders.items():
            with tempfile.TemporaryDirectory() as place:
                command = [sys.executable, "-m", "mlx_aimv2", "embed", str(arguments.folder.absolute()), *flags]
                command += ["-m", arguments.model, "-o", str(Path(place) / "a.db"), "--json"]
                command += ["--threads", str(arguments.threads), "--dtype", "float32"]
                environment = os.environ | {"PYTHONPATH": str(root)}
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                seconds[name].append(json.loads(done.stdout)["seconds"])
                processor[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        print("  ".join(f"{name} {times[-1]:.1f} s" for name, times in seconds.items()), file=sys.stderr, flush=True)
    base = next(iter(seconds))
    print(
        "| embed | s, median | s, fastest | processor s, fastest | times as fast, median | by fastest | by processor |"
    )
    print("|---" * 7 + "|")
    for name, times in seconds.items():
        ratio = statistics.median(first / own for first, own in zip(seconds[base], times, strict=True))
        cells = [f"{statistics.median(times):.1f}", f"{min(times):.1f}", f"{min(processor[name]):.1f}", f"{ratio:.2f}"]
        cells += [f"{min(kind[base]) / min(kind[name]):.2f}" for kind in (seconds, processor)]
        print(f"| {name} | {' | '.join(cells)} |")


def synthetic() -> Iterator[tuple[str, Image.Image]]:
    """Detail that is hard on a scale: stars, text, stripes at and near the Nyquist limit of the scales, white noise."""
    dice = np.random.default_rng(0)
    width, height = 4032, 3024
    sky = np.zeros((height, width), np.uint8)
    for _ in range(4000):
        sky[dice.integers(0, height), dice.integers(0, width)] = 255
    yield "stars of one pixel", Image.fromarray(sky).convert("RGB")
    from PIL import ImageDraw

    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    for row in range(0, height, 22):
        pen.text((8, row), "the quick brown fox jumps over the lazy dog 0123456789 " * 14, fill="black", font_size=18)
    yield "text of 18 pixels", page
    x = np.arange(width)
    for period in (2, 4, 6, 8, 12, 16, 27):
        stripes = np.where((x // (period / 2)) % 2 < 1, 255, 0).astype(np.uint8)
        yield f"stripes, {period} pixels", Image.fromarray(np.tile(stripes, (height, 1))).convert("RGB")
    yield "white noise", Image.fromarray(dice.integers(0, 256, (height, width, 3), np.uint8))


def quality(arguments: argparse.Namespace) -> None:
    """Cosine of features, exact against fast."""
    models = {"embedded": load(bundled.emoji_checkpoint(), dtype="float32")}
    if arguments.random:
        config = released(arguments.random).config.vision
        models[f"random {arguments.random}"] = (
            bench.random_model(config, mx.float32),
            Aimv2Processor(published(config.image_size)),
        )
    groups: dict[str, list[bytes]] = {"bundled, as they are": [path.read_bytes() for path in bundled.photographs()]}
    if arguments.folder:
        files = sorted(arguments.folder.glob("*.jpg"))[::SCENES]
        groups[f"{arguments.folder.name}, {len(files)} scenes"] = [file.read_bytes() for file in files]
    for name, image in synthetic():
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        groups[name] = [stream.getvalue()]
    print(f"| images | model | cosine, mean | least | grey levels apart, mean |\n{'|---' * 5}|")
    for group, contents in groups.items():
        for name, (model, processor) in models.items():
            found = [_compare(model, processor, data) for data in contents]
            cosines, levels = ([pair[axis] for pair in found] for axis in (0, 1))
            print(
                f"| {group} | {name} | {statistics.mean(cosines):.6f} | {min(cosines):.6f} | "
                f"{statistics.mean(levels):.2f} |",
                flush=True,
            )


def _compare(model, processor: Aimv2Processor, data: bytes) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    both = [processor.levels(open_image(data, policy=Policy(decode=decode))) for decode in ("exact", "fast")]
    features = np.array(model.encode_image(processor.normalised(mx.array(np.stack(both)))).astype(mx.float32), float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return float(features[0] @ features[1]), float(np.abs(both[0].astype(int) - both[1]).mean())


def ways(arguments: argparse.Namespace) -> None:
    """Times ways to bring one image of each format to 224 pixels, and threads against one."""
    data = next(iter(sorted(arguments.folder.glob("*.jpg")))).read_bytes()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    contents = {"JPEG": data}
    for kind, options in (("PNG", {"compress_level": 1}), ("WEBP", {"quality": 85, "method": 0})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        contents[kind] = stream.getvalue()
    size = (299, 224)
    exact = {kind: np.asarray(_plain(content, size)).astype(int) for kind, content in contents.items()}
    print(f"| way | ms, fastest of {arguments.rounds} | grey levels from exact, mean |\n{'|---' * 3}|")

    def row(name: str, kind: str, work: Callable[[], Image.Image]) -> None:
        times = []
        for _ in range(arguments.rounds):
            began = time.process_time()
            made = work()
            times.append(time.process_time() - began)
        apart = np.abs(np.asarray(made).astype(int) - exact[kind]).mean()
        print(f"| {name} | {min(times) * 1e3:.0f} | {apart:.2f} |", flush=True)

    for kind, content in contents.items():
        row(f"{kind}, exact", kind, lambda content=content: _plain(content, size))  # type: ignore[misc]
        for gap in (2.0, 3.0):
            row(f"{kind}, reducing_gap {gap:g}", kind, lambda c=content, g=gap: _plain(c, size, g))  # type: ignore[misc]
    for more in (1, 2, 3):
        row(f"JPEG, DCT scale, {more} times the target", "JPEG", lambda more=more: _draft(data, size, more))  # type: ignore[misc]
    pools: dict[str, Callable[[], Executor]] = {
        "one thread": lambda: ThreadPoolExecutor(1),
        "two threads": lambda: ThreadPoolExecutor(2),
        "two processes": lambda: ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")),
    }
    for name, pool in pools.items():
        with pool() as workers:
            list(workers.map(_decoded, [data] * 4))  # the processes have started
            began = time.perf_counter()
            list(workers.map(_decoded, [data] * 24))
        print(
            f"| JPEG, DCT scale, 24 in {name}, ms each by the clock | {(time.perf_counter() - began) / 24e-3:.0f} | |"
        )


def _decoded(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(_draft(data, (299, 224), 3))


def _plain(data: bytes, size: tuple[int, int], gap: float | None = None) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=gap)


def _draft(data: bytes, size: tuple[int, int], more: int) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (more * size[0], more * size[1]))
    return image.resize(size, Image.Resampling.BICUBIC)


def memory(arguments: argparse.Namespace) -> None:
    """Peak memory of `embed` on a folder over that on one small image, each in a fresh process."""
    with tempfile.TemporaryDirectory() as place:
        small = Path(place) / "small"
        small.mkdir()
        Image.new("RGB", (64, 48)).save(small / "a.png")
        base = _peak(small, arguments, [])
        for flags in (["--decode", "fast"], ["--decode", "exact"]):
            peak = _peak(arguments.folder, arguments, flags)
            print(f"{' '.join(flags)}, {arguments.threads} threads: {peak - base:.0f} MB over {base:.0f} MB")


def _peak(folder: Path, arguments: argparse.Namespace, flags: list[str]) -> float:
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "benchmarks.photographs", "embed", str(folder), "--model", arguments.model]
        command += ["--threads", str(arguments.threads), "--output", str(Path(place) / "a.db"), *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _embed_and_tell_peak(arguments: argparse.Namespace) -> None:
    from mlx_aimv2.cli import main as run

    command = ["embed", str(arguments.folder), "-m", arguments.model, "-o", str(arguments.output), "--dtype", "float32"]
    code = run([*command, "--threads", str(arguments.threads), "--decode", arguments.decode])
    scale = 1e6 if sys.platform == "darwin" else 1e3
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale)
    raise SystemExit(code)


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "speed", "quality", "ways", "memory", "embed"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--before", type=Path, help="an older checkout to run in turns")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=str(bundled.emoji_checkpoint()))
    parser.add_argument("--random", metavar="SIZE", help="a released size with random weights, too")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--decode", default="fast", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is None and arguments.what != "quality":
        parser.error(f"{arguments.what} needs a folder")
    if arguments.what == "make":
        make(arguments.folder, arguments.images, arguments.megapixels)
        return
    if arguments.what == "embed":
        _embed_and_tell_peak(arguments)
    print(f"{summary()}; mlx {device.mlx_build()}", file=sys.stderr)
    {"speed": speed, "quality": quality, "ways": ways, "memory": memory}[arguments.what](arguments)


if __name__ == "__main__":
    main()
