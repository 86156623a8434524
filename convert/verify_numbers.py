"""Steps of `make verify` that check a checkpoint's numbers: count, published values, transformers, dtypes, speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from convert import check, machine
from convert.published import Row
from convert.report import COMPUTED, FAIL, MEASURED, NOT_DONE, PASS, Finding, Step, Subject, failed
from mlx_aimv2 import Aimv2Config, Aimv2Model, Aimv2TextModel, Aimv2VisionModel, load
from mlx_aimv2.config import released
from mlx_aimv2.conversion import fidelity
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import AnyModel, read_source

ALLOWED = 1e-3
"""Difference to published values that passes; the test-suite they come from allows the same."""


def count_parameters(row: Row) -> Finding:
    """Downloads the checkpoint and counts what is in it."""
    source = read_source(row.repo, revision=row.commit)
    count = sum(array.size for array in source.weights.values())
    detail = f"{source.layout} layout, {count:,} parameters"
    if source.origin.commit:
        detail += f", commit {source.origin.commit[:12]}"
    if count != row.parameters:
        return Finding("download and read", FAIL, f"{detail}, wanted {row.parameters:,}")
    return Finding("download and read", PASS, detail)


def published_values(subject: Subject) -> list[Finding]:
    """The largest difference to the feature values that transformers' test suite holds."""
    what, row, features = "published values", subject.row, subject.features
    if row.expected is None:
        return [Finding(what, NOT_DONE, "none are published for this checkpoint")]
    if subject.note:
        return [Finding(what, NOT_DONE, subject.note)]
    if tuple(features.shape) != row.expected_shape:
        return [Finding(what, FAIL, f"shape {tuple(features.shape)}, published {row.expected_shape}")]
    wanted = np.array(row.expected)
    found = np.array(features)[0, : wanted.shape[0], : wanted.shape[1]]
    error = float(np.abs(found - wanted).max())
    return [Finding(what, PASS if error <= ALLOWED else FAIL, f"largest difference {error:.1e}, allowed {ALLOWED:.0e}")]


def zero_shot(subject: Subject) -> list[Finding]:
    """Logits of two texts for the image, of a LiT model."""
    model = subject.model
    if not isinstance(model, Aimv2Model):
        return []
    texts = ["a photo of a cat", "a photo of a dog"]
    logits = np.array(model(subject.pixels, subject.processor.tokenize(texts)).logits_per_image)[0]
    detail = ", ".join(f"{text}: {logit:.4f}" for text, logit in zip(texts, logits, strict=True))
    return [Finding("zero-shot", MEASURED, detail)]


def conversion(subject: Subject) -> list[Finding]:
    """Whether the converted folder gives the same features."""
    folder = convert(subject.row.repo, subject.place / "mlx", revision=subject.row.commit, verify=False)
    again = load(folder, dtype="float32")[0].vision(subject.pixels).last_hidden_state
    same = bool(mx.array_equal(subject.features, again))
    detail = "the folder gives the same features to the bit" if same else "the folder gives other features"
    shutil.rmtree(folder)
    return [Finding("conversion", PASS if same else FAIL, detail)]


def transformers_on_torch(subject: Subject) -> list[Finding]:
    """The distance to the features that transformers computes, where it is installed."""
    what = "transformers on torch"
    try:
        import torch
        import transformers
    except ImportError as error:
        return [Finding(what, NOT_DONE, f"{error.name} is not installed: pip install 'mlx-aimv2[parity]'")]
    distance = check.compare(subject.row.repo, [subject.image], revision=subject.row.commit)[0]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, float32"
    verdict = PASS if distance <= check.TOLERANCE else FAIL
    return [Finding(what, verdict, f"relative error {distance:.1e}, allowed {check.TOLERANCE:.0e} ({versions})")]


def fused_attention(subject: Subject) -> list[Finding]:
    """That the model's own attention calls are fused, in each dtype, by forbidding MLX any other way."""
    if not _on_gpu():
        return [Finding("fused attention", NOT_DONE, "no GPU here")]
    findings = []
    for dtype in ("float32", "float16", "bfloat16"):
        model, what = cast(subject.model, dtype), f"fused attention, {dtype}"
        findings.append(_fused(what, model.vision, subject.pixels))
        for kind, encoder, given in other_encoders(getattr(mx, dtype)):
            findings.append(_fused(f"{what}, {kind}", encoder, given))
    return findings


def other_encoders(dtype: mx.Dtype) -> Iterator[tuple[str, Aimv2VisionModel | Aimv2TextModel, mx.array]]:
    """A native grid that fills no tiles and LiT's texts, in two blocks of random weights with heads as released."""
    narrow = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    native = Aimv2VisionModel(replace(released("large-patch14-native").config.vision, **narrow))
    pair = released("large-patch14-224-lit").config
    assert isinstance(pair, Aimv2Config)
    text = Aimv2TextModel(replace(pair.text_config, **narrow, vocab_size=pair.text_config.eos_token_id + 1))
    for encoder in (native, text):
        encoder.set_dtype(dtype)
    yield "a native grid", native, mx.zeros((2, 9 * 14, 13 * 14, 3))
    yield "texts", text, mx.full((2, pair.text_config.max_position_embeddings), pair.text_config.eos_token_id)


def _fused(what: str, encoder: Aimv2VisionModel | Aimv2TextModel, given: mx.array) -> Finding:
    """Whether an encoder's attention is fused in every block."""
    try:
        with only_fused() as calls:
            mx.eval(encoder(given).last_hidden_state)
    except (ValueError, RuntimeError, TypeError) as error:
        return failed(what, error)
    blocks = len(encoder.blocks)
    return Finding(what, PASS if len(calls) >= blocks else FAIL, f"{len(calls)} calls in {blocks} blocks")


@contextmanager
def only_fused() -> Iterator[list[Any]]:
    """Within the block attention is fused or raises; gives the list of the shapes it was called with."""
    fast: Any = mx.fast
    original = fast.scaled_dot_product_attention
    calls: list[Any] = []

    def forced(queries: mx.array, *arguments: Any, **flags: Any) -> Any:
        calls.append(queries.shape)
        return original(queries, *arguments, **flags, force_fused=True)

    fast.scaled_dot_product_attention = forced
    try:
        yield calls
    finally:
        fast.scaled_dot_product_attention = original


def half_precision(subject: Subject) -> list[Finding]:
    """Fidelity in float16, with the largest activations, as every conversion measures it."""
    folder = convert(subject.row.repo, subject.place / "half", revision=subject.row.commit, dtype="float16")
    found = json.loads((folder / fidelity.FILE).read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    findings = [Finding(f"float16: {what}", MEASURED, value) for what, value in fidelity.rows(found).items()]
    return [*findings, *(Finding("float16: warning", MEASURED, warning) for warning in found["warnings"])]


def speed(subject: Subject) -> list[Finding]:
    """Images per second of the image encoder, for one image and for eight at once."""
    findings = []
    for dtype in dtypes_here():
        model = cast(subject.model, dtype)
        rates = []
        for batch in (1, 8):
            many = mx.concatenate([subject.pixels] * batch)
            seconds = machine.median_seconds(partial(_features, model, many), subject.repeats)
            rates.append(f"{batch / seconds:.2f} ({batch} at once, {1e3 * seconds:.0f} ms)")
        findings.append(Finding(f"images a second, {dtype}", MEASURED, ", ".join(rates)))
    return [*findings, Finding("yardstick, one pass", COMPUTED, machine.yardstick())]


def dtypes_here() -> tuple[str, ...]:
    """Names of the dtypes whose speed is worth knowing here: half precision crawls on a CPU."""
    return ("float32", "float16", "bfloat16") if _on_gpu() else ("float32",)


def cast(model: AnyModel, dtype: str) -> AnyModel:
    """The same model in another dtype; the weights given are left as they are."""
    wanted = getattr(mx, dtype)
    if model.dtype == wanted:
        return model
    other = type(model)(model.config)  # type: ignore[arg-type]
    other.update(tree_map(lambda array: array.astype(wanted), model.parameters()))
    return other


STEPS: dict[str, Step] = {
    "published values": published_values,
    "zero-shot": zero_shot,
    "conversion": conversion,
    "transformers on torch": transformers_on_torch,
    "fused attention": fused_attention,
    "float16": half_precision,
    "speed": speed,
}
"""What is checked -> the step, in the order of the report."""


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def _features(model: AnyModel, pixels: mx.array) -> mx.array:
    return model.vision(pixels).last_hidden_state
