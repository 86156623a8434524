"""Reports the fidelity of a model to its reference: cosines of the features, range of activations, size.

The reference runs in float32, the other model in its own dtype, on the same images, each block by block: the weights
are loaded lazily, all images pass through a block, then its weights are freed. So a 3B model in float32 needs the
memory of one block, and the two models are never in memory together.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_aimv2 import __version__, bundled
from mlx_aimv2.backend import run_blocks
from mlx_aimv2.backend.device import FLOAT16_LARGEST, HEADROOM, REPORT, TF32, may_use_tf32, slow_here, turn_tf32_off
from mlx_aimv2.config import dtype_name, megabytes
from mlx_aimv2.images.find import list_images
from mlx_aimv2.loading import Source, read_source, resample_positions
from mlx_aimv2.model import Aimv2Model, Aimv2TextModel, Aimv2VisionModel, unit_length

if TYPE_CHECKING:
    from mlx_aimv2.images.processor import Aimv2Processor

FILE = REPORT

MAX_IMAGES = 32
"""From a folder with more images this many are used, evenly spread over their sorted names."""

TEXTS = (
    "a photo of a cat",
    "an astronaut in front of a flag",
    "a cup of coffee on a wooden table",
    "a rocket on its launch pad at night",
    "an empty street",
)
"""Texts for a LiT model's text encoder."""

NEAREST = 10
"""Nearest other images to one, for the overlap of both models' searches."""

Floats: TypeAlias = NDArray[np.float64]
OnProgress: TypeAlias = Callable[[int, int, str], None]


def _in_silence(done: int, total: int, unit: str) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class BlockwiseRun:
    """The features and the range of activations of one model.

    `dtype` is that of the weights and `computed_in` that of the pass. `tokens`: one (N, D) for each image, after the
    final norm; `vectors` (B, D), or (B, E) for LiT, as from `encode_image`; `text_vectors` (T, E) and `logits` (B, T)
    for LiT only. `peaks`: the largest absolute value of each block's output, or also of everything between its layers.
    `stored_bytes` of all tensors on disk.
    """

    name: str
    dtype: str
    parameters: int
    stored_bytes: int
    tokens: list[Floats]
    vectors: Floats
    peaks: dict[str, float]
    text_vectors: Floats | None = None
    logits: Floats | None = None
    computed_in: str = "float32"


def compare(
    reference: str | os.PathLike[str],
    other: str | os.PathLike[str],
    *,
    images: Sequence[str | os.PathLike[str]] | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    image_size: int | None = None,
    on_progress: OnProgress = _in_silence,
) -> dict[str, Any]:
    """Compares a model with its reference on images: `two paths or Hub names -> the content of fidelity.json`.

    `images` None takes the four bundled ones; `revision` is the reference's, `dtype` and `image_size` the other's. The
    other is computed in `dtype`; None is its own, except on a CPU (`run_other`). Tokens on a grid other than the
    reference's are resampled to it as positions are. Neither model is ever completely in memory. `on_progress` takes
    the blocks done, their total, and the unit. TensorFloat32 is turned off for the whole process, or the report says
    that it may be on (`turn_tf32_off`). Raises ValueError if the two give features of different shapes.
    """
    turn_tf32_off()
    images = images if images is not None else choose_images(None)
    source, judged = read_source(reference, revision=revision), read_source(other, image_size=image_size)
    visions = [one.config.vision for one in (judged, source)]
    sides = [math.isqrt(one.num_patches or 0) for one in visions]
    if image_size is not None and not all(sides):
        raise ValueError("image_size is compared with the checkpoint's own size; a native one has none: leave it out")
    run = run_reference(source, images, on_progress=on_progress)
    found = run_other(judged, images, run, dtype=dtype, on_progress=on_progress)
    # With a native checkpoint every image has its own grid.
    if sides[0] == sides[1] or not all(sides) or visions[0].hidden_size != visions[1].hidden_size:
        return report(run, found, images)
    grids = [(side, side) for side in sides]
    tokens = [_float64(resample_positions(mx.array(one, mx.float32), *grids)) for one in found.tokens]
    compared = report(run, replace(found, tokens=tokens), images)
    compared["warnings"].append(
        f"tokens of {sides[0]}x{sides[0]} patches were resampled to the reference's {sides[1]}x{sides[1]}"
    )
    return compared


def run_reference(
    source: Source, images: Sequence[str | os.PathLike[str]], *, on_progress: OnProgress = _in_silence
) -> BlockwiseRun:
    """Runs the reference in float32, consuming its weights.

    Raises ValueError, with the first block where it happens, for NaN or infinity.
    """
    run = run_blockwise(source, images, dtype="float32", inside=True, on_progress=on_progress)
    if damaged := [block for block, peak in run.peaks.items() if not np.isfinite(peak)]:
        raise ValueError(
            f"{run.name}: {damaged[0]} gives values that are not finite even in float32: "
            "its weights are damaged (NaN, infinite or huge); fetch them again"
        )
    return run


def run_other(
    source: Source,
    images: Sequence[str | os.PathLike[str]],
    reference: BlockwiseRun,
    *,
    dtype: str | mx.Dtype | None = None,
    name: str | None = None,
    on_progress: OnProgress = _in_silence,
) -> BlockwiseRun:
    """Runs the model that is compared with a reference, consuming its weights, in `dtype` or its own.

    A CPU takes about nine times as long in half precision, so there it computes in float32 instead, unless the
    reference's activations may exceed float16.
    """
    own = source.dtype
    is_safe = own != mx.float16 or max(reference.peaks.values()) * HEADROOM <= FLOAT16_LARGEST
    computed = "float32" if dtype is None and slow_here(own) and is_safe else dtype
    run = run_blockwise(source, images, dtype=computed, name=name, on_progress=on_progress)
    return run if dtype is not None else replace(run, dtype=dtype_name(own))


def run_blockwise(
    source: Source,
    images: Sequence[str | os.PathLike[str]],
    *,
    dtype: str | mx.Dtype | None = None,
    inside: bool = False,
    name: str | None = None,
    on_progress: OnProgress = _in_silence,
) -> BlockwiseRun:
    """Runs a checkpoint on images, consuming its weights: `Source, B images -> BlockwiseRun`.

    With `inside` the peaks include the inputs and outputs of the layers in a block. `name` is the model's name in
    reports, by default the repository's or the folder's.
    """
    stored_bytes, parameters = source.stored_bytes, source.parameters
    name = name or source.origin.repo or source.origin.folder.resolve().name
    unit = f"blocks of {name}"
    loaded = source.load(dtype=dtype, lazy=True)
    model, processor = loaded.model, loaded.processor
    peaks: dict[str, float] = {}
    blocks = len(model.vision.blocks) + (len(model.text_model.blocks) if isinstance(model, Aimv2Model) else 0)
    run = partial(_run_encoder, peaks=peaks, inside=inside, on_block=lambda: on_progress(len(peaks), blocks, unit))
    vision, prefix = model.vision, "vision_model." if isinstance(model, Aimv2Model) else ""
    states = [vision.embed(processor(os.fspath(image))) for image in images]
    states = run(vision, states, prefix=prefix)
    text_vectors = logits = None
    if not isinstance(model, Aimv2Model):  # the vectors are those of `encode_image`
        vectors = mx.concatenate([state.astype(mx.float32).mean(axis=1) for state in states])
    else:
        vectors = mx.concatenate([model.visual_projection(vision.head(state)) for state in states])
        ids = text_ids(model, processor)
        text = model.text_model
        texts = run(text, [text.embed(row) for row in ids], prefix="text_model.")
        # No padding, so EOS is the last token.
        embeds = mx.concatenate([model.text_projection(state[:, -1]) for state in texts])
        logits = _float64(model.logits(unit_length(vectors), unit_length(embeds)))
        text_vectors = _float64(embeds)
    tokens, kind = [_float64(state[0]) for state in states], dtype_name(model.dtype)
    found = (tokens, _float64(vectors), peaks, text_vectors, logits)
    return BlockwiseRun(name, kind, parameters, stored_bytes, *found, computed_in=kind)


def _run_encoder(
    encoder: Aimv2VisionModel | Aimv2TextModel,
    states: list[mx.array],
    *,
    peaks: dict[str, float],
    inside: bool,
    prefix: str,
    on_block: Callable[[], None],
) -> list[mx.array]:
    """Runs embedded inputs through an encoder and its final norm, freeing each block: `[(1, N, D), …] -> the same`.

    The encoder's blocks are removed. `peaks` receives the largest absolute value of each block.
    """
    on_block()
    causal = isinstance(encoder, Aimv2TextModel)
    mx.eval(states)
    for i, block in enumerate(encoder.blocks):
        found: list[mx.array] = []
        if inside:
            _record_ranges(block, found)
        highest = 0.0
        for k, state in enumerate(states):
            states[k] = next(run_blocks([block], state, causal=causal))
            found.append(mx.abs(states[k]).max())
            highest = float(np.maximum(highest, mx.stack(found).astype(mx.float32).max().item()))  # NaN stays one
            found.clear()
        peaks[f"{prefix}blocks.{i}"] = highest
        encoder.blocks[i] = nn.Identity()
        del block
        mx.clear_cache()
        on_block()
    return [encoder.norm(state) for state in states]


def text_ids(model: Aimv2Model, processor: Aimv2Processor) -> list[mx.array]:
    """`TEXTS` as ids, each without padding: `[(1, L), …]`; without a tokenizer, ids spread over the vocabulary."""
    end = model.config.text_config.eos_token_id
    longest = model.config.text_config.max_position_embeddings
    try:
        rows: list[list[int]] = [np.array(processor.tokenize(text))[0].tolist() for text in TEXTS]
        rows = [row[: row.index(end) + 1] for row in rows]
    except FileNotFoundError:
        spread = [[end * (7 * i + k) // 53 % end for k in range(4 + i)] for i in range(len(TEXTS))]
        rows = [[*row[: longest - 1], end] for row in spread]
    return [mx.array([row]) for row in rows]


def report(reference: BlockwiseRun, other: BlockwiseRun, images: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """The content of fidelity.json for two runs on the same images."""
    _check_comparable(reference, other)
    tokens = np.concatenate([cosines(*pair) for pair in zip(reference.tokens, other.tokens, strict=True)])
    found: dict[str, Any] = {
        "reference": _about(reference),
        "model": _about(other),
        "images": [Path(image).name.encode(errors="backslashreplace").decode() for image in images],  # as JSON holds it
        "tokens": len(tokens),
        "token_cosine": _spread(tokens),
        "image_cosine": _spread(cosines(reference.vectors, other.vectors)),
        "computed_in": other.computed_in,
    }
    if len(images) > NEAREST:
        found["nearest_in_common"] = nearest_in_common(reference.vectors, other.vectors)
    if reference.text_vectors is not None and other.text_vectors is not None:
        found["text_cosine"] = _spread(cosines(reference.text_vectors, other.text_vectors))
        found["largest_logit_difference"] = _finite(np.abs(reference.logits - other.logits).max())  # type: ignore[operator]
    block = max(reference.peaks, key=lambda name: reference.peaks[name])
    found["largest_activation"] = {"block": block, "value": _finite(reference.peaks[block])}
    found["activations"] = {name: _finite(peak) for name, peak in reference.peaks.items()}
    found["tf32"] = may_use_tf32()
    found["limit"] = mx.finfo(getattr(mx, other.dtype)).max
    found["warnings"] = _warnings(reference, other)
    found["versions"] = {"mlx_aimv2": __version__, "mlx": version("mlx")}
    return found


def choose_images(folder: str | os.PathLike[str] | None, *, limit: int | None = MAX_IMAGES) -> list[Path]:
    """The images to compare on: a folder's, or the four bundled ones. Raises FileNotFoundError if there are none."""
    if folder is None:
        return bundled.photographs()
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: wanted a folder of images, but it does not exist")
    files = [Path(file) for file in list_images([folder]).files]
    if not files:
        raise FileNotFoundError(f"{folder}: no images in this folder")
    return spread(files, limit or len(files))


def spread(files: Sequence[Path], count: int = MAX_IMAGES) -> list[Path]:
    """At most this many of the files, evenly spread."""
    return [files[i * len(files) // count] for i in range(count)] if len(files) > count else list(files)


def rows(found: Mapping[str, Any]) -> dict[str, str]:
    """The short table, `fidelity.json -> {what: value}`, for the terminal and the model card."""
    model, largest = found["model"], found["largest_activation"]
    token, image, count = found["token_cosine"], found["image_cosine"], len(found["images"])
    limit = f"{model['dtype']} holds up to {found['limit']:.4g}"
    table = {
        "token cosine, mean": f"{token['mean']:.6f}",
        "token cosine, minimum": f"{token['min']:.6f}",
        "image vector cosine, minimum": f"{image['min']:.6f}",
    }
    if "nearest_in_common" in found:
        table[f"{NEAREST} nearest images in common"] = f"{found['nearest_in_common']:.1%}"
    if "text_cosine" in found:
        table["text vector cosine, minimum"] = f"{found['text_cosine']['min']:.6f}"
        table["largest difference of logits"] = f"{found['largest_logit_difference']:.4g}"
    return table | {
        "largest activation": f"{largest['value']:.4g} in {largest['block']} ({limit})",
        "size": f"{megabytes(model['bytes'])}, {model['bits_per_weight']:.3f} bits per weight",
        "size of the reference": megabytes(found["reference"]["bytes"]),
        **({"method": found["method"]} if "method" in found else {}),
        "measured on": f"{count} image{'s' * (count != 1)}, {found['tokens']:,} tokens, in {found['computed_in']}, "
        "against float32",
    }


def table(found: Mapping[str, Any]) -> str:
    """`rows` as lines of text, followed by each block's largest activation and the warnings."""
    lines = rows(found) | {"block by block": " ".join(f"{peak:.3g}" for peak in found["activations"].values())}
    width = max(map(len, lines))
    return "\n".join([*(f"{what:<{width}}  {value}" for what, value in lines.items()), *found["warnings"]])


def _check_comparable(reference: BlockwiseRun, other: BlockwiseRun) -> None:
    for a, b in zip(reference.tokens, other.tokens, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"{reference.name} makes {a.shape[0]:,} tokens of width {a.shape[1]:,} of an image, {other.name} makes "
                f"{b.shape[0]:,} of width {b.shape[1]:,}; models are compared token by token, so both must be equal"
            )
    kinds = {(run.vectors.shape, run.text_vectors is None) for run in (reference, other)}
    if len(kinds) > 1:
        raise ValueError(
            f"one of {reference.name} and {other.name} has a text encoder; compare two vision models or two LiT models"
        )


def _warnings(reference: BlockwiseRun, other: BlockwiseRun) -> list[str]:
    warnings = []
    if may_use_tf32():
        warnings.append(f"float32 may be rounded to TensorFloat32 here, the reference's too; set {TF32}=0 at the start")
    if not all(np.isfinite(array).all() for array in (*other.tokens, other.vectors)):
        remedy = "its weights are damaged" if other.dtype == "float32" else "use bfloat16 or float32"
        warnings.append(f"{other.name} gives features that are not finite in {other.dtype}; {remedy}")
    return warnings + [
        f"{name}: an activation of {peak:,.4g} leaves float16 (up to 65,504) a factor of {FLOAT16_LARGEST / peak:.2f}; "
        "prefer bfloat16 or float32"
        for name, peak in reference.peaks.items()
        if peak * HEADROOM > FLOAT16_LARGEST
    ]


def _about(run: BlockwiseRun) -> dict[str, Any]:
    bits = round(8 * run.stored_bytes / run.parameters, 4)  # scales included
    sizes = {"parameters": run.parameters, "bytes": run.stored_bytes, "bits_per_weight": bits}
    return {"name": run.name, "dtype": run.dtype} | sizes


def nearest_in_common(a: Floats, b: Floats) -> float:
    """The share of a vector's `NEAREST` neighbours that two models agree on: two `(B, D) -> 0 to 1`."""
    found = []
    for vectors in (a, b):
        unit = np.nan_to_num(vectors) / np.maximum(np.linalg.norm(np.nan_to_num(vectors), axis=1, keepdims=True), 1e-30)
        scores = unit @ unit.T
        np.fill_diagonal(scores, -np.inf)
        found.append(np.argsort(-scores, axis=1, kind="stable")[:, :NEAREST])
    return float(np.mean([np.isin(*pair).mean() for pair in zip(*found, strict=True)]))


def _spread(values: Floats) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(np.min(values))}


def _finite(value: float) -> float:
    """The value, or the largest float if it is not finite: JSON has no infinity."""
    return float(np.nan_to_num(float(value), nan=sys.float_info.max))


def cosines(a: Floats, b: Floats) -> Floats:
    """Cosines row by row, `(N, D), (N, D) -> (N,)`; 0 for a row that is not finite."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (a * b).sum(axis=-1) / lengths
    clipped: Floats = np.clip(np.where(np.isfinite(values), values, 0.0), -1.0, 1.0)
    return clipped


def _record_ranges(block: nn.Module, found: list[mx.array]) -> None:
    """Replaces each linear layer of a block by one that also records the largest values of its input and output."""

    def recording(layer: nn.Module) -> Callable[[mx.array], mx.array]:
        def call(x: mx.array) -> mx.array:
            y: mx.array = layer(x)
            found.extend([mx.abs(x).max(), mx.abs(y).max()])
            return y

        return call

    for part, name in ((block.attn, "qkv"), (block.attn, "proj"), *((block.mlp, n) for n in ("gate", "up", "down"))):
        setattr(part, name, recording(getattr(part, name)))


def _float64(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)
