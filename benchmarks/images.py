"""Measures where the time goes when images of a folder are embedded: reading, hashing, decoding, resizing, the model.

python -m benchmarks.images FOLDER -m MODEL [--decode exact] [--threads N] [--json]

Each step alone, one image after another on one thread, the model alone on its device, then all together as `embed` runs
them; and what would make it faster on this machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from benchmarks.machine import summary
from mlx_aimv2 import load
from mlx_aimv2.backend import device
from mlx_aimv2.cli.dispatch import one_line_errors
from mlx_aimv2.cli.flags import MODEL, add_dtype, add_policy_arguments, policy_of
from mlx_aimv2.embed.encode import Pooling, embed_chunks
from mlx_aimv2.embed.loader import MAX_PATCHES, Decoder, images_at_once, split_into_chunks
from mlx_aimv2.files import read_image_file
from mlx_aimv2.images.find import list_images
from mlx_aimv2.images.open import Levels, OpenImage, Policy, open_image

if TYPE_CHECKING:
    from mlx_aimv2.images.processor import Aimv2Processor
    from mlx_aimv2.loading import AnyModel

MAX_IMAGES = 64
"""Of a larger folder so many are taken, evenly spread over their sorted names."""


@dataclass(frozen=True)
class FolderSpeed:
    """Seconds for all `images`: each step alone on one thread, the model alone, and all together on `threads`.

    `bound_by` is what the run waits for: decoding (which stands for all steps on threads), or the model.
    """

    images: int
    bytes: int
    megapixels: float
    threads: int
    decode: str
    reading: float
    hashing: float
    decoding: float
    resizing: float
    model: float
    together: float

    @property
    def preparing(self) -> float:
        """Seconds of all steps before the model, shared by the threads."""
        return (self.reading + self.hashing + self.decoding + self.resizing) / self.threads

    @property
    def bound_by(self) -> str:
        """The slower of both sides."""
        return "decoding" if self.preparing > self.model else "the model"

    def advice(self, *, cores: int, on_cpu: bool) -> str:
        """What would make the run faster on this machine, as flags."""
        if self.bound_by == "the model":
            own = "a smaller checkpoint" if on_cpu else "--dtype float16, or a smaller checkpoint"
            return f"the model sets the pace: {own}; faster decoding gains nothing"
        if self.decode == "exact":
            return "decoding sets the pace: --decode fast"
        if self.threads < cores:
            return f"decoding sets the pace: --threads {cores}"
        if self.reading > self.decoding + self.resizing:
            return f"reading sets the pace: --threads {2 * self.threads}, or images on a faster disk"
        return "decoding sets the pace on all cores: smaller copies of the images would be read faster"


def measure_folder(
    files: Sequence[str],
    model: AnyModel,
    processor: Aimv2Processor,
    *,
    policy: Policy,
    threads: int | None = None,
    max_patches: int = MAX_PATCHES,
) -> FolderSpeed:
    """Times up to 64 of these image files; those that cannot be read raise ValueError."""
    if not files:
        raise ValueError("no images to time: give a folder that holds some")
    step = max(1, len(files) / MAX_IMAGES)
    chosen = [files[int(number * step)] for number in range(min(len(files), MAX_IMAGES))]
    limit = max_patches if model.vision.config.num_patches is None else None
    steps = dict.fromkeys(("reading", "hashing", "decoding", "resizing"), 0.0)
    size, pixels, prepared = 0, 0, []
    for file in chosen:
        began = time.perf_counter()
        try:
            data = read_image_file(file)[1]
        except OSError as error:
            raise ValueError(f"{file} {error.strerror or error}") from None
        steps["reading"] += time.perf_counter() - began
        began = time.perf_counter()
        hashlib.sha256(data)
        steps["hashing"] += time.perf_counter() - began
        began = time.perf_counter()
        opened = open_image(data, policy=policy, name=str(file))
        spent = [time.perf_counter() - began]
        _timed(opened, spent)
        began = time.perf_counter()
        prepared.append(processor.levels(opened, max_patches=limit))
        steps["resizing"] += time.perf_counter() - began - sum(spent[1:])
        steps["decoding"] += sum(spent)
        size, pixels = size + len(data), pixels + opened.size[0] * opened.size[1]
    pooling = Pooling.of(model)
    threads = threads or os.cpu_count() or 1
    model_seconds = _model_seconds(prepared, model, processor, pooling)
    del prepared
    began = time.perf_counter()
    decoder = Decoder(processor, max_patches=max_patches, policy=policy)
    for _ in embed_chunks(split_into_chunks(chosen), decoder, model, pooling, threads=threads):
        pass
    together = time.perf_counter() - began
    return FolderSpeed(
        len(chosen), size, pixels / 1e6, threads, policy.decode, **steps, model=model_seconds, together=together
    )


def _timed(opened: OpenImage, spent: list[float]) -> None:
    """Makes an image note how long it takes to decode."""
    decode = opened.rgb

    def rgb(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return decode(*arguments)
        finally:
            spent.append(time.perf_counter() - began)

    vars(opened)["rgb"] = rgb


def _model_seconds(images: list[Levels], model: AnyModel, processor: Aimv2Processor, pooling: Pooling) -> float:
    """The model on batches as `embed` makes them, which are ready in memory, after one that is not counted."""
    patch = model.vision.config.patch_size
    groups: dict[tuple[int, ...], list[Levels]] = {}
    for levels in images:
        groups.setdefault(levels.shape, []).append(levels)
    batches = []
    for (height, width, _), group in groups.items():
        at_once = images_at_once((height // patch) * (width // patch))
        batches += [mx.array(np.stack(group[start : start + at_once])) for start in range(0, len(group), at_once)]
    mx.eval(batches, pooling(model, processor.normalised(batches[0])))
    began = time.perf_counter()
    for batch in batches:
        mx.eval(pooling(model, processor.normalised(batch)))
    return time.perf_counter() - began


def table(speed: FolderSpeed, model: str, dtype: str) -> str:
    """The steps' times, as lines for the terminal."""
    on = device.machine()
    size = f"{speed.bytes / speed.images / 1e6:.1f} MB and {speed.megapixels / speed.images:.1f} megapixels each"
    lines = [
        f"{speed.images} images, {size}; {model} in {dtype}; --decode {speed.decode}",
        f"{summary()}; {speed.threads} threads decode",
        "",
        "step       ms per image  images/s",
    ]
    for step in ("reading", "hashing", "decoding", "resizing", "model", "together"):
        seconds = getattr(speed, step) / speed.images
        lines.append(f"{step:<9}  {seconds * 1e3:12.2f}  {1 / max(seconds, 1e-9):8.1f}")
    return "\n".join([*lines, "", speed.advice(cores=device.cpu_count(), on_cpu=on.kind == "cpu")])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="times each step of embedding a folder, alone and all together")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=MODEL)
    parser.add_argument("--threads", type=int, metavar="N", help="threads that decode (default: one for each core)")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    add_dtype(parser.add_argument)
    add_policy_arguments(parser.add_argument)
    arguments = parser.parse_args(argv)
    files = list_images([arguments.folder]).files
    model, processor = load(arguments.model, dtype=arguments.dtype)
    speed = measure_folder(files, model, processor, policy=policy_of(arguments), threads=arguments.threads)
    if arguments.json:
        print(json.dumps(asdict(speed) | {"bound_by": speed.bound_by}))
    else:
        print(table(speed, arguments.model, str(model.dtype).rpartition(".")[2]))
    return 0


if __name__ == "__main__":
    raise SystemExit(one_line_errors(main))
