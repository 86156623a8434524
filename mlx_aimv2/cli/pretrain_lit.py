"""`mlx-aimv2 pretrain` trains an encoder by the paper's own objective; `lit` tunes a text encoder to a frozen one.

Both train on images with captions and write a folder in Apple's layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_aimv2.backend import WIDE_SIGHT, prepared
from mlx_aimv2.cli.flags import MODEL, Add, add_resume, add_settings, add_skip_broken, groups, settings_of
from mlx_aimv2.cli.output import begin, say, show
from mlx_aimv2.config import WIDTHS, Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.files import read_json
from mlx_aimv2.loading import load
from mlx_aimv2.pretrain import LitSettings, Settings, lit, open_data, pretrain
from mlx_aimv2.pretrain.data import Data
from mlx_aimv2.pretrain.objective import DecoderConfig
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.train.augment import Augmentation

SIZES = ", ".join(WIDTHS)


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "data", "what is trained", "optimisation", "augmentation", "run", "output")
    _add_captions(add)
    of_size = add["what is trained"]
    of_size("--size", default="large", metavar="NAME", help=f"{SIZES}, or your own config.json (default: large)")
    of_size("--image-size", type=int, metavar="N", help="image side in pixels (default: the size's, 224)")
    of_size("--patch-size", type=int, metavar="N", help="patch side in pixels (default: the size's, 14)")
    of_size("--native", action="store_true", help="images of any size; each batch has its own number of patches")
    add_settings(add, Settings, Augmentation)


def run_pretrain(arguments: argparse.Namespace) -> int:
    """Trains and writes; losses go to stderr."""
    vision, decoder = sizes(arguments.size)
    own = {name: value for name in ("image_size", "patch_size") if (value := getattr(arguments, name)) is not None}
    settings = settings_of(
        Settings,
        arguments,
        vision=replace(vision, **own, is_native=vision.is_native or arguments.native),
        decoder=replace(decoder, vocab_size=arguments.vocab_size),
        augmentation=settings_of(Augmentation, arguments),
    )
    data, tokenizer, shared = _shared(arguments)
    begin("training")
    pretrain(data, arguments.output, settings=settings, tokenizer=tokenizer, **shared)
    show(str(arguments.output))
    return 0


def sizes(size: str) -> tuple[Aimv2VisionConfig, DecoderConfig]:
    """The sizes of a released size's name, or of a config.json with the encoder's fields and a `decoder_config`."""
    if size in WIDTHS:
        return Aimv2VisionConfig(*WIDTHS[size]), DecoderConfig()
    file = Path(size)
    if not file.is_file():
        raise ValueError(f"--size must be {SIZES} or a config.json, got {size}")
    raw: dict[str, Any] = read_json(file)
    section, known = raw.get("decoder_config", {}), DecoderConfig.__dataclass_fields__
    if not isinstance(section, dict) or section.keys() - known:
        raise ValueError(f"{file}: decoder_config may have {', '.join(sorted(known))}; got {section}")
    return Aimv2VisionConfig.from_dict({"use_head": False} | raw), DecoderConfig(**section)


def add_lit(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "data", "model", "optimisation", "augmentation", "run", "output")
    _add_captions(add)
    add["model"]("--encoder", required=True, metavar="MODEL", help=f"the frozen encoder, or a pair: {MODEL}")
    add["model"]("--from-scratch", action="store_true", help="start the text encoder at random, that of a pair too")
    words = "config.json with text_config and projection_dim (default: Apple's LiT)"
    add["model"]("--config", metavar="FILE", help=words)
    add_settings(add, LitSettings, Augmentation)


@prepared(WIDE_SIGHT)  # before the encoder is loaded: MLX reads its width once
def run_lit(arguments: argparse.Namespace) -> int:
    """Trains and writes; losses go to stderr."""
    config = Aimv2Config.from_dict(read_json(Path(arguments.config))) if arguments.config else Aimv2Config()
    settings = settings_of(
        LitSettings,
        arguments,
        text=replace(config.text_config, vocab_size=arguments.vocab_size, eos_token_id=1),
        projection_dim=config.projection_dim,
        augmentation=settings_of(Augmentation, arguments),
    )
    data, tokenizer, shared = _shared(arguments)
    model, processor = load(arguments.encoder, dtype="float32")
    if arguments.from_scratch or model.vision is model:
        model, processor.tokenizer = model.vision, tokenizer
    elif idle := [name for name in ("config", "tokenizer") if getattr(arguments, name) is not None]:
        raise ValueError(f"--{idle[0]} would have no effect on the pair {arguments.encoder}: add --from-scratch")
    elif processor.tokenizer is None:
        raise ValueError(f"{arguments.encoder} has no tokenizer for its text encoder: add --from-scratch")
    else:
        say(f"note: starting from the text encoder of {arguments.encoder} (--from-scratch starts at random)")
    begin("training")
    lit(data, model, processor, arguments.output, settings=settings, **shared)
    show(str(arguments.output))
    return 0


def _add_captions(add: Mapping[str, Add]) -> None:
    """Adds what both verbs take: images with captions, how captions are read, and the folder to write."""
    add["data"](
        "data", metavar="DATA", help="folder with metadata.jsonl or .csv (file_name, text), or WebDataset's .tar"
    )
    words = "held-out data: losses are reported (lit: recall, and the best pair is kept)"
    add["data"]("--validation", metavar="DATA", help=words)
    add_skip_broken(add["data"], default=True)
    words = "maximum size of the vocabulary trained on the captions (default: %(default)s)"
    add["data"]("--vocab-size", type=int, default=Aimv2TextConfig.vocab_size, metavar="N", help=words)
    words = "use this tokenizer instead of training one on the captions"
    add["data"]("--tokenizer", metavar="DIR", help=words)
    add["output"]("-o", "--output", required=True, metavar="DIR", help="folder to write, in Apple's layout")
    add_resume(add["run"])


def _shared(arguments: argparse.Namespace) -> tuple[Data, Tokenizer | None, dict[str, Any]]:
    """The data, the tokenizer if one is given, and the keywords that `pretrain` and `lit` share."""
    begin("scanning")
    data = open_data(arguments.data, skip_broken=arguments.skip_broken)
    held_out = open_data(arguments.validation, skip_broken=arguments.skip_broken) if arguments.validation else None
    tokenizer = Tokenizer.from_folder(Path(arguments.tokenizer)) if arguments.tokenizer else None
    return data, tokenizer, {"validation": held_out, "resume": arguments.resume, "report": say}
