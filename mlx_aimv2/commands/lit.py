"""`mlx-aimv2 lit`: tunes a text encoder to a frozen image encoder, so that images are found by words."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from mlx_aimv2.cli import say, show
from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.loading import load
from mlx_aimv2.pretrain.augment import Augmentation
from mlx_aimv2.pretrain.captioned import open_data
from mlx_aimv2.pretrain.captions import VOCAB_SIZE
from mlx_aimv2.pretrain.lit import LitSettings, lit
from mlx_aimv2.pretrain.optimise import WEIGHT_DECAY
from mlx_aimv2.safe_read import read_json
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.x86 import widen_sight

HELP = "tune a text encoder to a frozen image encoder (LiT), so that images are found by words"
EXAMPLE = "mlx-aimv2 lit DATA --encoder encoder -o pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("data", metavar="DATA", help="folder with metadata.jsonl (file_name, text), or .tar shards of WebDataset")
    add("--encoder", required=True, metavar="CHECKPOINT", help="the frozen encoder: Hub name, folder or weight file")
    add("-o", "--output", required=True, metavar="PAIR", help="folder to write, in Apple's layout")
    add = parser.add_argument_group("text encoder").add_argument
    add("--config", metavar="FILE", help="config.json with text_config and projection_dim (default: Apple's LiT)")
    add("--vocab-size", type=int, default=VOCAB_SIZE, metavar="N", help="largest vocabulary trained on the captions")
    add("--tokenizer", metavar="FOLDER", help="take this tokenizer instead of training one on the captions")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch", type=int, default=256, metavar="N", help="examples in a step, on all ranks (default: %(default)s)")
    add("--steps", type=int, default=1000, metavar="N", help="updates of the weights (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, metavar="R", help="highest rate (default: %(default)s)")
    add("--warm-up", type=int, metavar="N", help="steps until then (default: a tenth)")
    add("--weight-decay", type=float, default=WEIGHT_DECAY, metavar="W", help="default: %(default)s")
    add = parser.add_argument_group("crops and captions").add_argument
    add("--views", type=int, default=1, metavar="N", help="crops kept of each image, the whole one among them")
    add("--first-caption", type=float, default=0.0, metavar="P", help="how often the first of several captions is read")
    add("--min-area", type=float, default=0.4, metavar="A", help="smallest random crop (default: %(default)s)")
    add("--no-flip", action="store_true", help="mirror no images: for data where left and right differ")
    add("--jitter", type=float, default=0.0, metavar="J", help="change brightness, contrast, saturation by up to J")
    add("--grey", type=float, default=0.0, metavar="P", help="share of crops without colours (default: %(default)s)")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, metavar="N", help="of weights, order and crops (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Trains and writes; losses go to stderr."""
    widen_sight()
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
            seed=arguments.seed,
            augmentation=Augmentation(arguments.min_area, not arguments.no_flip, arguments.jitter, arguments.grey),
        ),
        tokenizer=tokenizer,
        group=Ranks().group,
        report=say,
    )
    show(str(arguments.output))
    return 0
