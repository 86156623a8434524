"""Loads any checkpoint as a model and its processor: foreign or MLX, on disk or on the Hub.

A checkpoint is found, opened and checked once. From then on the `Source` is passed, never a name, which might resolve
to another commit the next time:
checkpoint.read -> detect.recognise -> sizes -> strict comparison -> target names -> Source -> dtype -> model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlx_aimv2 import quantize
from mlx_aimv2.backend.device import AUTO, check_process, mark_lazy, may_use_tf32, suited_dtype
from mlx_aimv2.checkpoint.detect import beside, differences, disagreements, recognise, sizes
from mlx_aimv2.checkpoint.read import Checkpoint, read, read_tensors
from mlx_aimv2.config import DTYPES, Aimv2Config, Aimv2VisionConfig, AnyConfig, dtype_name
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.layers import empty
from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel

if TYPE_CHECKING:
    from mlx_aimv2.checkpoint.layouts import Match

NATIVE, NATIVE_WHOLE = 224, 448
"""Image side in pixels for native checkpoints, which take any: for whole-image labels, and for boxes and masks."""

LARGEST = 2044
"""Image side in pixels, 146 patches of 14: attention over more tokens would need more than 10 GB per head."""

AnyModel = Aimv2VisionModel | Aimv2Model

_log = logging.getLogger(__name__)


@dataclass
class Source:
    """A checkpoint that was found, opened and checked: its location, its sizes, and its tensors, still lazy.

    `weights` are the tensors under target names; a user takes them out, so each can be freed, and calls `reopened` to
    read them again. `quantization` is the section of that name in an MLX folder's config.json, None when the weights
    are dense. `image_size` is the requested size, None for the checkpoint's own: `config`, positions and processor
    are for this size, `stored` has the sizes in the files.
    """

    origin: Checkpoint
    stored: AnyConfig
    match: Match
    weights: dict[str, mx.array]
    quantization: Mapping[str, Any] | None
    image_size: int | None = None

    def __post_init__(self) -> None:
        self._shapes = {name: array.shape for name, array in self.weights.items()}
        own = self.stored.vision
        self.image_size = pixels_for(own, self.image_size) if self.image_size not in (None, own.image_size) else None
        if self.image_size is not None and own.image_size is not None:
            name = "vision_model.pos_embed" if isinstance(self.stored, Aimv2Config) else "pos_embed"
            self.weights[name] = _resized(self.weights[name], own, self.image_size)

    @property
    def config(self) -> AnyConfig:
        """The sizes of the model."""
        own = self.stored
        if self.image_size is None or own.vision.image_size is None:
            return own
        vision = replace(own.vision, image_size=self.image_size)
        return replace(own, vision_config=vision) if isinstance(own, Aimv2Config) else vision

    @property
    def layout(self) -> str:
        """The name of its layout."""
        return self.match.layout.name

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the checkpoint: that of the patch embedding, which is never quantized."""
        return _dtype(self.weights)

    @property
    def parameters(self) -> int:
        """Number of parameters, counted as if unpacked."""
        return sum(math.prod(shape) for shape in parameter_shapes(build(self.config)).values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(array.nbytes for array in self.weights.values())

    def reopened(self) -> Source:
        """The same files with all tensors lazy again, not resolved or checked again: the Hub is not asked."""
        tensors = read_tensors(self.origin.files)
        with suppress(KeyError, ValueError):  # a tensor that is gone, or has other axes
            again = replace(self, weights=self.match.to_target(tensors, self._shapes))
            if again._shapes == self._shapes:
                return again
        raise ValueError(f"{self.origin}: its weights changed while being read; run it again")

    def processor(self) -> Aimv2Processor:
        """The processor that the checkpoint's files describe, for images of `image_size` if requested."""
        own = Aimv2Processor.from_folder(self.origin.folder, config=self.stored)
        return own if self.image_size is None else own.at_size(self.image_size)

    def load(
        self,
        *,
        dtype: str | mx.Dtype | None = None,
        lazy: bool = False,
        keep_quantized: bool = False,
    ) -> Loaded:
        """The model with its processor, consuming the weights; the settings are those of `load`."""
        if dtype == AUTO:
            dtype = suited_dtype(self.origin.folder)
        model: AnyModel = build(self.config)
        processor = self.processor()
        if self.quantization is not None and keep_quantized:
            quantize.apply_structure(model, self.quantization, self.weights)
        elif self.quantization is not None:
            self.weights = quantize.dequantized(self.weights, self.quantization)
        fill(model, self.weights, dtype=parse_dtype(dtype) if dtype is not None else None, lazy=lazy)
        model.origin = model.vision.origin = replace(self.origin, tensors={}, folder=self.origin.folder.absolute())
        if lazy:
            mark_lazy(model, threading.get_ident())
        return Loaded(self, model, processor)


@dataclass(frozen=True)
class Loaded:
    """A model in memory with its processor, and the checkpoint it came from."""

    source: Source
    model: AnyModel
    processor: Aimv2Processor

    @property
    def origin(self) -> dict[str, Any]:
        """Which weights these are, for JSON: `-> {"checkpoint", "commit", "dtype", "quantization", "tf32"}`.

        `tf32`, whether float32 products may be rounded, is recorded and never compared. `quantization` has the shared
        bits, and as `recipe` a short digest of the layers with their own.
        """
        origin, section = self.source.origin, self.source.quantization
        shared = None
        if section is not None:
            shared = {key: section[key] for key in sorted(quantize.SHARED) if key in section}
            if own := {key: value for key, value in section.items() if key not in shared}:
                shared["recipe"] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
        return {
            "checkpoint": origin.repo or str(origin.path.absolute()),
            "commit": origin.commit,
            "dtype": dtype_name(self.model.dtype),
            "quantization": shared,
            "tf32": may_use_tf32(),
        }


@overload
def load(
    path_or_hf_repo: str | os.PathLike[str],
    *,
    revision: str | None = ...,
    dtype: str | mx.Dtype | None = ...,
    image_size: int | None = ...,
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
    image_size: int | None = ...,
    lazy: bool = ...,
    keep_quantized: bool = ...,
    return_config: Literal[True],
) -> tuple[AnyModel, Aimv2Processor, dict[str, Any]]: ...
def load(
    path_or_hf_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    image_size: int | None = None,
    lazy: bool = False,
    keep_quantized: bool = False,
    return_config: bool = False,
) -> tuple[AnyModel, Aimv2Processor] | tuple[AnyModel, Aimv2Processor, dict[str, Any]]:
    """Loads a checkpoint: `Hub name, foreign folder or weight file, or MLX folder -> (model, processor)`.

    A foreign layout is recognised by its tensor names and translated in memory. `dtype` is "float32", "float16",
    "bfloat16", an mlx dtype, or "auto" for the best on this machine and checkpoint (`suited_dtype`); None keeps the
    checkpoint's. `image_size` is a side in pixels other than the checkpoint's (`at_size`). Quantized weights are
    dequantized at loading, because an encoder runs faster that way; `keep_quantized` saves the memory instead. With
    `lazy` the weights are read when first used. With `return_config` the content of config.json is returned third.

    Raises FileNotFoundError, ConnectionError or ValueError with one line that says what was wanted and what came.
    """
    if dtype is not None and dtype != AUTO:
        dtype = parse_dtype(dtype)  # before anything is fetched
    source = read_source(path_or_hf_repo, revision=revision, image_size=image_size)
    loaded = source.load(dtype=dtype, lazy=lazy, keep_quantized=keep_quantized)
    if return_config:
        return loaded.model, loaded.processor, loaded.source.origin.config
    return loaded.model, loaded.processor


def read_source(
    path_or_hf_repo: str | os.PathLike[str], *, revision: str | None = None, image_size: int | None = None
) -> Source:
    """Finds, opens and checks a checkpoint without touching its weights: `path or Hub name -> Source`.

    `image_size` is `load`'s. Every tensor must be known, and every tensor of the model present in its shape: otherwise
    ValueError names all the offenders.
    """
    check_process()
    _log.debug("loading")
    origin = read(path_or_hf_repo, revision=revision)
    try:
        return _checked(origin, image_size)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def _checked(origin: Checkpoint, image_size: int | None) -> Source:
    match = recognise(origin.shapes, origin.config.get("encoder_prefix"))
    extra, lines = beside(origin.shapes, match)
    if lines:
        warnings.warn(f"{origin}: {'; '.join(lines)}; only the encoder is used", stacklevel=3)
        origin.tensors = {name: array for name, array in origin.tensors.items() if name not in extra}
    quantization = origin.config.get("quantization") if match.is_target else None
    shown = sizes(match.target_shapes(origin.shapes))
    kind: type[AnyConfig] = Aimv2Config if "text_config" in shown else Aimv2VisionConfig
    config = kind.from_dict(origin.config, shown)
    if others := disagreements(config, shown):  # before building a model of unchecked sizes
        raise ValueError(f"config.json and the weights disagree on sizes: {'; '.join(others)}")
    model = build(config)
    if quantization is not None:
        quantize.check_section(quantization, quantize.layers(model))
        quantize.apply_structure(model, quantization, origin.tensors)
    wanted = parameter_shapes(model)
    wanted_source = match.source_shapes(wanted)
    if lines := differences(wanted_source, origin.shapes, match):
        raise ValueError(f"the tensors do not match this model: {'; '.join(lines)}")
    parameters: Any = tree_flatten(model.parameters())
    packed = {name: array.dtype for name, array in parameters if not mx.issubdtype(array.dtype, mx.floating)}
    origin.check_dtypes(wanted_source, {match.prefix + name: dtype for name, dtype in packed.items()})
    return Source(origin, config, match, match.to_target(origin.tensors, wanted), quantization, image_size)


def build(config: AnyConfig) -> AnyModel:
    """The model of these sizes, with lazy zeros as weights until a checkpoint's replace them."""
    with empty():
        return Aimv2Model(config) if isinstance(config, Aimv2Config) else Aimv2VisionModel(config)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path: what a checkpoint must hold, no more and no less."""
    parameters: Any = tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in parameters}


def fill(model: nn.Module, weights: dict[str, mx.array], *, dtype: mx.Dtype | None, lazy: bool = False) -> None:
    """Puts the weights into the model, all in one dtype, and empties `weights`.

    One tensor of another dtype would promote everything after it; None takes the patch embedding's dtype. It goes
    tensor by tensor, because casting all at once needs twice the memory.
    """
    dtype = dtype or _dtype(weights)
    for name in list(weights):
        array = weights.pop(name)
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
        array = mx.contiguous(array)  # PyTorch's patch kernel is transposed: each pass would copy the view
        if not lazy:
            mx.eval(array)
        model.load_weights([(name, array)], strict=False)  # the names were checked before
    model.eval()


def at_size(
    encoder: Aimv2VisionModel, processor: Aimv2Processor, size: int | None, *, whole: bool = False
) -> tuple[Aimv2VisionModel, Aimv2Processor]:
    """Encoder and processor for square images of `size` pixels a side: None takes the checkpoint's own.

    The processor takes a centre crop, as the checkpoint's does, or with `whole` stretches the whole image to the
    square. The layers are shared with `encoder`, only the positions are new; a native checkpoint has none, and only its
    processor changes. Raises ValueError for a size that is not a multiple of the patch.
    """
    config, own = encoder.config, encoder.config.image_size
    if not whole and own is not None and size in (None, own):
        return encoder, processor
    size = pixels_for(config, size or own or (NATIVE_WHOLE if whole else NATIVE))
    resized = processor.at_size(size, whole=whole)
    if own in (None, size):
        return encoder, resized
    model = copy.copy(encoder)
    model.config = replace(config, image_size=size)
    model.pos_embed = _resized(encoder.pos_embed, config, size)
    return model, resized


def pixels_for(config: Aimv2VisionConfig, size: int) -> int:
    """The side in pixels for `image_size`. Raises ValueError for a size that is not a multiple of the patch."""
    patch = config.patch_size
    if type(size) is not int:
        raise ValueError(f"image_size must be a whole number of pixels, got {size!r:.80}")
    fitting = size // patch * patch
    if not patch <= size <= LARGEST or (size != fitting and config.image_size is not None):
        near = sorted({max(patch, min(LARGEST // patch * patch, side)) for side in (fitting, fitting + patch)})
        raise ValueError(
            f"image_size must be a multiple of the patch of {patch} pixels, at most {LARGEST:,}, got {size:,}; "
            f"use {' or '.join(map(str, near))}"
        )
    return fitting  # a native checkpoint drops partial patches


def _resized(table: mx.array, config: Aimv2VisionConfig, size: int) -> mx.array:
    """The positions for square images of `size` pixels: `(N, D) -> (N', D)`."""
    side = math.isqrt(table.shape[0])
    return resample_positions(table, (side, side), (size // config.patch_size,) * 2)


def resample_positions(table: mx.array, grid: tuple[int, int], target: tuple[int, int]) -> mx.array:
    """Positions resampled to another grid, in the table's dtype: `(rows * columns, D) -> (rows' * columns', D)`.

    As timm's `resample_abs_pos_embed`: bicubic and antialiased, computed in float32. The only such rule here.
    """
    if grid == target:
        return table
    x = np.array(table.astype(mx.float32)).reshape(*grid, -1)
    rows, columns = (_cubic_weights(*sizes) for sizes in zip(grid, target, strict=True))
    x = np.einsum("ri,ijd,cj->rcd", rows, x, columns, optimize=True)
    return mx.array(x.reshape(math.prod(target), -1)).astype(table.dtype)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """Weights of antialiased cubic interpolation along one axis, `-> (new, old)` float32.

    Pillow's, whose rule torch's `antialias=True` follows: resampling an identity matrix reveals them.
    """
    return np.asarray(Image.fromarray(np.eye(old, dtype=np.float32)).resize((old, new), Image.Resampling.BICUBIC))


def parse_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """A dtype or its name as an mlx dtype. Raises ValueError with the valid names."""
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {dtype}")
    known: mx.Dtype = getattr(mx, name)
    return known


def _dtype(weights: Mapping[str, mx.array]) -> mx.Dtype:
    return next(array.dtype for name, array in weights.items() if name.endswith("patch_embed.proj.weight"))
