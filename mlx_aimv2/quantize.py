"""Decides which layer gets how many bits; packs, recognises and unpacks quantized layers.

The attention and feed-forward layers of the blocks and LiT's token embedding are quantized. The patch embedding (its
rows of 588 fit no group size), norms, positions, the pooling head, LiT's two projections and `logit_scale` stay dense:
together they are small, and the head and the projections are the last layers a feature passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_aimv2.backend import packing_streams
from mlx_aimv2.checkpoint.detect import listed

Quantization = Mapping[str, Any]
"""The `quantization` section of config.json: group_size, bits, mode, and per layer path an object or false."""

Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]
"""mlx-lm's alternative to a recipe's name: `path, layer -> settings, True for the shared ones, or False for dense`."""

SHARED = ("group_size", "bits", "mode")
STAY_DENSE = ("head", "visual_projection", "text_projection")
"""Parts of a path whose linear layers are never quantized."""


MODES = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}
"""Number format -> the group sizes and bits that MLX supports, the default first."""

METHODS = ("plain", "gptq")
"""How weights are rounded, the default first: each to the nearest value, or with calibration (`conversion.gptq`)."""

RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
"""Recipe -> (bits of most layers, bits of those that `_matters` names)."""


def resolve(mode: str = "affine", group_size: int | None = None, bits: int | None = None) -> dict[str, Any]:
    """The requested settings, with the mode's defaults: `-> {"group_size", "bits", "mode"}`.

    Raises ValueError with the valid choices.
    """
    if mode not in list(MODES):  # a list of a damaged config.json cannot be asked of a dictionary
        raise ValueError(f"q_mode must be {', '.join(MODES)}, got {mode!s:.80}")
    known = dict(zip(("group_size", "bits"), MODES[mode], strict=True))
    settings = {
        "group_size": known["group_size"][0] if group_size is None else group_size,
        "bits": known["bits"][0] if bits is None else bits,
        "mode": mode,
    }
    for key, choices in known.items():
        if type(settings[key]) is not int or settings[key] not in choices:
            raise ValueError(f"q_{key} must be {_or(choices)} with q_mode {mode}, got {settings[key]!r:.40}")
    return settings


def plan(model: nn.Module, settings: Mapping[str, Any], predicate: str | Predicate | None = None) -> dict[str, Any]:
    """The whole `quantization` section for a model: `settings for all, recipe or predicate -> section`.

    Every layer that stays dense although it could be quantized has an entry `false`; a layer with its own settings has
    all of them. Raises ValueError that names the layers whose rows do not divide into groups.
    """
    if isinstance(predicate, str):
        low, high = RECIPES[predicate]
        settings = {**settings, "bits": low}
    section = dict(settings)
    for path, layer in layers(model).items():
        own: bool | dict[str, Any] = not set(path.split(".")) & set(STAY_DENSE)
        if own and isinstance(predicate, str):
            own = {**settings, "bits": high} if _matters(path, model) else True
        elif own and callable(predicate):
            answer = predicate(path, layer)
            own = resolve(**{**settings, **answer}) if isinstance(answer, dict) else bool(answer)
        if own is not True and own != settings:
            section[path] = own
    check(model, section)
    return section


def check(model: nn.Module, quantization: Quantization) -> None:
    """Raises ValueError naming the layers that cannot be quantized as the section says."""
    misfits: dict[tuple[int, int], list[str]] = {}
    for path, layer in layers(model).items():
        settings, width = settings_at(path, quantization), layer.weight.shape[-1]
        if settings and width % settings["group_size"]:
            misfits.setdefault((width, settings["group_size"]), []).append(path)
    if misfits:
        lines = [f"{listed(paths)} (rows of {width:,}, groups of {size:,})" for (width, size), paths in misfits.items()]
        fitting = [size for size in MODES["affine"][0] if all(width % size == 0 for width, _ in misfits)]
        advice = f"; --q-group-size {_or(fitting)} would fit" if fitting else ""
        raise ValueError(f"these layers do not divide into groups: {'; '.join(lines)}{advice}")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that MLX could quantize, by path."""
    return {path: layer for path, layer in sorted(model.named_modules()) if hasattr(layer, "to_quantized")}


def check_section(quantization: object, known: Container[str]) -> None:
    """Raises ValueError unless a `quantization` section is an object of settings and entries per layer."""
    if not isinstance(quantization, Mapping):
        raise ValueError(f"config.json: quantization must be an object, got {quantization!r:.80}")
    for path in ("", *(key for key in quantization if key not in SHARED)):
        where = f"config.json: quantization, {path:.120}".removesuffix(", ")
        if path and path not in known:
            raise ValueError(f"{where}: no layer of this model that could be quantized")
        if not isinstance(entry := quantization.get(path, True), Mapping | bool):
            raise ValueError(f"{where} must be an object, true or false, got {entry!r:.80}")
        try:
            settings_at(path, quantization)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def apply_structure(model: nn.Module, quantization: Quantization, stored: Container[str]) -> None:
    """Turns layers into quantized ones, in place; their weights come later.

    `stored` are the names of the stored tensors: under the shared settings a layer is quantized if its
    `.scales` is among them; a layer with its own entry follows that.
    """
    replaced: dict[str, nn.Module] = {}
    for path, layer in layers(model).items():
        if (path in quantization or f"{path}.scales" in stored) and (settings := settings_at(path, quantization)):
            replaced[path] = _quantized(layer, settings)
    modules: Any = tree_unflatten(list(replaced.items()))
    model.update_modules(modules)


def section_of(model: nn.Module) -> dict[str, Any] | None:
    """The `quantization` section that describes how the layers of a model are packed; None if all are dense."""
    packed = {
        path: {key: getattr(layer, key) for key in SHARED}
        for path, layer in sorted(model.named_modules())
        if hasattr(layer, "bits")
    }
    if not packed:
        return None
    shared = max(packed.values(), key=[*packed.values()].count)
    own = {path: settings for path, settings in packed.items() if settings != shared}
    return shared | dict.fromkeys(layers(model), False) | own


def _quantized(layer: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The layer packed, as `layer.to_quantized` makes it, but without random numbers (`layers` says why)."""
    kind = nn.QuantizedEmbedding if isinstance(layer, nn.Embedding) else nn.QuantizedLinear
    packed: Any = kind.__new__(kind)
    nn.Module.__init__(packed)
    packed.group_size, packed.bits, packed.mode = settings["group_size"], settings["bits"], settings["mode"]
    if isinstance(layer, nn.Embedding):
        packed.num_embeddings, packed.dims = layer.weight.shape
    packed.weight, packed.scales, *biases = mx.quantize(layer.weight, **settings)
    packed.biases = biases[0] if biases else None
    if "bias" in layer:
        packed.bias = layer.bias
    packed.freeze()
    result: nn.Module = packed
    return result


def settings_at(path: str, quantization: Quantization) -> dict[str, Any]:
    """Group size, bits and mode at a path: its own entry if it has one, else the shared one; empty if dense."""
    entry = quantization.get(path, True)
    if entry is True:
        entry = quantization
    return resolve(**{key: entry[key] for key in SHARED if entry.get(key) is not None}) if entry else {}


def packed(
    weights: Iterable[tuple[str, mx.array]],
    paths: Iterable[str],
    quantization: Quantization,
    *,
    dtype: mx.Dtype,
    done: Mapping[str, list[mx.array]] = MappingProxyType({}),
) -> Iterator[tuple[str, mx.array]]:
    """Packs the layers that the section names, lazily: `(name, array), … -> (name, array), …` with scales and biases.

    `paths` are the layers that could be quantized (`layers`), `done` the ones already packed. Everything but packed
    integers is cast to `dtype`.
    """
    paths, streams = set(paths), packing_streams()
    for name, array in weights:
        path, _, kind = name.rpartition(".")
        settings = settings_at(path, quantization) if kind == "weight" and path in paths else {}
        with mx.stream(next(streams)):
            parts = done.get(path) or (pack(array, settings, dtype) if settings else [array.astype(dtype)])
        if settings:
            for part, values in zip(("weight", "scales", "biases"), parts, strict=False):
                yield f"{path}.{part}", values
        else:
            yield name, parts[0]


def pack(array: mx.array, settings: Mapping[str, Any], dtype: mx.Dtype) -> list[mx.array]:
    """One weight as packed integers, scales in `dtype` (bytes in the mx and nv modes) and, for affine, biases."""
    # bfloat16's coarse scales must be known before numbers are rounded to them (8 bit: error 0.71 % instead of 0.82 %).
    # float16's are fine enough to be rounded afterwards, and CPUs quantize float32 in less than half the time.
    if dtype == mx.bfloat16:
        array = array.astype(dtype)
    return [
        part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part
        for part in mx.quantize(array, **settings)
    ]


def unpack(parts: Sequence[mx.array], settings: Mapping[str, Any]) -> mx.array:
    """The dense weight that packed integers, scales and biases represent, in float32, which holds it exactly."""
    # Half-precision scales would round scale * number + bias once more.
    weight, scales, *biases = (
        part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part for part in parts
    )
    return mx.dequantize(weight, scales, biases[0] if biases else None, dtype=mx.float32, **settings)


def dequantized(weights: dict[str, mx.array], quantization: Quantization) -> dict[str, mx.array]:
    """Dense weights in float32 from packed ones, lazily: `{name: array} -> {name: array}` without scales and biases."""
    dense: dict[str, mx.array] = {}
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and f"{path}.scales" in weights:
            parts = [weights[part] for part in (name, f"{path}.scales", f"{path}.biases") if part in weights]
            dense[name] = unpack(parts, settings_at(path, quantization))
        elif kind not in ("scales", "biases"):
            dense[name] = array
    return dense


def _matters(path: str, model: nn.Module) -> bool:
    """Whether a recipe gives this layer its higher bits.

    As in mlx-lm, whose rule is llama.cpp's for Q4_K_M: the values and `down` in the first and the last eighth of the
    blocks and in every third one between. Here queries, keys and values are one matrix, which gets the bits as a whole,
    and so does the token embedding.
    """
    encoder, found, rest = path.rpartition("blocks.")
    if not found:
        return True
    number, _, name = rest.partition(".")
    i, depth = int(number), len((model.text_model if encoder == "text_model." else model.vision).blocks)
    inside = depth // 8 <= i < 7 * depth // 8 and (i - depth // 8) % 3 != 2
    return not inside and name in ("attn.qkv", "mlp.down")


def _or(choices: Iterable[Any]) -> str:
    texts = [str(choice) for choice in sorted(choices)]
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
