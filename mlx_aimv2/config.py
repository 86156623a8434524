"""Sizes of the models with Hugging Face's field names, every format of config.json, the table of released checkpoints.

config.json comes in five formats: Apple's (`max_context_length`, `use_bias`, no `image_size` for native), transformers'
(`is_native`, `max_position_embeddings`), timm's (`architecture`, `pretrained_cfg`), that of the vision-language models
that hold an AIMv2 encoder (Ovis2), and the one this package writes, which is transformers'. One parser reads them all.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes that weights may have."""

MAX_SIZE = 1 << 24
"""Far above any real size of a network; a config.json that says more is damaged."""

LIT_CHECKPOINT = "apple/aimv2-large-patch14-224-lit"

_NO_BIASES = {"qkv_bias": False, "mlp_bias": False}

_FIXED = (
    (("qkv_bias", "mlp_bias", "use_bias"), (None, False), "AIMv2's blocks have no biases"),
    # From encoders that keep AIMv2's tensors and add rotary positions or windows, which no tensor shows (AndesVL).
    (
        ("disable_rope", "preserve_original_pe", "fullatt_block_indexes", "rope_theta"),
        (None,),
        "AIMv2 has neither rotary positions nor windows",
    ),
    (("hidden_act",), (None, "silu"), "AIMv2 uses silu"),
)
"""Keys of config.json, the values they may have in AIMv2, and why."""

APPLE_NAMES = {"max_context_length": "max_position_embeddings"}
"""Apple's name of a field -> Hugging Face's."""

_TIMM_ARGUMENTS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
}

_HEAD_DIM = 128
"""Width of the heads in every released AIMv2 encoder, image or text; timm's config.json does not say it."""


@dataclass(frozen=True)
class Aimv2VisionConfig:
    """Sizes of a vision encoder; the defaults are aimv2-large-patch14-224.

    `image_size` is the side of the square images in pixels, None for native checkpoints (`is_native`), which take any
    size of at least one patch. `use_head`: an attention-pooling head follows the final norm (LiT only).
    """

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    num_channels: int = 3
    image_size: int | None = 224
    patch_size: int = 14
    rms_norm_eps: float = 1e-5
    is_native: bool = False
    use_head: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.is_native:
            object.__setattr__(self, "image_size", None)  # a native model has no size of its own
            if self.hidden_size % 4:
                raise ValueError(f"a native model's hidden_size is a multiple of 4, got {self.hidden_size}")
        elif self.image_size is None or self.image_size < self.patch_size:
            raise ValueError(
                f"image_size must be at least one patch of {self.patch_size} pixels, got {self.image_size}"
            )

    @property
    def vision(self) -> Aimv2VisionConfig:
        """The sizes themselves, under the same name as in a pair's configuration."""
        return self

    @property
    def num_patches(self) -> int | None:
        """Tokens per image; None for native checkpoints, where it depends on the image."""
        return None if self.image_size is None else (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], found: Mapping[str, Any] | None = None) -> Aimv2VisionConfig:
        """Sizes from the content of a config.json in any format: `{key: value} -> config`.

        For a larger model the image encoder's section is read. Unknown keys are ignored. `found` are the sizes that the
        tensors show, since no format says reliably whether there is a head or a position table. Without tensors (None)
        `use_head` is True by default as in transformers, but False in Apple's format, which does not have it. Raises
        ValueError for a network other than AIMv2 (biases in the blocks, another activation, rotary positions).
        """
        section = _vision_section(raw, found or {})
        is_apple = raw.get("model_type") == "aimv2" and "vision_config" not in raw
        sizes = dict(found or {})
        has_table = "image_size" in sizes
        if "is_native" not in section:  # Apple's format: native has neither a size nor a position table
            section["is_native"] = section.get("image_size") is None and (is_apple if found is None else not has_table)
        if section["is_native"] and has_table:
            raise ValueError("config.json says is_native, yet the weights hold a position table (pos_embed)")
        said = {"use_head": not is_apple} | _read_fields(cls, section)
        if found is not None:
            said["use_head"] = sizes["use_head"]
        return cls(**_with_heads(sizes | said))

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json in transformers' format."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return {"model_type": "aimv2_vision_model", "hidden_act": "silu", **_NO_BIASES, **values}


@dataclass(frozen=True)
class Aimv2TextConfig:
    """Sizes of LiT's text encoder; the defaults are aimv2-large-patch14-224-lit."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} does not fit a vocabulary of {self.vocab_size}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], found: Mapping[str, Any] | None = None) -> Aimv2TextConfig:
        """Sizes from the content of a config.json or of its `text_config`, as of `Aimv2VisionConfig`."""
        return cls(**_with_heads(dict(found or {}) | _read_fields(cls, _section(raw, "text_config"))))

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` of config.json in transformers' format."""
        return {"model_type": "aimv2_text_model", "hidden_act": "silu", **_NO_BIASES, **asdict(self)}


@dataclass(frozen=True)
class Aimv2Config:
    """Sizes of the LiT model: its vision encoder, its text encoder and the width of their shared space."""

    vision_config: Aimv2VisionConfig = field(default_factory=lambda: Aimv2VisionConfig(use_head=True))
    text_config: Aimv2TextConfig = field(default_factory=Aimv2TextConfig)
    projection_dim: int = 768
    max_logit_scale: float = 100.0

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def vision(self) -> Aimv2VisionConfig:
        """Sizes of the vision encoder."""
        return self.vision_config

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], found: Mapping[str, Any] | None = None) -> Aimv2Config:
        """Sizes from the content of a LiT model's config.json, as of `Aimv2VisionConfig`; the head is always there."""
        found = found or {"vision_config": {"use_head": True}}
        said = _read_fields(cls, {key: raw[key] for key in ("projection_dim", "max_logit_scale") if key in raw})
        if "projection_dim" in found:
            said.setdefault("projection_dim", found["projection_dim"])
        section = {"vision_config": _section(raw, "vision_config")}
        vision = Aimv2VisionConfig.from_dict(section, found["vision_config"])
        return cls(vision, Aimv2TextConfig.from_dict(raw, found.get("text_config")), **said)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json in transformers' format."""
        return {
            "model_type": "aimv2",
            "projection_dim": self.projection_dim,
            "max_logit_scale": self.max_logit_scale,
            "vision_config": self.vision_config.to_dict(),
            "text_config": self.text_config.to_dict(),
        }


AnyConfig = Aimv2VisionConfig | Aimv2Config


def megabytes(count: float) -> str:
    """Bytes as text, `1.24 GB` or `4.33 MB`."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def dtype_name(dtype: object) -> str:
    """The name of an mlx dtype in config.json and flags: `mlx.core.float16 -> float16`."""
    return str(dtype).rpartition(".")[2]


def _vision_section(raw: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The section with the image encoder's sizes, in Hugging Face's names; empty for a language model's file.

    It is in a known place, or is the section that gives the sizes `found` in the tensors.
    """
    if isinstance(tokenizer := raw.get("visual_tokenizer_config"), Mapping) and "backbone_config" in tokenizer:  # Ovis2
        return _section(tokenizer, "backbone_config")
    if isinstance(raw.get("vision_config"), Mapping):  # transformers' pairs and its vision-language models
        return {"is_native": False, "image_size": found.get("image_size", 224), **raw["vision_config"]}
    if not isinstance(timm := raw.get("pretrained_cfg"), Mapping):
        sizes = {name: found[name] for name in ("hidden_size", "num_hidden_layers") if name in found}
        parts = [part for part in (raw, *raw.values()) if isinstance(part, Mapping) and "hidden_size" in part]
        of_images = [part for part in parts if "vocab_size" not in part or "patch_size" in part]
        fitting = (part for part in of_images if sizes and sizes.items() <= part.items())
        is_larger = found and (len(of_images) < len(parts) or parts[1:] or "mm_vision_tower" in raw)
        return dict(next(fitting, {} if is_larger else raw))
    section: dict[str, Any] = {"is_native": False}
    size = timm.get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3:
        section["image_size"] = list(size[1:])
    arguments = raw.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"config.json: model_args must be an object, got {arguments!r:.80}")
    return section | {_TIMM_ARGUMENTS[key]: value for key, value in arguments.items() if key in _TIMM_ARGUMENTS}


def _section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section of config.json, or all of it if there is none. Raises ValueError if the section is not an object."""
    section = raw.get(key, raw)
    if not isinstance(section, Mapping):
        raise ValueError(f"config.json: {key} must be an object, got {section!r:.80}")
    return dict(section)


def _with_heads(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes with the number of heads, derived from the width if not given."""
    if "num_attention_heads" in sizes or "hidden_size" not in sizes:
        return sizes
    if sizes["hidden_size"] % _HEAD_DIM:
        raise ValueError(
            f"config.json has no num_attention_heads, and hidden_size {sizes['hidden_size']:,} "
            f"is not a multiple of the released head width {_HEAD_DIM}: add num_attention_heads to config.json (for "
            'a larger model as "vision_config": {"num_attention_heads": …})'
        )
    return sizes | {"num_attention_heads": sizes["hidden_size"] // _HEAD_DIM}


def _read_fields(kind: type[Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration class found in a section of config.json, checked: `-> {field: value}`.

    Raises ValueError for a value of the wrong type and for a network other than AIMv2.
    """
    for keys, allowed, reason in _FIXED:
        if on := [key for key in keys if section.get(key) not in allowed]:
            raise ValueError(f"config.json says {on[0]}: {section[on[0]]!r:.80}; {reason}, so this is another network")
    types = {f.name: str(f.type) for f in fields(kind)}
    named = {APPLE_NAMES.get(key, key): value for key, value in section.items()}
    found = {name: _checked(name, named[name], types[name]) for name in types if named.get(name) is not None}
    return found | ({"image_size": None} if section.get("is_native") else {})


def _checked(name: str, value: Any, kind: str) -> Any:
    if isinstance(value, list | tuple):  # [224, 224], or several end-of-text ids of which the first counts
        if not value or not (name == "eos_token_id" or all(number == value[0] for number in value)):
            raise ValueError(f"config.json: {name} must be a number or equal numbers, got {value!r:.80}")
        value = value[0]
    kind = kind.split(" ")[0]  # "int | None"
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind:
        raise ValueError(f"config.json: {name} must be of type {kind}, got {value!r:.80}")
    return value


def _check_sizes(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        minimum = 0 if f.name == "eos_token_id" else 1
        if type(value) is int and not minimum <= value < MAX_SIZE:
            raise ValueError(f"{f.name} must be from {minimum} to {MAX_SIZE:,}, got {value:.6g}")
        if isinstance(value, float) and not 0 < value < MAX_SIZE:  # false for NaN too
            raise ValueError(f"{f.name} must be a positive number, got {value!s:.80}")
    if getattr(config, "rms_norm_eps", 0) >= 1:
        raise ValueError(f"rms_norm_eps must be far below 1, got {config.rms_norm_eps}")
    if not isinstance(config, Aimv2Config) and config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} does not divide into {config.num_attention_heads} attention heads"
        )


@dataclass(frozen=True)
class Released:
    """A released checkpoint: its repository `apple/<name>`, Apple's commit, its sizes and its number of parameters."""

    commit: str
    config: AnyConfig
    parameters: int


WIDTHS = {
    "large": (1024, 2816, 24, 8),
    "huge": (1536, 4096, 24, 12),
    "1B": (2048, 5632, 24, 16),
    "3B": (3072, 8192, 24, 24),
}
"""Size -> hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (arXiv 2411.14402, table 1)."""


def _config_of(name: str) -> AnyConfig:
    size, _, resolution, *kind = name.split("-")
    if resolution == "native":
        return Aimv2VisionConfig(*WIDTHS[size], is_native=True)
    if kind == ["lit"]:
        return Aimv2Config(Aimv2VisionConfig(*WIDTHS[size], use_head=True))
    return Aimv2VisionConfig(*WIDTHS[size], image_size=int(resolution))


# Commits: ml-aim's own table; they hold Apple's layout. Parameters: counted on the original classes.
RELEASED = {
    f"aimv2-{name}": Released(commit, _config_of(name), parameters)
    for name, commit, parameters in (
        ("large-patch14-224", "ac764a25c832c7dc5e11871daa588e98e3cdbfb7", 309_197_824),
        ("huge-patch14-224", "9e0bab0e0abb7b20796d2d0b37f39b7c3b1c1af1", 680_851_968),
        ("1B-patch14-224", "4d24a422f71e87d327d476bc405030fe6593d8b1", 1_234_958_336),
        ("3B-patch14-224", "df1cbc288096c9742ec8bd6709ff82757972338c", 2_720_658_432),
        ("large-patch14-336", "639423ae9f07319d24a7fc431b61908110d08d3a", 309_525_504),
        ("huge-patch14-336", "21528bd53a2438a84162e79f1f9a46453b88004c", 681_343_488),
        ("1B-patch14-336", "5a15f23f6757776fdd487283353a018677621939", 1_235_613_696),
        ("3B-patch14-336", "d1adb39ee92dfd7ecf3114b1ee3aa7e9027ce98f", 2_721_641_472),
        ("large-patch14-448", "cefb13f21003bdadba65bfbee956c82b976cd23d", 309_984_256),
        ("huge-patch14-448", "44e6440a24a8ea966ad0deadf5399a22d852bcc0", 682_031_616),
        ("1B-patch14-448", "7f292735d3a07a911559c0fabb3ad3e9d141713f", 1_236_531_200),
        ("3B-patch14-448", "70810b618e4456b724bacc8ef4d2d038060ceda6", 2_723_017_728),
        ("large-patch14-224-distilled", "d6d09b071e8ba31735c5e05ccd4b2a393020ce90", 309_197_824),
        ("large-patch14-336-distilled", "8fe1704e5cc1c80cefc99c194afcefe21dff1faa", 309_525_504),
        ("large-patch14-native", "cfe7bdbbc924a5f65272d5e2c27fe5f61771a629", 308_935_680),
        ("large-patch14-224-lit", "c2cd59a786c4c06f39d199c50d08cc2eab9f8605", 436_680_193),
    )
}
"""Every public checkpoint by its repository name under `apple/`."""


def near_release(name: str) -> str:
    """`; did you mean apple/…?` for a near miss of a released checkpoint's name, else nothing."""
    names = [f"apple/{known}" for known in RELEASED]
    near = difflib.get_close_matches(f"apple/{name.removeprefix('apple/')}", names, n=1)
    return f"; did you mean {near[0]}?" if near and name not in names else ""


def released(name: str) -> Released:
    """The released checkpoint of a name such as `large-patch14-224`; `apple/`, `aimv2-` and `-patch14` may be left out.

    Raises ValueError with the available names.
    """

    def short(name: str) -> str:
        return name.removeprefix("apple/").removeprefix("aimv2-").replace("-patch14", "")

    for known, checkpoint in RELEASED.items():
        if short(known) == short(name):
            return checkpoint
    raise ValueError(f"no released checkpoint is called {name}; there are {', '.join(RELEASED)}")
