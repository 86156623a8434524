"""`mlx-aimv2 pretrain`: trains an encoder from images with captions by the paper's own objective."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2.cli import say, show
from mlx_aimv2.commands.caption_flags import (
    BATCH,
    DATA,
    add_caption_arguments,
    add_crop_arguments,
    add_schedule_arguments,
    augmentation_of,
)
from mlx_aimv2.commands.flags import DTYPE, RESUME, add_seed
from mlx_aimv2.config import DTYPES, WIDTHS, Aimv2VisionConfig
from mlx_aimv2.device import AUTO
from mlx_aimv2.files import read_json
from mlx_aimv2.pretrain.captioned import open_data
from mlx_aimv2.pretrain.examples import PATCHES
from mlx_aimv2.pretrain.objective import ALPHA, DecoderConfig
from mlx_aimv2.pretrain.pretraining import pretrain
from mlx_aimv2.pretrain.settings import Schedule, Settings
from mlx_aimv2.tokenizer import Tokenizer

HELP = "train an encoder from images with captions, by the paper's objective"

EXAMPLE = "data/ -o encoder --size large --steps 20000 --validation held-out/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument_group("data").add_argument
    add("data", metavar="DATA", help=DATA)
    add("--validation", metavar="DATA", help="held-out data, whose losses are reported")
    add_caption_arguments(add)

    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--size",
        default="large",
        metavar="NAME",
        help=f"{', '.join(WIDTHS)}, or a config.json of your own (default: %(default)s)",
    )
    add("--image-size", type=int, metavar="N", help="side of the images in pixels (default: the size's, 224)")
    add("--patch-size", type=int, metavar="N", help="side of a patch in pixels (default: the size's, 14)")
    add("--native", action="store_true", help="images of any size, a number of patches for each batch")
    add(
        "--patches",
        type=int,
        nargs=2,
        default=PATCHES,
        metavar="N",
        help="with --native: least and most (default: 128 4096)",
    )
    add("--start", metavar="MODEL", help="go on from an earlier result, at another --image-size for example")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch", type=int, default=64, metavar="N", help=f"{BATCH} (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="compute a batch in N parts (default: %(default)s)")
    add("--steps", type=int, default=1000, metavar="N", help="updates of the weights (default: %(default)s)")
    add(
        "--learning-rate",
        type=float,
        metavar="X",
        help="highest rate (default: the paper's times the root of batch / 8192)",
    )
    add_schedule_arguments(add)
    add("--alpha", type=float, default=ALPHA, metavar="X", help="weight of the image loss (default: %(default)s)")
    add(
        "--dtype",
        choices=[*DTYPES, AUTO],
        default=AUTO,
        metavar="NAME",
        help=f"{DTYPE} (default: auto, bfloat16 on a GPU)",
    )

    add_crop_arguments(parser.add_argument_group("augmentation").add_argument)

    add = parser.add_argument_group("run").add_argument
    add_seed(add)
    add("--validate-every", type=int, default=500, metavar="N", help="steps between validations (default: %(default)s)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between two states (default: %(default)s)")
    add(
        "--samples-every",
        type=int,
        default=1000,
        metavar="N",
        help="steps between images of predicted patches (default: %(default)s)",
    )
    add("--resume", action="store_true", help=RESUME)

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", required=True, metavar="DIR", help="folder to write, in Apple's layout")


def run(arguments: argparse.Namespace) -> int:
    """Trains and writes; losses go to stderr."""
    data = open_data(arguments.data)
    validation = open_data(arguments.validation) if arguments.validation else None
    tokenizer = Tokenizer.from_folder(Path(arguments.tokenizer)) if arguments.tokenizer else None
    pretrain(
        data,
        arguments.output,
        settings=settings_of(arguments),
        validation=validation,
        schedule=Schedule(
            validate=arguments.validate_every, save=arguments.save_every, samples=arguments.samples_every
        ),
        tokenizer=tokenizer,
        resume=arguments.resume,
        report=say,
    )
    show(str(arguments.output))
    return 0


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The flags as settings."""
    vision, decoder = sizes(arguments.size)
    own = {"image_size": arguments.image_size, "patch_size": arguments.patch_size}
    vision = Aimv2VisionConfig(**(asdict(vision) | {name: value for name, value in own.items() if value is not None}))
    vision = replace(vision, is_native=True) if arguments.native else vision
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = ("bfloat16" if on_gpu else "float32") if arguments.dtype == AUTO else arguments.dtype
    return Settings(
        vision=vision,
        decoder=DecoderConfig(**(asdict(decoder) | {"vocab_size": arguments.vocab_size})),
        batch=arguments.batch,
        accumulate=arguments.accumulate,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        warm_up=arguments.warm_up,
        weight_decay=arguments.weight_decay,
        alpha=arguments.alpha,
        seed=arguments.seed,
        dtype=dtype,
        patches=tuple(arguments.patches),
        start=arguments.start,
        first_caption=arguments.first_caption,
        augmentation=augmentation_of(arguments),
    )


def sizes(size: str) -> tuple[Aimv2VisionConfig, DecoderConfig]:
    """A released size's name, or a config.json with the encoder's fields and a `decoder_config` of its own."""
    if size in WIDTHS:
        return Aimv2VisionConfig(*WIDTHS[size]), DecoderConfig()
    file = Path(size)
    if not file.is_file():
        raise ValueError(f"--size is {', '.join(WIDTHS)} or a config.json, got {size}")
    raw: dict[str, Any] = read_json(file)
    section = raw.get("decoder_config", {})
    known = set(DecoderConfig.__dataclass_fields__)
    if not isinstance(section, dict) or (unknown := section.keys() - known):
        raise ValueError(f"{file}: decoder_config has {', '.join(sorted(known))}; got {sorted(unknown)}")
    vision = {name: value for name, value in raw.items() if name != "decoder_config"}
    return Aimv2VisionConfig.from_dict({"use_head": False} | vision), DecoderConfig(**section)
