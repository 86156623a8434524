"""Detects layout, sizes and prefix of the encoder in a checkpoint, and lists what is wrong with its tensors.

A layout is recognised by its tensor names, never by the name of a repository: the same repository has held two layouts
at different revisions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_aimv2.checkpoint.layouts import LAYOUTS, OIHW, PATCH_CONV, Layout, Match, Row, Shapes, split_number

_NOT_AIMV2 = {
    r"(^|\.)(cls_token|class_token|cls_embed\w*|class_embedding)$": "a CLS token",
    r"(^|\.)(reg_tokens?|register_tokens?|storage_tokens)$": "register tokens",
    r"rope|rotary|freqs|inv_freq": "rotary positions",
    r"(^|\.)(gamma|gamma_[12]|ls[12]|layer_scale\w*)(\.|$)": "layer scale",
    r"\.(q_norm|k_norm|qk_norm)\.": "norms on queries and keys",
    r"\.(layers?|blocks)\.\d+\..*bias$": "biases in the blocks",
    r"relative_position|rel_pos": "relative positions",
}
"""Tensors that a ViT may have but AIMv2 does not: pattern -> what it is."""

GATE, TOKENS = "blocks.{i}.mlp.gate.weight", "token_embed.weight"
"""Tensors that distinguish an AIMv2 encoder from another ViT, and a pair from its vision encoder."""

_GATE = {"blocks.0.mlp.gate.weight": ("intermediate_size", "")}
_IMAGE_AXES = _GATE | {PATCH_CONV: ("hidden_size", "patch_size", "", "num_channels"), "pos_embed": ("patches", "")}
# The width is the position table's: unlike the token table it is never packed into integers.
_TEXT_AXES = _GATE | {"token_embed.weight": ("vocab_size", ""), "pos_embed": ("max_position_embeddings", "hidden_size")}
"""The sizes that the axes of the target's tensors show."""

_EMA = re.compile(r"(^|[._])ema([._]|$)")

_LANGUAGE = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|tok_embeddings)\.")
"""Parts that only a language model has."""

_BESIDE = {
    "a classifier": re.compile(r"^(head|fc)\.(weight|bias)$|(^|\.)classifier\."),
    "a buffer without weights": re.compile(r"(^|\.)(position_ids|num_batches_tracked)$"),
    "a moving average of the weights (EMA)": _EMA,
}
"""What may come with an encoder's weights but is not part of AIMv2, as timm and transformers name it after the prefix.

The pooling head's tensors have other names than a classifier's: head.cls_token, head.k.weight, ...
"""

LONGEST, SHOWN = 120, 5
"""Characters of a tensor's name that an error quotes, and how many left-out tensors it names."""


def recognise(shapes: Shapes, chosen: object = None) -> Match:
    """Finds the layout that matches most of the tensors: `{source name: shape} -> Match`.

    `chosen` is the prefix to take if there are several encoders, None for the only one. Raises ValueError with the
    known layouts and the first foreign names if none matches half of an encoder, with the prefixes if there are
    several encoders, and with the reason if the encoder has parts that AIMv2 does not.
    """
    patterns = {split_number(name)[0] for name in shapes}
    candidates = [
        (len(patterns & {prefix + name for row in rows for name in row.sources}), layout, rows, prefix)
        for layout in LAYOUTS.values()
        for rows in (layout.vision, layout.pair)
        for prefix in _prefixes(patterns, rows)
        if _conv_fits(layout, rows, prefix, shapes) and (rows is layout.vision or _has(TOKENS, rows, prefix, patterns))
    ]
    if chosen is not None:
        candidates = [found for found in candidates if found[3] == chosen]
    best = max(candidates, key=lambda found: (found[0], not _EMA.search(found[3])), default=(0, None, (), ""))
    matched, layout, rows, prefix = best
    if layout is None or 2 * matched < sum(len(row.sources) for row in rows if "head." not in row.target):
        first = ", ".join(sorted(shapes)[:5]) or "none at all"
        raise ValueError(
            f"unknown layout: the tensors match none of {', '.join(LAYOUTS)}; the first names are {first}"
            f"{'' if chosen is None else f' (config.json says encoder_prefix: {chosen!r:.80})'}{_foreign_parts(shapes)}"
        )
    # By the name of its patch convolution, which a pair's rows and those of its vision encoder share.
    encoders = {
        conv: at
        for *_, rows_at, at in candidates
        if (conv := _has(PATCH_CONV, rows_at, at, patterns)) and _has(GATE, rows_at, at, patterns)
        if (_EMA.search(at) is None) == (_EMA.search(prefix) is None)
    }
    if len(encoders) > 1:
        names = sorted(encoders.values())
        raise ValueError(
            f"it holds the encoder more than once, as {' and as '.join(names)}: keep only one of them, or choose one "
            f'in its config.json, for example "encoder_prefix": {json.dumps(names[0])}'
        )
    match = Match(layout, rows, prefix)
    known, rest = {prefix + name for row in rows for name in row.sources}, rest_of(shapes, match)
    inside = [name for name in shapes if name.startswith(prefix) and name not in rest]
    if parts := _foreign_parts(name for name in inside if split_number(name)[0] not in known):
        raise ValueError(f"the names match the {layout.name} layout{parts}")
    return match


def rest_of(names: Iterable[str], match: Match) -> set[str]:
    """The parts of a larger model next to an encoder without a prefix, if there is a language model."""
    if match.prefix or not any(map(_LANGUAGE.search, names)):
        return set()
    own = {name.partition(".")[0] for row in match.rows for name in row.sources}
    return {name for name in names if name.partition(".")[0] not in own}


def sizes(shapes: Shapes) -> dict[str, Any]:
    """The sizes that tensors show, in the form of config.json: `{target name: shape} -> {field: size}`.

    A size is absent if its tensor is: no `image_size` without a position table. With a text encoder it has the form
    of a pair's, with `vision_config` and `text_config`.
    """
    if not any(name.startswith("text_model.") for name in shapes):
        return _sizes_of(shapes, _IMAGE_AXES) | {"use_head": any(name.startswith("head.") for name in shapes)}
    return _sizes_of(shapes, {"visual_projection.weight": ("projection_dim", "")}) | {
        "vision_config": sizes(_without("vision_model.", shapes)),
        "text_config": _sizes_of(_without("text_model.", shapes), _TEXT_AXES),
    }


def disagreements(config: Any, found: Mapping[str, Any], where: str = "") -> list[str]:
    """Every size on which config.json and the tensors differ, as `"hidden_size is 96, the weights say 128"`."""
    lines = []
    for name, size in found.items():
        said = getattr(config, name)
        if isinstance(size, dict):
            lines += disagreements(said, size, f"{name}.")
            continue
        # A remainder at the edges of an image is not a patch.
        is_same = config.num_patches == (size // config.patch_size) ** 2 if name == "image_size" else said == size
        lines += [] if is_same else [f"{where}{name} is {said}, the weights say {size}"]
    return lines


def beside(shapes: Shapes, match: Match) -> tuple[set[str], list[str]]:
    """Tensors next to an encoder's weights that are left out, and a line for each kind of them.

    One more line if these weights are themselves a moving average.
    """
    found = {
        what: [own for own in shapes if name.search(own.removeprefix(match.prefix))] for what, name in _BESIDE.items()
    }
    found["the rest of a larger model"] = sorted(rest_of(shapes, match))
    lines = [
        f"{what} is left out ({listed(names[:SHOWN])}{f' and {len(names) - SHOWN:,} more' if names[SHOWN:] else ''})"
        for what, names in found.items()
        if names
    ]
    if _EMA.search(match.prefix):
        lines.append(f"the encoder used is a moving average of weights ({match.prefix}…)")
    return {name for names in found.values() for name in names}, lines


def differences(wanted: Shapes, found: Shapes, match: Match) -> list[str]:
    """Every tensor that is missing, extra or of the wrong shape, by its own name; empty if all match.

    The same tensor in several blocks is listed once, as `blocks.{0-2,5}.norm1.weight`.
    """
    inside = {name: shape for name, shape in found.items() if name.startswith(match.prefix)}
    shared = set(wanted) & set(inside)
    lines = []
    if missing := set(wanted) - shared:
        lines.append(f"missing {listed(missing)}")
    if extra := set(inside) - shared:
        lines.append(f"extra {listed(extra)}")
    misshaped: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in sorted(shared):
        if tuple(wanted[name]) != tuple(inside[name]):
            misshaped.setdefault((tuple(wanted[name]), tuple(inside[name])), []).append(name)
    if misshaped:
        each = [f"{listed(names)} (wanted {want}, got {got})" for (want, got), names in misshaped.items()]
        lines.append(f"of another shape {', '.join(each)}")
    return lines


def listed(names: Iterable[str]) -> str:
    """All names in one line; names that differ only in the block number share an entry."""
    groups: dict[str, list[int]] = {}
    for name in sorted(names):
        pattern, number = split_number(name)
        groups.setdefault(pattern, []).append(int(number or 0))
    named = (name.replace("{i}", _ranges(numbers)) for name, numbers in groups.items())
    return ", ".join(name if len(name) <= LONGEST else f"{name[:LONGEST]}…" for name in named)


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _foreign_parts(names: Iterable[str]) -> str:
    """Parts of another network among the names, each with its first tensor, as the end of a sentence, or empty."""
    parts: dict[str, str] = {}
    for name in sorted(names):
        for pattern, what in _NOT_AIMV2.items():
            if re.search(pattern, name):
                parts.setdefault(what, name)
    each = " and ".join(f"{what} ({name})" for what, name in parts.items())
    return f", but there is {each}: AIMv2 has none, so this is another network" if parts else ""


def _prefixes(patterns: set[str], rows: tuple[Row, ...]) -> list[str]:
    """Possible prefixes of the encoder: what comes before the names of the patch convolution and the first block."""
    anchors = [row.sources[0] for row in rows if row.target.endswith((PATCH_CONV, "blocks.{i}.norm1.weight"))]
    ends = {name.removesuffix(anchor) for anchor in anchors for name in patterns if name.endswith(anchor)}
    return sorted(prefix for prefix in ends if not prefix or prefix.endswith("."))


def _has(target: str, rows: tuple[Row, ...], prefix: str, patterns: set[str]) -> str:
    """The first tensor whose target name ends like this, if there is one."""
    source = next(prefix + row.sources[0] for row in rows if row.target.endswith(target))
    return source if source in patterns else ""


def _conv_fits(layout: Layout, rows: tuple[Row, ...], prefix: str, shapes: Shapes) -> bool:
    """Tells layouts with equal names apart by the convolution's axes: the kernel is square, the channels are 3."""
    for row in rows:
        shape = shapes.get(prefix + row.sources[0]) if row.target.endswith(PATCH_CONV) else None
        if shape is not None and len(shape) == 4 and shape[1] != shape[3]:
            return (shape[2] == shape[3]) == (row.axes is OIHW)
    return layout.name != "apple-mlx"


def _sizes_of(shapes: Shapes, axes: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The sizes of one encoder; the strict comparison reports a tensor with the wrong number of axes."""
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))]
    found: dict[str, Any] = {"num_hidden_layers": max(blocks) + 1} if blocks else {}
    for name, fields in axes.items():
        if len(shape := shapes.get(name, ())) == len(fields):
            found |= {field: size for field, size in zip(fields, shape, strict=True) if field}
    if "patches" in found:
        side = math.isqrt(found.pop("patches"))
        found |= {"image_size": side * found["patch_size"]} if "patch_size" in found else {}
    return found


def _without(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
