"""Reads from a checkpoint's own files what must happen to an image before the model sees it.

preprocessor_config.json  }
processor_config.json     } -> Preprocessing -> processor.py
config.json (timm's)      }
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_aimv2.files import read_json

if TYPE_CHECKING:
    from mlx_aimv2.config import Aimv2VisionConfig

# Apple publishes CLIP's numbers with every checkpoint; the example in their README has ImageNet's.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow's filters by their numbers, which preprocessor_config.json stores; timm stores the names.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

CLIP_SIDE = 224

STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")

# What CLIPImageProcessor assumes for a field its file leaves out.
CLIP_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": CLIP_SIDE},
    "resample": RESAMPLE["bicubic"],
    "do_center_crop": True,
    "crop_size": {"height": CLIP_SIDE, "width": CLIP_SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}

CLIP = "CLIPImageProcessor"

_SQUASH = CLIP_DEFAULTS | {"size": {"height": 384, "width": 384}, "do_center_crop": False}
_HALF = {"size": {"height": CLIP_SIDE, "width": CLIP_SIDE}, "image_mean": 0.5, "image_std": 0.5}

PROCESSORS: dict[str, dict[str, Any]] = {
    CLIP: CLIP_DEFAULTS,
    "CLIPFeatureExtractor": CLIP_DEFAULTS,
    "BitImageProcessor": CLIP_DEFAULTS,
    "SiglipImageProcessor": _SQUASH | _HALF,
    "ViTImageProcessor": _SQUASH | _HALF | {"resample": RESAMPLE["bilinear"]},
    # Those of vision-language models: the view of the whole image, beside which they take its tiles.
    "Ovis2ImageProcessor": _SQUASH | {"crop_to_patches": True},
    "LlavaNextImageProcessor": _SQUASH | {"do_pad": True},
    "LlavaOnevisionImageProcessor": _SQUASH | {"do_pad": True},
    "SAILVLImageProcessor": _SQUASH | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
}
"""Image processors that are followed, and what each assumes for a field that its file leaves out."""

MODELS = {
    "ovis": "Ovis2ImageProcessor",
    "ovis2": "Ovis2ImageProcessor",
    "sailvl": "SAILVLImageProcessor",
    "internvl_chat": "SAILVLImageProcessor",
}
"""model_type of a vision-language model -> the processor that does what its own code does where no file says it."""

REMEDY = (
    f"put the preprocessor_config.json of a {CLIP} there that does the same (size, crop_size, image_mean, image_std)"
)

# Steps of other image processors: one that is switched on changes the pixels, so it cannot be skipped.
UNSUPPORTED_STEPS = (
    *("do_pad", "do_thumbnail", "do_align_long_axis", "do_reduce_labels", "do_flip_channel_order"),
    *("crop_to_patches", "use_square_size"),
)

LARGEST_SIDE = 16384
"""Pixels of a side that a file may ask for: more is a mistake in the file, not an image that is too small."""

LARGEST_NUMBER = 1e6
"""What pixels may be scaled by, and one over it: beyond, float32 pixels are all alike or not finite."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The steps from an RGB image to pixels, in this order; None means that a step is not taken."""

    resize: int | tuple[int, int] | None
    """The shortest edge (the longer one follows), or (height, width) whatever the shape."""
    crop: tuple[int, int] | None
    """(height, width) cut from the centre; where the image is smaller, black is added."""
    resample: int = RESAMPLE["bicubic"]
    """Pillow's number of the filter."""
    rescale_factor: float | None = 1 / 255
    image_mean: tuple[float, float, float] | None = CLIP_MEAN
    image_std: tuple[float, float, float] | None = CLIP_STD

    @property
    def final_size(self) -> tuple[int, int] | None:
        """(height, width) of every result, or None where it follows the image."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else None


def published(image_size: int | None) -> Preprocessing:
    """Apple's own preprocessing: `image_size` of a fixed checkpoint, or None for the native one."""
    if image_size is None:
        return Preprocessing(resize=None, crop=None)
    return Preprocessing(resize=image_size, crop=(image_size, image_size))


def read_preprocessing(folder: Path, *, config: Aimv2VisionConfig | None = None) -> Preprocessing:
    """What the files in `folder` say; where none does, what is known of the model, or Apple's for `config`: a note.

    Raises ValueError for an image processor that is not known, whose code would have to be run.
    """
    size = config.image_size if config else None
    fields, file = _fields(folder)
    if fields is not None:
        steps = from_processor(fields, file)
        is_open = _kind(fields) in MODELS.values() and not fields.keys() & {"size", "image_size"}
        if not size or (steps.final_size and not is_open):
            return steps
    about = _read_json(folder / "config.json") or {}
    kind = MODELS.get(str(about.get("model_type")))
    if fields is not None:  # Ovis2's own file gives the shortest edge, and its code makes the square
        return replace(steps, resize=(size, size)) if size and (kind or is_open) else steps
    if isinstance(timm := about.get("pretrained_cfg"), dict) and "input_size" in timm:
        return from_timm(timm, folder / "config.json")
    if config is None:
        raise FileNotFoundError(f"{folder} has no preprocessor_config.json")
    shape = str(about.get("image_aspect_ratio") or "square")  # LLaVA's
    if shape.startswith("anyres"):
        kind = "Ovis2ImageProcessor"
    elif shape != "square":
        raise ValueError(f"{folder}: config.json says image_aspect_ratio: {shape:.60}, which is not followed; {REMEDY}")
    kept = "images keep their size" if size is None else f"shortest edge to {size}, centre crop {size}x{size}"
    steps, how = published(size), f"Apple's checkpoints ({kept}, CLIP mean and std)"
    if kind and size:
        steps = replace(from_processor({"image_processor_type": kind}, folder), resize=(size, size))
        how = f"{kind} ({size}x{size} whatever the shape)"
    warnings.warn(f"{folder} has no preprocessor_config.json; images are prepared as for {how}", stacklevel=3)
    return steps


def is_clips(folder: Path, steps: Preprocessing) -> bool:
    """Whether the files in a folder say these very steps in CLIPImageProcessor's words, which every reader knows."""
    fields, file = _fields(folder)
    return fields is not None and _kind(fields) == CLIP and from_processor(fields, file) == steps


def _fields(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """The content of preprocessor_config.json, or of the part of processor_config.json that stands for it."""
    file = folder / "preprocessor_config.json"
    if (fields := _read_json(file)) is None:
        file = folder / "processor_config.json"
        fields = (_read_json(file) or {}).get("image_processor")
        if not isinstance(fields, (dict, type(None))):
            raise ValueError(f"{file}: image_processor must be a JSON object, not {fields!r:.60}")
    return fields, file


def _kind(fields: dict[str, Any]) -> str:
    """The class that a file is for; without a name CLIP's, unless the file is in no form of CLIP's."""
    remote = fields.get("auto_map")
    named = remote.get("AutoImageProcessor") if isinstance(remote, dict) else None
    named = next(filter(None, named), None) if isinstance(named, list) else named  # of several the slow one is first
    named = named or fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if named is None:
        return "code of its own (auto_map)" if remote else CLIP
    return str(named).rpartition(".")[2].removesuffix("Fast").removesuffix("Pil")


def from_processor(fields: dict[str, Any], file: Path) -> Preprocessing:
    """preprocessor_config.json of one of `PROCESSORS`, sizes as numbers or dictionaries."""
    kind = _kind(fields)
    if kind != "SAILVLImageProcessor" and "image_size" in fields and "size" not in fields:
        kind = "image_size and says no size"
    if (defaults := PROCESSORS.get(kind)) is None:
        shown = kind if kind.isprintable() else repr(kind)
        raise ValueError(f"{file} asks for {shown:.80}, which is not followed; {REMEDY}")
    for step in UNSUPPORTED_STEPS:
        if fields.get(step) and step not in defaults:
            raise ValueError(f"{file}: {step} is set, which is no step of {kind}'s; set it to false")
    # A field that is null is not said, so its default counts; transformers 5.24 leaves such a step out.
    fields = {name: value for name, value in fields.items() if value is not None}
    fields = defaults | ({"size": fields["image_size"]} if "image_size" in fields else {}) | fields
    for step in STEPS:
        if not isinstance(fields[step], bool):
            raise ValueError(f"{file}: {step} must be true or false, not {fields[step]!r:.80}")
    scale = _number(fields["rescale_factor"], "rescale_factor", file, above_zero=True) if fields["do_rescale"] else None
    crop = _size(fields["crop_size"], "crop_size", file) if fields["do_center_crop"] else None
    resize = _size(fields["size"], "size", file) if fields["do_resize"] else None
    is_square = fields.get("default_to_square") and not isinstance(fields["size"], dict)
    if isinstance(resize, int) and (is_square or not defaults["do_center_crop"]):
        resize = (resize, resize)
    return Preprocessing(
        resize=resize,
        crop=(crop, crop) if isinstance(crop, int) else crop,
        resample=_resample(fields["resample"], "resample", file),
        rescale_factor=scale,
        image_mean=_three(fields["image_mean"], "image_mean", file) if fields["do_normalize"] else None,
        image_std=_three(fields["image_std"], "image_std", file, above_zero=True) if fields["do_normalize"] else None,
    )


def from_timm(fields: dict[str, Any], file: Path) -> Preprocessing:
    """timm's `pretrained_cfg`: resize to input_size / crop_pct, then crop input_size from the centre."""
    shape = fields["input_size"]
    if not (isinstance(shape, list) and len(shape) == 3 and shape[0] == 3):
        raise ValueError(f"{file}: input_size must be [3, height, width], not {shape!r:.80}")
    height, width = (_pixels(n, "input_size", file) for n in shape[1:])
    share = _number(fields.get("crop_pct") or 1.0, "crop_pct", file)
    if not 0 < share <= 1:
        raise ValueError(f"{file}: crop_pct must be above 0 and at most 1, not {share}")
    tall, wide = (_pixels(math.floor(side / share), "input_size / crop_pct", file) for side in (height, width))
    mode = fields.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(f"{file}: crop_mode must be center or squash, not {mode!r:.80}")
    if mode == "center" and height != width:
        raise ValueError(f"{file}: crop_mode center with an input_size that is not square ({height}x{width})")
    return Preprocessing(
        resize=tall if mode == "center" else (tall, wide),
        crop=(height, width),
        resample=_resample(fields.get("interpolation") or "bicubic", "interpolation", file),
        image_mean=_three(fields.get("mean", list(CLIP_MEAN)), "mean", file),
        image_std=_three(fields.get("std", list(CLIP_STD)), "std", file, above_zero=True),
    )


def to_clip(preprocessing: Preprocessing) -> dict[str, Any]:
    """The same in CLIPImageProcessor's format, for preprocessor_config.json."""
    size, final = preprocessing.resize, preprocessing.final_size
    return {
        "crop_size": {"height": final[0], "width": final[1]} if final else CLIP_DEFAULTS["crop_size"],
        "do_center_crop": preprocessing.crop is not None,
        "do_convert_rgb": True,
        "do_normalize": preprocessing.image_mean is not None,
        "do_rescale": preprocessing.rescale_factor is not None,
        "do_resize": size is not None,
        "image_mean": list(preprocessing.image_mean or CLIP_MEAN),
        "image_processor_type": CLIP,
        "image_std": list(preprocessing.image_std or CLIP_STD),
        "resample": preprocessing.resample,
        "rescale_factor": preprocessing.rescale_factor or 1 / 255,
        "size": {"height": size[0], "width": size[1]} if isinstance(size, tuple) else {"shortest_edge": size or 224},
    }


def _read_json(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.exists() else None


def _pixels(value: object, name: str, file: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIDE:
        raise ValueError(f"{file}: {name} must be in whole pixels from 1 to {LARGEST_SIDE}, not {value!r:.60}")
    return value


def _size(value: object, name: str, file: Path) -> int | tuple[int, int]:
    if isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, dict):
        return _pixels(value, name, file)
    given = {key: _pixels(side, f"{name}.{key:.40}", file) for key, side in value.items() if side is not None}
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    raise ValueError(f"{file}: {name} must be a number, {{shortest_edge}} or {{height, width}}, not {value!r:.80}")


def _resample(value: object, name: str, file: Path) -> int:
    number = RESAMPLE.get(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int) or number not in RESAMPLE.values():
        known = ", ".join(f"{name} ({number})" for name, number in RESAMPLE.items())
        raise ValueError(f"{file}: {name} must be one of {known}, not {value!r:.80}")
    return number


def _number(value: object, name: str, file: Path, *, above_zero: bool = False) -> float:
    low = 1 / LARGEST_NUMBER if above_zero else -LARGEST_NUMBER
    # NaN is below and above nothing.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= LARGEST_NUMBER:
        raise ValueError(f"{file}: {name} must be a number from {low:g} to {LARGEST_NUMBER:g}, not {value!r:.60}")
    return float(value)


def _three(value: object, name: str, file: Path, *, above_zero: bool = False) -> tuple[float, float, float]:
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"{file}: {name} must be three numbers, one each for red, green and blue, not {value!r:.80}")
    red, green, blue = (_number(number, name, file, above_zero=above_zero) for number in values)
    return red, green, blue
