"""`mlx-aimv2 pretrain`: trains an encoder from images with captions by the paper's own objective."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_aimv2.cli.flags import add_captions, add_resume, add_settings, groups, settings_of
from mlx_aimv2.cli.output import say, show
from mlx_aimv2.config import WIDTHS, Aimv2VisionConfig
from mlx_aimv2.files import read_json
from mlx_aimv2.pretrain import Settings, open_data, pretrain
from mlx_aimv2.pretrain.objective import DecoderConfig
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.train.augment import Augmentation

HELP = "train an encoder from images with captions, by the paper's objective"

EXAMPLE = "data/ -o encoder --size large --iters 20000 --validation held-out/"

SIZES = ", ".join(WIDTHS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = groups(parser, "data", "what is trained", "optimisation", "augmentation", "run", "output")
    add_captions(add["data"])
    add["data"]("--validation", metavar="DATA", help="held-out data, whose losses are reported")
    of_size = add["what is trained"]
    of_size("--size", default="large", metavar="NAME", help=f"{SIZES}, or a config.json of your own (default: large)")
    of_size("--image-size", type=int, metavar="N", help="side of the images in pixels (default: the size's, 224)")
    of_size("--patch-size", type=int, metavar="N", help="side of a patch in pixels (default: the size's, 14)")
    of_size("--native", action="store_true", help="images of any size, a number of patches for each batch")
    add_settings(add, Settings, Augmentation)
    add_resume(add["run"])
    add["output"]("-o", "--output", required=True, metavar="DIR", help="folder to write, in Apple's layout")


def run(arguments: argparse.Namespace) -> int:
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
    pretrain(
        open_data(arguments.data),
        arguments.output,
        settings=settings,
        validation=open_data(arguments.validation) if arguments.validation else None,
        tokenizer=Tokenizer.from_folder(Path(arguments.tokenizer)) if arguments.tokenizer else None,
        resume=arguments.resume,
        report=say,
    )
    show(str(arguments.output))
    return 0


def sizes(size: str) -> tuple[Aimv2VisionConfig, DecoderConfig]:
    """A released size's name, or a config.json with the encoder's fields and a `decoder_config` of its own."""
    if size in WIDTHS:
        return Aimv2VisionConfig(*WIDTHS[size]), DecoderConfig()
    file = Path(size)
    if not file.is_file():
        raise ValueError(f"--size is {SIZES} or a config.json, got {size}")
    raw: dict[str, Any] = read_json(file)
    section, known = raw.get("decoder_config", {}), DecoderConfig.__dataclass_fields__
    if not isinstance(section, dict) or section.keys() - known:
        raise ValueError(f"{file}: decoder_config has {', '.join(sorted(known))}; got {section}")
    vision = {name: value for name, value in raw.items() if name != "decoder_config"}
    return Aimv2VisionConfig.from_dict({"use_head": False} | vision), DecoderConfig(**section)
