"""`mlx-aimv2 bench`: times a model beside what the machine could do, or the way from a folder of images to vectors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_aimv2 import device
from mlx_aimv2.cli import log
from mlx_aimv2.commands.flags import MODEL, add_policy_arguments, add_revision, policy_of
from mlx_aimv2.config import released
from mlx_aimv2.find_images import list_images

if TYPE_CHECKING:
    from mlx_aimv2.bench import FirstEmbedding, Loading, Speed

HELP = "time a model beside bare matrix products, or embedding a folder of images"

EXAMPLE = "-m apple/aimv2-large-patch14-224 --batch 1 4 16"

MOST_AT_ONCE, LARGEST_SIDE, MOST_RUNS = 4096, 3584, 100_000
"""What may be asked for: more fits no machine's memory or no day."""

DTYPES = ("float32", "float16", "bfloat16")

DEFAULT_DTYPES = {"cpu": ("float32",), "metal": ("float16", "bfloat16"), "cuda": ("float16", "bfloat16")}
"""A CPU's half-precision products are so slow in MLX that they are measured only when asked for."""

NOTE = (
    "ms, images/s: one forward pass of the vision encoder on pixels in memory, median of {runs} runs. "
    "peak MB: memory above the weights and the pixels. GFLOP/s: matrix products over the time of the whole pass. "
    "of bare: time of these products alone, run in turn with the pass, over the time of the pass."
)

HEADERS = ("dtype", "weights", "MB", "batch", "tokens", "ms", "ms/image", "images/s", "peak MB", "GFLOP/s", "of bare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True).add_argument
    which("-m", "--model", metavar="MODEL", help=MODEL)
    which("--random", metavar="SIZE", help="random weights of a released size, such as large-patch14-224")
    add = group.add_argument
    add_revision(add)

    add = parser.add_argument_group("what is timed").add_argument
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="NAME",
        help="float32, float16, bfloat16 (default: float32 on a CPU, else both halves)",
    )
    add(
        "--batch",
        nargs="+",
        type=_up_to(MOST_AT_ONCE),
        default=[1, 4],
        metavar="N",
        help="images at once (default: 1 4)",
    )
    add(
        "--side",
        type=_up_to(LARGEST_SIDE),
        metavar="N",
        help="native checkpoints: side of the images in pixels (default: 224)",
    )
    add(
        "--runs", type=_up_to(MOST_RUNS), default=7, metavar="N", help="runs of each measurement (default: %(default)s)"
    )
    add("--keep-quantized", action="store_true", help="time quantized weights packed, too, not only made dense")
    add("--images", metavar="DIR", help="time each step of embedding this folder instead, alone and all together")

    add = parser.add_argument_group("reading images, with --images").add_argument
    add("--threads", type=_up_to(1024), metavar="N", help="threads that decode (default: one for each core)")
    add_policy_arguments(add)

    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print the measurements as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures as the flags say, tells of each step on stderr, and prints the table or JSON."""
    if arguments.images is not None:
        found = measure_images(arguments)
        print(json.dumps(found) if arguments.json else images_table(found))
        return 0
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
    else:
        print(table(found, runs=arguments.runs))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as one dictionary for JSON."""
    from mlx_aimv2 import __version__

    if arguments.random:
        released(arguments.random)
        if arguments.keep_quantized:
            raise ValueError("--keep-quantized needs a quantized MLX folder: give it with -m")
    on = device.machine()
    found: dict[str, Any] = {
        "device": on.kind,
        "chip": on.chip,
        "cores": device.cpu_count(),
        "mlx": device.mlx_build(),
        "mlx-aimv2": __version__,
        "advice": device.advice(on),
        "model": arguments.model or f"random {arguments.random}",
        "runs": arguments.runs,
    }
    if arguments.model:
        found |= _about_files(arguments)
    found["speed"] = [
        asdict(speed)
        | {
            "milliseconds_per_image": 1e3 / speed.images_per_second,
            "images_per_second": speed.images_per_second,
            "flops_per_second": speed.flops_per_second,
            "fraction_of_bare": speed.fraction,
        }
        for speed in _speeds(arguments, arguments.dtype or DEFAULT_DTYPES[on.kind])
    ]
    return found


def measure_images(arguments: argparse.Namespace) -> dict[str, Any]:
    """What embedding a folder takes, step by step, as one dictionary for JSON."""
    from mlx_aimv2 import load
    from mlx_aimv2.bench_images import measure_folder
    from mlx_aimv2.preprocessing import published
    from mlx_aimv2.processor import Aimv2Processor

    policy = policy_of(arguments)
    files = list_images([arguments.images]).files
    if not files:
        raise FileNotFoundError(f"no images in {arguments.images}: --images takes a folder that holds some")
    on = device.machine()
    dtype = (arguments.dtype or DEFAULT_DTYPES[on.kind])[0]
    if arguments.random:
        model = _model(arguments, dtype, keep_quantized=False)
        processor = Aimv2Processor(published(model.vision.config.image_size))
    else:
        model, processor = load(arguments.model, revision=arguments.revision, dtype=dtype)
    _tell(f"{arguments.images}, {dtype}")
    speed = measure_folder(files, model, processor, policy=policy, threads=arguments.threads)
    return asdict(speed) | {
        "bound_by": speed.bound_by,
        "advice": speed.advice(cores=device.cpu_count(), on_cpu=on.kind == "cpu"),
        "chip": on.chip,
        "device": on.kind,
        "cores": device.cpu_count(),
        "dtype": dtype,
        "model_name": arguments.model or f"random {arguments.random}",
    }


def images_table(found: dict[str, Any]) -> str:
    """The steps' times, as lines for the terminal."""
    count = found["images"]
    size = f"{found['bytes'] / count / 1e6:.1f} MB and {found['megapixels'] / count:.1f} megapixels each"
    lines = [
        f"{count} images, {size}; {found['model_name']} in {found['dtype']}; --decode {found['decode']}",
        f"{found['chip']}, {found['device']}, {found['cores']} cores; {found['threads']} threads decode",
        "",
        "step       ms per image  images/s",
    ]
    for step in ("reading", "hashing", "decoding", "resizing", "model", "together"):
        seconds = found[step] / count
        lines.append(f"{step:<9}  {seconds * 1e3:12.2f}  {1 / max(seconds, 1e-9):8.1f}")
    note = "Each step alone on one thread, the model alone on its device, and together as embed runs them."
    return "\n".join([*lines, "", found["advice"], note])


def table(found: dict[str, Any], *, runs: int) -> str:
    """What was measured, as lines for the terminal."""
    lines = [
        ("machine", f"{found['chip']}, {found['device']}, {found['cores']} cores"),
        ("versions", f"mlx {found['mlx']}, mlx-aimv2 {found['mlx-aimv2']}"),
        ("model", found["model"]),
    ]
    if load := found.get("loading"):
        size = f"{load['bytes'] / 1e6:.0f} MB"
        lines.append(("load", f"{load['seconds']:.2f} s, {load['ratio']:.2f} times reading the {size} (page cache)"))
    if first := found.get("first_embedding"):
        steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in first.items())
        lines.append(("first embedding", f"{sum(first.values()):.2f} s in a fresh process: {steps}"))
    if found["advice"]:
        lines.append(("advice", found["advice"]))
    width = max(len(name) for name, _ in lines)
    head = [f"{name:<{width}}  {value}" for name, value in lines]
    rows = [HEADERS, *(_row(speed) for speed in found["speed"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    body = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*head, "", *body, "", NOTE.format(runs=runs)])


def _about_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load time and the first embedding, of a checkpoint that has files."""
    from mlx_aimv2 import bench, bundled, load
    from mlx_aimv2.checkpoint import read as checkpoint

    path, _, _ = checkpoint.find(arguments.model, revision=arguments.revision)
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    _tell("loading")
    loading: Loading = bench.measure_loading(lambda: load(path), files, runs=arguments.runs)
    _tell("first embedding in a fresh process")
    first: FirstEmbedding = bench.measure_first_embedding(
        str(path), bundled.photographs()[0], dtype=(arguments.dtype or ["auto"])[0]
    )
    return {"loading": asdict(loading) | {"ratio": loading.ratio}, "first_embedding": asdict(first)}


def _speeds(arguments: argparse.Namespace, dtypes: tuple[str, ...]) -> Iterator[Speed]:
    from mlx_aimv2 import bench

    for dtype in dtypes:
        for weights in ("dense", "packed") if arguments.keep_quantized else ("dense",):
            model = _model(arguments, dtype, keep_quantized=weights == "packed")
            for batch in arguments.batch:
                _tell(f"{dtype} {weights}, {batch} images")
                pixels = bench.random_pixels(model.vision.config, batch=batch, side=arguments.side)
                yield bench.measure_speed(model, pixels, runs=arguments.runs, weights=weights)


def _model(arguments: argparse.Namespace, dtype: str, *, keep_quantized: bool) -> Any:
    from mlx_aimv2 import bench, load
    from mlx_aimv2.loading import parse_dtype

    if arguments.random:
        return bench.random_model(released(arguments.random).vision, parse_dtype(dtype))
    model, _, config = load(
        arguments.model, revision=arguments.revision, dtype=dtype, keep_quantized=keep_quantized, return_config=True
    )
    if keep_quantized and not isinstance(config.get("quantization"), dict):
        raise ValueError(f"--keep-quantized needs quantized weights, {arguments.model} holds dense ones; leave it out")
    return model


def _row(speed: dict[str, Any]) -> tuple[str, ...]:
    return (
        speed["dtype"],
        speed["weights"],
        f"{speed['weight_bytes'] / 1e6:.0f}",
        str(speed["batch"]),
        str(speed["tokens"]),
        f"{speed['seconds'] * 1e3:.1f}",
        f"{speed['milliseconds_per_image']:.1f}",
        f"{speed['images_per_second']:.2f}",
        f"{speed['peak_bytes'] / 1e6:.0f}",
        f"{speed['flops_per_second'] / 1e9:.0f}",
        f"{speed['fraction_of_bare']:.2f}",
    )


def _tell(step: str) -> None:
    log(f"measuring: {step}")


def _up_to(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        number = int(text) if text.isdigit() and len(text) < 10 else 0
        if not 1 <= number <= most:
            raise argparse.ArgumentTypeError(f"a whole number from 1 to {most} is wanted, got {text:.20}")
        return number

    return count
