"""Converts a checkpoint to a folder: names, dtype, bits, layout, and a report on its fidelity to the source.

checkpoint -> names -> dtype -> bits -> folder -> fidelity; arrays stay lazy until they are written, one at a time.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before the slow imports, so Ctrl-C ends in one line from the start
    from mlx_aimv2.cli import convert_main

    sys.exit(convert_main())

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2.backend.device import turn_tf32_off
from mlx_aimv2.checkpoint.hub import check_upload, upload
from mlx_aimv2.cli.flags import MODEL, add_image_size, add_revision
from mlx_aimv2.config import DTYPES, dtype_name
from mlx_aimv2.conversion.calibration import calibrate, split, with_finer_embedding
from mlx_aimv2.conversion.fidelity import FILE, BlockwiseRun, choose_images, report, run_other, run_reference, table
from mlx_aimv2.conversion.folder import (
    PYTORCH_LAYOUTS,
    WRITTEN,
    is_own,
    save_beside,
    save_config,
    save_pytorch,
    save_weights,
)
from mlx_aimv2.conversion.model_card import write as write_card
from mlx_aimv2.files import atomic_folder, check_target, expand_user, write_json
from mlx_aimv2.loading import Source, build, parse_dtype, read_source
from mlx_aimv2.quantize import METHODS, MODES, RECIPES, Predicate, dequantized, layers, packed, plan, resolve

__all__ = ["convert"]

DEFAULT_PATH = "mlx_model"

GAIN = "--q-method gptq left two small encoders a quarter of this loss, or less, at 4 bits (docs/converting.md)"
"""The last line of a plain quantization: what gptq would gain."""


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = DEFAULT_PATH,
    *,
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | Predicate | None = None,
    dequantize: bool = False,
    dtype: str | mx.Dtype | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    upload_repo: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    q_method: str = METHODS[0],
    verify: bool = True,
    export_layout: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    log: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
) -> Path:
    """Converts a checkpoint: `Hub name, folder or weight file -> MLX folder`, whose path is returned.

    The keywords up to `upload_repo` are mlx-lm's. `quantize` packs the layers of the blocks; None for group size and
    bits is the mode's default (64 and 4 for affine). `quant_predicate` is the name of a recipe or a function `path,
    layer -> settings or bool`. The `q_method` "gptq" rounds weights with calibration, on most images of the folder
    `calibration` or on crops of bundled photographs (`conversion.calibration`). `dtype` None keeps the checkpoint's.
    `image_size` is `load`'s: the folder takes images of that size, and fidelity is measured at that size.

    With `verify` the folder is loaded again and compared with the source in float32, for fidelity.json, on images of
    `calibration` not used for calibration, or on bundled ones. For this TensorFloat32 is turned off for the whole
    process, or the report says that it may be on (`turn_tf32_off`). `export_layout` writes PyTorch's names and axes
    instead, dense. `upload_repo` uploads the folder. `log` receives lines, `on_progress` how much of how much is done,
    and the unit. With `overwrite` an earlier conversion's folder is replaced once the new one is complete.
    `trust_remote_code` is accepted for compatibility: no code from a checkpoint is ever run.

    Raises FileExistsError if `mlx_path` exists, ValueError or OSError, each with one line, for contradictory flags and
    an unusable source. Nothing is left at `mlx_path` unless the conversion is complete.
    """
    flags: dict[str, Any] = {"q_bits": q_bits, "q_group_size": q_group_size, "q_mode": q_mode, "q_method": q_method}
    flags |= {"quant_predicate": quant_predicate, "calibration": calibration, "export_layout": export_layout}
    _check_flags(flags, quantize=quantize, dequantize=dequantize, verify=verify)
    settings = resolve(q_mode, q_group_size, q_bits)
    is_gptq = q_method == "gptq"
    inputs = [expand_user(path) for path in (hf_path, calibration) if path is not None]
    wanted, target = parse_dtype(dtype) if dtype is not None else None, expand_user(mlx_path)
    check_target(target, overwrite=overwrite, is_own=is_own, inputs=inputs)
    if upload_repo is not None:
        check_upload(upload_repo)
    files, images = split(calibration, calibrates=is_gptq) if quantize else ([], choose_images(calibration))
    if verify:
        turn_tf32_off()
    if trust_remote_code:
        log("[INFO] --trust-remote-code has no effect: no code from a checkpoint is ever run")
    log("[INFO] Loading")
    source = read_source(hf_path, revision=revision, image_size=image_size)
    source.processor()  # an unsupported image processor is refused before anything is written
    _check_source(source, quantize=quantize, dequantize=dequantize, dense_anyway=export_layout is not None)
    wanted = wanted or source.dtype
    log(f"[INFO] Using dtype: {dtype_name(wanted)}")
    predicate = quant_predicate or (with_finer_embedding(settings) if is_gptq else None)
    section = plan(build(source.config), settings, predicate) if quantize else None
    # Before anything is written: otherwise an unreadable image would fail a long conversion at the very end.
    reference = run_reference(source.reopened(), images, on_progress=on_progress) if verify else None
    done: dict[str, list[mx.array]] = {}
    if section is not None and is_gptq:
        done = calibrate(source.reopened(), files, section, dtype=wanted, on_progress=on_progress)

    with atomic_folder(target, overwrite=overwrite, is_own=is_own, inputs=inputs) as place:
        config = _write(source, place, dtype=wanted, section=section, done=done, export_layout=export_layout, log=log)
        method = _method(files, is_gptq=is_gptq) if quantize else {}
        found = _judged(place, reference, images, target.name, method, log, on_progress) if reference else None
        write_card(place, source=source, config=config, report=found, hub_name=upload_repo, layout=export_layout)
    if upload_repo is not None:
        log(f"[INFO] Uploading to {upload(target, upload_repo, patterns=WRITTEN)}")
    if quantize and not is_gptq and q_mode == "affine":
        log(f"[INFO] {GAIN}")
    return target


def _method(files: Sequence[Path], *, is_gptq: bool) -> dict[str, str]:
    """The report's entry on how weights were rounded."""
    on = f"{len(files)} images" if files else "crops of three bundled photographs"
    return {"method": f"gptq, calibrated on {on}" if is_gptq else "plain"}


def _judged(
    place: Path,
    reference: BlockwiseRun,
    images: Sequence[Path],
    name: str,
    method: dict[str, str],
    log: Callable[[str], None],
    on_progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Compares the folder with its source and writes fidelity.json: `-> its content`."""
    log("[INFO] Comparing with the source in float32")
    other = run_other(read_source(place), images, reference, name=name, on_progress=on_progress)
    found = report(reference, other, images) | method
    write_json(place / FILE, found)
    log(table(found))
    return found


def _check_flags(flags: Mapping[str, Any], *, quantize: bool, dequantize: bool, verify: bool) -> None:
    """Raises ValueError for flags that contradict each other or would have no effect, before anything is read.

    `flags` are the optional ones, as the keywords of `convert`.
    """
    defaults = {"q_mode": "affine", "q_method": METHODS[0]}
    given = {f"--{name.replace('_', '-')}": value for name, value in flags.items() if value != defaults.get(name)}
    recipe, layout = given.get("--quant-predicate"), given.get("--export-layout")
    is_named, bits = isinstance(recipe, str), [flag for flag in given if flag.startswith("--q")]
    faults = {
        "Choose either quantize or dequantize, not both.": quantize and dequantize,
        f"--quant-predicate must be {', '.join(RECIPES)}, got {recipe}": is_named and recipe not in RECIPES,
        f"--export-layout must be {' or '.join(PYTORCH_LAYOUTS)}, got {layout}": layout not in (None, *PYTORCH_LAYOUTS),
        "PyTorch's layouts hold dense weights: choose either --export-layout or quantize, not both.": (
            layout is not None and quantize
        ),
        f"{', '.join(bits)} would have no effect without --quantize; add -q": bits and not quantize,
        f"--q-method must be {' or '.join(METHODS)}, got {given.get('--q-method')}": (
            given.get("--q-method", METHODS[1]) not in METHODS
        ),
        f"gptq takes affine bits only; leave --q-mode {given.get('--q-mode')} out": (
            "--q-method" in given and "--q-mode" in given
        ),
        f"recipes take affine bits only; leave --q-mode {given.get('--q-mode')} out": is_named and "--q-mode" in given,
        f"--quant-predicate {recipe} sets the bits; leave --q-bits out": is_named and "--q-bits" in given,
        "--calibration is for gptq and the fidelity report; without either, leave it out": (
            "--calibration" in given and not verify and "--q-method" not in given
        ),
    }
    for message, is_met in faults.items():
        if is_met:
            raise ValueError(message)


def _check_source(source: Source, *, quantize: bool, dequantize: bool, dense_anyway: bool) -> None:
    """Raises ValueError for a source that is quantized or dense where the flags need the other."""
    name = source.origin.folder
    if source.quantization is not None and not dequantize and not dense_anyway:
        what = "quantizing it again would lose accuracy twice" if quantize else "would silently keep its bits"
        raise ValueError(f"{name} is already quantized and {what}; convert the original, or make it dense with -d")
    if source.quantization is None and dequantize:
        raise ValueError(f"{name} is not quantized, so there is nothing to dequantize; leave -d out")


def _write(
    source: Source,
    place: Path,
    *,
    dtype: mx.Dtype,
    section: Mapping[str, Any] | None,
    done: dict[str, list[mx.array]],
    export_layout: str | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the weights (consuming the source's), config.json and the auxiliary files: `-> config.json`.

    `done` are the layers already packed, by path.
    """
    if source.quantization is not None:
        log("[INFO] Dequantizing")
        source.weights = dequantized(source.weights, source.quantization)
    # Each tensor is taken out of the source in turn, so that it can be freed.
    weights: Iterable[tuple[str, mx.array]] = ((name, source.weights.pop(name)) for name in sorted(source.weights))
    if export_layout is not None:
        config = save_pytorch(source.config, weights, place, layout=export_layout, dtype=dtype)
    else:
        config = source.config.to_dict() | {"torch_dtype": dtype_name(dtype)}
        if section is not None:
            log("[INFO] Quantizing")
            config |= {"quantization": section, "quantization_config": section}
        count = source.parameters
        paths = layers(build(source.config)) if section else ()
        weights = packed(weights, paths, section or {}, dtype=dtype, done=done)
        size = save_weights(place, weights, total_parameters=count)
        if section is not None:
            log(f"[INFO] Quantized model with {8 * size / count:.3f} bits per weight.")
        save_config(place, config)
    save_beside(place, source)
    return config


def add_convert(parser: argparse.ArgumentParser) -> None:
    """The converter's flags, which are the keywords of `convert` (`--no-verify` is `verify=False`)."""
    add = parser.add_argument_group("input").add_argument
    add("--hf-path", "--model", required=True, metavar="MODEL", help=MODEL)
    add_revision(add)
    words = "accepted for compatibility; no code from a checkpoint is ever run"
    add("--trust-remote-code", action="store_true", help=words)

    add = parser.add_argument_group("quantization").add_argument
    add("-q", "--quantize", action="store_true", help="quantize the layers of the blocks")
    add("--q-bits", type=int, metavar="N", help="bits per weight (default: the mode's, 4 for affine)")
    add("--q-group-size", type=int, metavar="N", help="weights per scale (default: the mode's, 64 for affine)")
    modes, recipes = ", ".join(MODES), ", ".join(RECIPES)
    add("--q-mode", choices=MODES, default="affine", metavar="NAME", help=f"{modes} (default: %(default)s)")
    words = f"{recipes}: as in mlx-lm; mixed_3_6 took 0.8 bits more than 3 bits for a tenth less loss"
    add("--quant-predicate", choices=RECIPES, metavar="NAME", help=words)
    words = "plain rounding, or gptq (calibrated): takes minutes, leaves a fraction of the error (default: plain)"
    add("--q-method", choices=METHODS, default=METHODS[0], metavar="NAME", help=words)
    words = "images for gptq, a fifth held out to judge the result, or only for the report (default: bundled ones)"
    add("--calibration", metavar="DIR", help=words)
    add("-d", "--dequantize", action="store_true", help="dequantize a quantized source")

    add = parser.add_argument_group("fidelity").add_argument
    add("--no-verify", dest="verify", action="store_false", help="do not compare the folder with its source")

    add = parser.add_argument_group("layout and output").add_argument
    add("--mlx-path", default=DEFAULT_PATH, metavar="DIR", help="folder to write (default: %(default)s)")
    dtypes, layouts = f"of the weights: {', '.join(DTYPES)}", " or ".join(PYTORCH_LAYOUTS)
    add("--dtype", choices=DTYPES, metavar="NAME", help=f"{dtypes} (default: the checkpoint's)")
    add_image_size(add)
    layout_help = f"{layouts}: write a PyTorch folder instead"
    add("--export-layout", choices=PYTORCH_LAYOUTS, metavar="NAME", help=layout_help)
    add("--upload-repo", metavar="OWNER/NAME", help="upload the folder to this Hub repository")
    add("--overwrite", action="store_true", help="replace a folder written by convert, once the new one is complete")


def run_convert(arguments: argparse.Namespace) -> int:
    """Converts as the flags say and prints the path of the result."""
    from mlx_aimv2.cli.output import log, progress, show

    settings = {name: value for name, value in vars(arguments).items() if name != "verb"}
    with progress() as on_progress:
        folder = convert(**settings, log=log, on_progress=on_progress)
    show(str(folder))
    return 0
