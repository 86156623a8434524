"""Steps of `make verify` that use a checkpoint as a reader would: embed, fit, a folder's speed, memory, energy."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from benchmarks.images import measure_folder
from convert import power
from convert.report import FAIL, MEASURED, NOT_DONE, PASS, Finding, Step, Subject
from convert.verify_numbers import cast, dtypes_here
from mlx_aimv2 import bundled
from mlx_aimv2.backend import device
from mlx_aimv2.embed import embed
from mlx_aimv2.embed.encode import FAST
from mlx_aimv2.index import Index
from mlx_aimv2.learn import fit

ROOT = Path(__file__).parents[1]

IMAGES = 10
JPEGS = 32
"""Images of the folder whose speed is measured: one chunk of `embed`."""

AT_ONCE = 8
TO_TYPE = "to measure it, once the download is done: sudo -v && make verify"


def use_embed(subject: Subject) -> list[Finding]:
    """The command twice in processes of its own: all images are there, find themselves, and are not embedded again."""
    folder, output = subject.place / "photos", subject.place / "photos.db"
    photographs = bundled.photographs()
    _copy([*photographs, *list(bundled.emoji_images())[: IMAGES - len(photographs)]], folder)
    first, peak = _embed_command(subject, folder, output)
    again, _ = _embed_command(subject, folder, output)
    with Index.open(output) as index:
        indexed = len(index)
        lost = [
            Path(found.path).name
            for found in embed([folder], subject.model, subject.processor)
            if index.search(found.vector, 1)[0].path != found.path
        ]
    detail = (
        f"{first['embedded']} of {IMAGES} images embedded in {first['seconds']:.1f} s, loading included; "
        f"{indexed - len(lost)} find themselves first; the second run embedded {again['embedded']} "
        f"in {again['seconds']:.1f} s"
    )
    if lost:
        detail += f"; another image is nearer to {', '.join(lost)}"
    right = first["embedded"] == indexed == again["unchanged"] == IMAGES and not lost and not again["embedded"]
    memory = f"{peak['mlx'] / 1e6:,.0f} MB in MLX, {peak['resident'] / 1e6:,.0f} MB resident in the whole process"
    return [Finding("embed", PASS if right else FAIL, detail), Finding("embed, peak memory", MEASURED, memory)]


def use_fit(subject: Subject) -> list[Finding]:
    """A linear probe on ten digits. It has to run: ten images say nothing about how well it does."""
    data, scans = subject.place / "digits", bundled.digits()
    for digit in (0, 1):
        for number, scan in enumerate(scans.train_images[scans.train_labels == digit][: IMAGES // 2]):
            file = data / ("train" if number < 3 else "val") / str(digit) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scan).resize((224, 224), Image.Resampling.BICUBIC).save(file)
    began = time.perf_counter()
    fitted = fit(
        data,
        subject.row.repo,
        subject.place / "head",
        task="classify",
        fine_tune_type="linear",
        revision=subject.row.commit,
        cache=subject.place / "features",
    )
    seconds, counts = time.perf_counter() - began, fitted.images
    detail = f"top-1 {100 * fitted.scores['val']['top1']:.0f} % on {counts['val']} digits after {counts['train']}"
    return [Finding("fit, linear", PASS, f"{detail}, {seconds:.1f} s; so few say nothing about quality")]


def use_folder(subject: Subject) -> list[Finding]:
    """Images per second from files to vectors, beside the model alone on the same images."""
    folder = subject.place / "jpegs"
    photographs = bundled.photographs()
    files = _copy([photographs[number % len(photographs)] for number in range(JPEGS)], folder)
    on_cpu, findings = device.machine().kind == "cpu", []
    for dtype in dtypes_here():
        speed = measure_folder(files, cast(subject.model, dtype), subject.processor, policy=FAST)
        parts = ("reading", "hashing", "decoding", "resizing")
        steps = ", ".join(f"{part} {getattr(speed, part) / speed.images * 1e3:.2f}" for part in parts)
        detail = (
            f"{speed.images / speed.together:.2f} from files to vectors, {speed.images / speed.model:.2f} the model "
            f"alone; {speed.images} JPEGs of {speed.megapixels / speed.images:.2f} megapixels, {speed.threads} "
            f"threads; ms per image on one thread: {steps}; {speed.advice(cores=device.cpu_count(), on_cpu=on_cpu)}"
        )
        findings.append(Finding(f"images a second from a folder, {dtype}", MEASURED, detail))
    return findings


def use_energy(subject: Subject) -> list[Finding]:
    """Watts and joules per image while the model runs, where macOS may be asked without a password."""
    if platform.system() != "Darwin":
        return [Finding("energy", NOT_DONE, "powermetrics is a program of macOS")]
    dtype = "float16" if "float16" in dtypes_here() else "float32"
    model, pixels = cast(subject.model, dtype), mx.concatenate([subject.pixels] * AT_ONCE)

    def work() -> int:
        mx.eval(model.vision(pixels).last_hidden_state)
        return AT_ONCE

    work()  # the first pass compiles kernels
    try:
        found, rate = power.measure(work)
    except (PermissionError, FileNotFoundError) as error:
        return [Finding("energy", NOT_DONE, f"{error}; {TO_TYPE}")]
    detail = (
        f"{found.combined / rate:.3f} J per image: {found.combined:.2f} W (CPU {found.cpu:.2f}, GPU {found.gpu:.2f}) "
        f"over {found.seconds:.1f} s at {rate:.2f} images a second, {AT_ONCE} at once; without memory and display"
    )
    return [Finding(f"energy, {dtype}", MEASURED, detail)]


STEPS: dict[str, Step] = {"embed": use_embed, "fit": use_fit, "images a second from a folder": use_folder}
"""What is checked -> the step, in the order of the report."""


def _embed_command(subject: Subject, folder: Path, output: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Runs `mlx-aimv2 embed`: its summary, and the most memory that its process took."""
    command = ["embed", folder, "-o", output, "-m", subject.row.repo, "--json"]
    if subject.row.commit:
        command += ["--revision", subject.row.commit]
    result = subprocess.run(
        [sys.executable, "-m", "convert.peak", *map(str, command)], capture_output=True, text=True, cwd=ROOT
    )
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or f"embed ended with {result.returncode}").split("\n")[-1])
    summary, peak = map(json.loads, result.stdout.splitlines())
    return summary, peak


def _copy(images: list[Path], folder: Path) -> list[str]:
    """Copies of the images under names of their own, as `embed` takes links to one file for one image."""
    folder.mkdir(parents=True)
    files = [folder / f"{number:02}-{image.name}" for number, image in enumerate(images)]
    for image, file in zip(images, files, strict=True):
        shutil.copy(image, file)
    return [str(file) for file in files]
