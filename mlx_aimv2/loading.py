"""Loads any checkpoint as a model and its processor: foreign or MLX, on disk or on the Hub.

checkpoint.read -> detect.recognise -> sizes -> strict comparison -> target names -> dtype -> model.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_aimv2 import device, quantize
from mlx_aimv2.checkpoint import detect
from mlx_aimv2.checkpoint import read as checkpoint
from mlx_aimv2.checkpoint.config_json import disagreements, read_config
from mlx_aimv2.config import DTYPES, Aimv2Config, AnyConfig
from mlx_aimv2.empty_layers import empty
from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel
from mlx_aimv2.processor import Aimv2Processor
from mlx_aimv2.threads import mark_lazy

AnyModel = Aimv2VisionModel | Aimv2Model


@dataclass
class Source:
    """A checkpoint that was checked: its sizes, the name of its layout, and its tensors under target names, still lazy.

    `quantization` is the `quantization` section of an MLX folder's config.json, None when the weights are dense.
    """

    origin: checkpoint.Checkpoint
    config: AnyConfig
    layout: str
    weights: dict[str, mx.array]
    quantization: Mapping[str, Any] | None

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the checkpoint: that of the patch embedding, which is never quantized."""
        return _dtype(self.weights)

    @property
    def parameters(self) -> int:
        """Number of parameters, however they are packed."""
        return sum(math.prod(shape) for shape in parameter_shapes(build(self.config)).values())

    def processor(self) -> Aimv2Processor:
        """The processor that the checkpoint's files describe."""
        return Aimv2Processor.from_folder(self.origin.folder, config=self.config)


@overload
def load(
    path_or_hf_repo: str | os.PathLike[str],
    *,
    revision: str | None = ...,
    dtype: str | mx.Dtype | None = ...,
    lazy: bool = ...,
    keep_quantized: bool = ...,
    return_config: Literal[False] = ...,
) -> tuple[AnyModel, Aimv2Processor]: ...
@overload
def load(
    path_or_hf_repo: str | os.PathLike[str],
    *,
    revision: str | None = ...,
    dtype: str | mx.Dtype | None = ...,
    lazy: bool = ...,
    keep_quantized: bool = ...,
    return_config: Literal[True],
) -> tuple[AnyModel, Aimv2Processor, dict[str, Any]]: ...
def load(
    path_or_hf_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    lazy: bool = False,
    keep_quantized: bool = False,
    return_config: bool = False,
) -> tuple[AnyModel, Aimv2Processor] | tuple[AnyModel, Aimv2Processor, dict[str, Any]]:
    """Loads a checkpoint: `Hub name, foreign folder or weight file, or MLX folder -> (model, processor)`.

    A foreign layout is recognised by its tensor names and translated in memory. `dtype` is "float32", "float16",
    "bfloat16", an mlx dtype, or "auto" for what suits this machine and the checkpoint (`device.suited_dtype`); None
    keeps the checkpoint's. Quantized weights are made dense once, because an encoder runs faster so; `keep_quantized`
    saves the memory instead. With `lazy` the weights are read when first used. With `return_config` the content of
    config.json comes third.

    Raises FileNotFoundError, ConnectionError or ValueError with one line that says what was wanted and what came.
    """
    device.check_process()
    wanted = parse_dtype(dtype) if dtype is not None and dtype != device.AUTO else None
    source = read_source(path_or_hf_repo, revision=revision)
    if dtype == device.AUTO:
        wanted = parse_dtype(device.suited_dtype(source.origin.folder))
    model = build(source.config)
    processor = source.processor()
    if source.quantization is not None and keep_quantized:
        quantize.apply_structure(model, source.quantization, source.weights)
    elif source.quantization is not None:
        source.weights = quantize.dequantized(source.weights, source.quantization)
    fill(model, source.weights, dtype=wanted, lazy=lazy)
    if lazy:
        mark_lazy(model)
    if return_config:
        return model, processor, source.origin.config
    return model, processor


def read_source(path_or_hf_repo: str | os.PathLike[str], *, revision: str | None = None) -> Source:
    """Reads and checks a checkpoint without touching its weights: `path or Hub name -> Source`.

    Every tensor must be known and every tensor of the model must be there, in its shape: otherwise ValueError names all
    that are not.
    """
    origin = checkpoint.read(path_or_hf_repo, revision=revision)
    match = _naming(origin, lambda: detect.recognise(origin.shapes))
    if extra := detect.classifier(origin.shapes, match):
        warnings.warn(
            f"{origin}: a classifier is left out ({detect.listed(extra)}); the encoder is taken", stacklevel=2
        )
        origin.tensors = {name: array for name, array in origin.tensors.items() if name not in extra}
    quantization = origin.config.get("quantization") if match.is_target else None
    shapes = match.target_shapes(origin.shapes)
    config = _naming(origin, lambda: read_config(origin.config, shapes))
    if sizes := disagreements(config, shapes):  # before a model of sizes that nobody checked is built
        raise ValueError(f"{origin}: config.json and the weights are of different sizes: {'; '.join(sizes)}")
    model = build(config)
    if quantization is not None:
        _naming(origin, lambda: quantize.check_section(quantization, quantize.layers(model)))
        _naming(origin, lambda: quantize.apply_structure(model, quantization, origin.tensors))
    wanted = parameter_shapes(model)
    wanted_source = match.source_shapes(wanted)
    if lines := detect.differences(wanted_source, origin.shapes, match):
        raise ValueError(f"{origin}: the tensors are not those of this model: {'; '.join(lines)}")
    packed = {match.prefix + name: dtype for name, dtype in quantize.packed_dtypes(model).items()}
    _naming(origin, lambda: origin.check_dtypes(wanted_source, packed))
    weights = match.to_target(origin.tensors, wanted)
    return Source(origin, config, match.layout.name, weights, quantization)


def build(config: AnyConfig) -> AnyModel:
    """The model of these sizes, its weights lazy zeros until a checkpoint's take their place."""
    with empty():
        return Aimv2Model(config) if isinstance(config, Aimv2Config) else Aimv2VisionModel(config)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path: what a checkpoint must hold, no more and no less."""
    parameters: Any = tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in parameters}


def fill(model: nn.Module, weights: dict[str, mx.array], *, dtype: mx.Dtype | None, lazy: bool = False) -> None:
    """Puts the weights into the model, in one dtype throughout, and empties `weights`.

    One tensor of another dtype would promote everything after it; dtype None takes that of the patch embedding. Tensor
    by tensor, because casting all at once needs the memory twice.
    """
    dtype = dtype or _dtype(weights)
    for name in list(weights):
        array = weights.pop(name)
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
        if not lazy:
            mx.eval(array)
        model.load_weights([(name, array)], strict=False)  # the names were compared with the model's before
    model.eval()


def parse_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """A dtype or its name as an mlx dtype. Raises ValueError with the names there are."""
    known: dict[object, mx.Dtype] = {name: getattr(mx, name) for name in DTYPES}
    known |= {value: value for value in known.values()}
    if dtype in known:
        return known[dtype]
    raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {dtype}")


def _dtype(weights: Mapping[str, mx.array]) -> mx.Dtype:
    return next(array.dtype for name, array in weights.items() if name.endswith("patch_embed.proj.weight"))


def _naming(origin: checkpoint.Checkpoint, step: Any) -> Any:
    """Runs one step and puts the checkpoint's name before its error."""
    try:
        return step()
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
