"""Writes the model card of a converted folder: origin, licence, fidelity, and how to use it.

The Hub reads the YAML at its head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_aimv2 import __version__
from mlx_aimv2.config import Aimv2Config, AnyConfig
from mlx_aimv2.conversion.fidelity import rows
from mlx_aimv2.files import read_start

if TYPE_CHECKING:
    from mlx_aimv2.loading import Source

FILE = "README.md"

HEAD_BYTES = 1 << 16
"""Bytes of the source's card that are read."""

LONGEST = 300
"""Maximum length of a licence's name or address."""

LICENCE_KEYS = ("license", "license_name", "license_link")
"""Fields of a card that are copied from the source's card unchanged."""

SCALAR = re.compile(
    rf"""^({"|".join(LICENCE_KEYS)}|base_model):[ \t]+(["']?)([\w./][^"'\\\n]*?)\2[ \t]*(?:[ \t]#.*)?\r?$""",
    re.MULTILINE,
)
"""A field of the source's card whose value is a string on one line, quoted or not: key, quote, value."""

_USE = {
    "vision": """\
from mlx_aimv2 import load

model, processor = load("{name}")
pixels = processor(["photograph.jpg"])
tokens = model(pixels).last_hidden_state  # {tokens}
vector = model.encode_image(pixels, normalize=True)  # (1, {width})
print(tokens.shape, vector.shape)
""",
    "pair": """\
import mlx.core as mx
from mlx_aimv2 import load

model, processor = load("{name}")
pixels = processor(["photograph.jpg"])
ids = processor.tokenize(["a photo of a cat", "a photo of a dog"])
print(mx.softmax(model(pixels, ids).logits_per_image, axis=-1))
""",
    "transformers": """\
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}")
""",
}
"""Code that loads and runs a folder, by its content, or with transformers."""


def write(
    place: Path,
    *,
    source: Source,
    config: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    hub_name: str | None = None,
    layout: str | None = None,
    is_tuned: bool | None = False,
) -> None:
    """Writes README.md into a converted folder, replacing an existing one.

    `config` is the content of the folder's config.json, `report` that of fidelity.json, None if nothing was compared;
    `hub_name` the repository it will be uploaded to, None for a folder that is not; `layout` that of a PyTorch folder;
    `is_tuned` says whether its weights differ from the source's, None if unknown.
    """
    card, origin = source_card(source), source.origin
    name = origin.repo or origin.folder.absolute().name
    title = hub_name.rpartition("/")[2] if hub_name else f"{name} for {'PyTorch' if layout else 'MLX'}"
    link = f"[{name}]({_address(name)})" if origin.repo else name
    at = f" (commit `{origin.commit}`)" if origin.commit else ""
    target = f"a PyTorch folder in the {layout} layout" if layout else "MLX"
    package = "transformers and torch" if layout == "transformers" else "the Python package mlx-aimv2"
    package += ", or Apple's own PyTorch code," if layout == "apple" else ""
    made = {
        None: "loaded, perhaps changed, and saved for",
        True: "fine-tuned and converted to",
        False: "converted to",
    }[is_tuned]
    relation = "finetune" if is_tuned else "quantized" if "quantization" in config else None
    parts = [
        front_matter(_head(place, source, card, is_mlx=layout is None, relation=relation)),
        f"# {title}",
        f"{link}{at}, {made} {target} by mlx-aimv2 {__version__}: {_precision(config)}.",
        f"## Use\n\nWith {package} installed:\n\n```python\n{_snippet(source.config, layout, hub_name)}```",
        _fidelity(report),
        _licence(place, card),
    ]
    (place / FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(head: Mapping[str, Any]) -> str:
    """The front matter of a model card, as YAML that the Hub reads."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**head).to_yaml().strip()}\n---"


def _head(
    place: Path, source: Source, card: Mapping[str, str], *, is_mlx: bool, relation: str | None
) -> dict[str, Any]:
    origin, is_pair = source.origin, isinstance(source.config, Aimv2Config)
    head: dict[str, Any] = {
        "library_name": "mlx" if is_mlx else "transformers",
        "pipeline_tag": "zero-shot-image-classification" if is_pair else "image-feature-extraction",
        "tags": ["mlx", "aimv2", "vision"] if is_mlx else ["aimv2", "vision"],
    }
    if base := origin.repo or card.get("base_model"):
        head["base_model"] = base
        if relation is not None:
            head["base_model_relation"] = relation
    head |= {key: card[key] for key in LICENCE_KEYS if key in card}
    link = head.get("license_link")
    if origin.repo and isinstance(link, str) and "://" not in link and not (place / link).is_file():
        head["license_link"] = f"{_address(origin.repo)}/blob/{origin.commit}/{link}"
    return head


def source_card(source: Source) -> dict[str, str]:
    """The terms and the base model in the front matter of the source's card, if each is one short line.

    It is not parsed as YAML: an untrusted one may expand to any size or create any object.
    """
    try:
        text = read_start(source.origin.folder / FILE, max_bytes=HEAD_BYTES).decode("utf-8-sig", "replace")
    except (OSError, ValueError):
        return {}
    head = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    found: dict[str, str] = {}
    for key, _, value in SCALAR.findall(head[1] if head else ""):
        if len(value) <= LONGEST and value.isprintable() and ": " not in value:
            found.setdefault(key, value)
    return found


def _precision(config: Mapping[str, Any]) -> str:
    if packed := config.get("quantization"):
        own = sum(isinstance(value, Mapping) for value in packed.values())
        return f"quantized, {packed.get('mode', 'affine')}" + (
            f", {own} layers with their own bits" if own else f", {packed.get('bits')} bits"
        )
    return f"dense, {config.get('torch_dtype', 'float32')}"


def _snippet(config: AnyConfig, layout: str | None, name: str | None) -> str:
    """Code that loads and runs the folder, with the resulting shapes."""
    width, count = config.vision.hidden_size, config.vision.num_patches or "tokens"
    code = _USE[layout] if layout in _USE else _USE["pair" if isinstance(config, Aimv2Config) else "vision"]
    return code.format(name=name or "path/to/this/folder", tokens=f"(1, {count}, {width})", width=width)


def _fidelity(report: Mapping[str, Any] | None) -> str:
    title = "## Fidelity"
    if report is None:
        return f"{title}\n\nNot measured."
    lines = [f"| {what} | {value} |" for what, value in rows(report).items()]
    warnings = [f"- {warning}" for warning in report["warnings"]]
    table = "\n".join(["| measured against the source in float32 | |", "|---|---|", *lines])
    return "\n\n".join([title, table, *(["\n".join(warnings)] if warnings else [])])


def _licence(place: Path, card: Mapping[str, str]) -> str:
    name = card.get("license_name") or card.get("license")
    files = sorted(file.name for file in place.iterdir() if file.name.upper().startswith(("LICEN", "NOTICE")))
    terms = f"The weights keep the terms of their source: {name}." if name else "The source's card names no licence."
    return f"## Licence\n\n{terms}" + (f" See {', '.join(files)}." if files else "")


def _address(repo: str) -> str:
    return f"https://huggingface.co/{repo}"
