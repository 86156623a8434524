"""`mlx-aimv2 lit`: tunes a text encoder to a frozen image encoder, so that images are found by words."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mlx_aimv2.backend import WIDE_SIGHT, prepared
from mlx_aimv2.cli.flags import MODEL, add_captions, add_resume, add_settings, groups, settings_of
from mlx_aimv2.cli.output import say, show
from mlx_aimv2.config import Aimv2Config
from mlx_aimv2.files import read_json
from mlx_aimv2.loading import load
from mlx_aimv2.pretrain import LitSettings, lit, open_data
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.train.augment import Augmentation

HELP = "tune a text encoder to a frozen image encoder (LiT), to find images by words"

EXAMPLE = "data/ --encoder encoder -o pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = groups(parser, "data", "model", "optimisation", "augmentation", "run", "output")
    add_captions(add["data"])
    add["model"]("--encoder", required=True, metavar="MODEL", help=f"the frozen encoder: {MODEL}")
    sizes = "config.json with text_config and projection_dim (default: Apple's LiT)"
    add["model"]("--config", metavar="FILE", help=sizes)
    add_settings(add, LitSettings, Augmentation)
    add_resume(add["run"])
    add["output"]("-o", "--output", required=True, metavar="DIR", help="folder to write, in Apple's layout")


@prepared(WIDE_SIGHT)  # before the encoder is loaded: MLX reads its width once
def run(arguments: argparse.Namespace) -> int:
    """Trains and writes; losses go to stderr."""
    config = Aimv2Config.from_dict(read_json(Path(arguments.config))) if arguments.config else Aimv2Config()
    settings = settings_of(
        LitSettings,
        arguments,
        text=replace(config.text_config, vocab_size=arguments.vocab_size, eos_token_id=1),
        projection_dim=config.projection_dim,
        augmentation=settings_of(Augmentation, arguments),
    )
    data = open_data(arguments.data)
    tokenizer = Tokenizer.from_folder(Path(arguments.tokenizer)) if arguments.tokenizer else None
    model, processor = load(arguments.encoder, dtype="float32")
    if model.vision is not model:
        say(f"note: of the pair {arguments.encoder} the image encoder alone is used; its text encoder is trained anew")
    lit(
        data,
        model.vision,
        processor,
        arguments.output,
        settings=settings,
        tokenizer=tokenizer,
        resume=arguments.resume,
        report=say,
    )
    show(str(arguments.output))
    return 0
