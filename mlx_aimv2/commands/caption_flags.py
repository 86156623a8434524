"""The flags that pretrain and lit share: data with captions, the schedule of the learning rate, random crops."""

from __future__ import annotations

import argparse

from mlx_aimv2.commands.flags import Add
from mlx_aimv2.pretrain.settings import WEIGHT_DECAY
from mlx_aimv2.tokenizer import VOCAB_SIZE
from mlx_aimv2.train.augment import Augmentation

DATA = "folder with metadata.jsonl (file_name, text), or .tar shards of WebDataset"

BATCH = "examples in a step, on all ranks"


def add_caption_arguments(add: Add) -> None:
    """Adds --vocab-size, --tokenizer and --first-caption."""
    add(
        "--vocab-size",
        type=int,
        default=VOCAB_SIZE,
        metavar="N",
        help="largest vocabulary trained on the captions (default: %(default)s)",
    )
    add("--tokenizer", metavar="DIR", help="take this tokenizer instead of training one on the captions")
    add(
        "--first-caption",
        type=float,
        default=0.0,
        metavar="X",
        help="how often the first of several captions is read (default: %(default)s)",
    )


def add_schedule_arguments(add: Add) -> None:
    """Adds --warm-up and --weight-decay."""
    add("--warm-up", type=int, metavar="N", help="steps until the highest rate (default: a tenth of all)")
    add("--weight-decay", type=float, default=WEIGHT_DECAY, metavar="X", help="of AdamW (default: %(default)s)")


def add_crop_arguments(add: Add) -> None:
    """Adds --min-area, --no-flip, --jitter and --grey."""
    add("--min-area", type=float, default=0.4, metavar="X", help="smallest random crop (default: %(default)s)")
    add("--no-flip", action="store_true", help="mirror no images: for data where left and right differ")
    add(
        "--jitter",
        type=float,
        default=0.0,
        metavar="X",
        help="change brightness, contrast, saturation by up to X (default: %(default)s)",
    )
    add("--grey", type=float, default=0.0, metavar="X", help="share of crops without colours (default: %(default)s)")


def augmentation_of(arguments: argparse.Namespace) -> Augmentation:
    """What the flags say of random crops."""
    return Augmentation(arguments.min_area, not arguments.no_flip, arguments.jitter, arguments.grey)
