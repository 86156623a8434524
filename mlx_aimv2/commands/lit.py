"""`mlx-aimv2 lit`: tunes a text encoder to a frozen image encoder, so that images are found by words."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from mlx_aimv2 import x86_training
from mlx_aimv2.cli import say, show
from mlx_aimv2.commands.caption_flags import (
    BATCH,
    DATA,
    add_caption_arguments,
    add_crop_arguments,
    add_schedule_arguments,
    augmentation_of,
)
from mlx_aimv2.commands.flags import MODEL, RESUME, add_seed
from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig
from mlx_aimv2.files import read_json
from mlx_aimv2.loading import load
from mlx_aimv2.pretrain.captioned import open_data
from mlx_aimv2.pretrain.lit_tuning import lit
from mlx_aimv2.pretrain.settings import LitSettings
from mlx_aimv2.tokenizer import Tokenizer

HELP = "tune a text encoder to a frozen image encoder (LiT), to find images by words"

EXAMPLE = "data/ --encoder encoder -o pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument_group("data").add_argument
    add("data", metavar="DATA", help=DATA)
    add_caption_arguments(add)

    add = parser.add_argument_group("model").add_argument
    add("--encoder", required=True, metavar="MODEL", help=f"the frozen encoder: {MODEL}")
    add("--config", metavar="FILE", help="config.json with text_config and projection_dim (default: Apple's LiT)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch", type=int, default=256, metavar="N", help=f"{BATCH} (default: %(default)s)")
    add("--steps", type=int, default=1000, metavar="N", help="updates of the weights (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, metavar="X", help="highest rate (default: %(default)s)")
    add_schedule_arguments(add)

    add = parser.add_argument_group("augmentation").add_argument
    add(
        "--views",
        type=int,
        default=1,
        metavar="N",
        help="crops kept of each image, the whole one among them (default: 1)",
    )
    add_crop_arguments(add)

    add = parser.add_argument_group("run").add_argument
    add_seed(add)
    add("--save-every", type=int, default=500, metavar="N", help="steps between two states (default: %(default)s)")
    add("--resume", action="store_true", help=RESUME)

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", required=True, metavar="DIR", help="folder to write, in Apple's layout")


@x86_training.prepared(x86_training.WIDE_SIGHT)  # before the encoder is loaded: MLX reads its width once
def run(arguments: argparse.Namespace) -> int:
    """Trains and writes; losses go to stderr."""
    data = open_data(arguments.data)
    config = Aimv2Config.from_dict(read_json(Path(arguments.config))) if arguments.config else Aimv2Config()
    text = Aimv2TextConfig(**(asdict(config.text_config) | {"vocab_size": arguments.vocab_size, "eos_token_id": 1}))
    tokenizer = Tokenizer.from_folder(Path(arguments.tokenizer)) if arguments.tokenizer else None
    model, processor = load(arguments.encoder, dtype="float32")
    lit(
        data,
        model.vision,
        processor,
        arguments.output,
        settings=LitSettings(
            text=text,
            projection_dim=config.projection_dim,
            batch=arguments.batch,
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            warm_up=arguments.warm_up,
            weight_decay=arguments.weight_decay,
            views=arguments.views,
            first_caption=arguments.first_caption,
            save_every=arguments.save_every,
            seed=arguments.seed,
            augmentation=augmentation_of(arguments),
        ),
        tokenizer=tokenizer,
        resume=arguments.resume,
        report=say,
    )
    show(str(arguments.output))
    return 0
