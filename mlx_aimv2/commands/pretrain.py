"""`mlx-aimv2 pretrain`: trains an encoder from images with captions by the paper's own objective."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_aimv2.cli import say, show
from mlx_aimv2.config import DTYPES, WIDTHS, Aimv2VisionConfig
from mlx_aimv2.device import AUTO
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.pretrain.augment import Augmentation
from mlx_aimv2.pretrain.captioned import open_data
from mlx_aimv2.pretrain.captions import VOCAB_SIZE
from mlx_aimv2.pretrain.decoder import DecoderConfig
from mlx_aimv2.pretrain.grids import PATCHES
from mlx_aimv2.pretrain.losses import ALPHA
from mlx_aimv2.pretrain.optimise import WEIGHT_DECAY
from mlx_aimv2.pretrain.settings import Schedule, Settings
from mlx_aimv2.pretrain.train import pretrain
from mlx_aimv2.safe_read import read_json
from mlx_aimv2.tokenizer import Tokenizer

HELP = "train an encoder from images with captions, by the paper's objective"
EXAMPLE = "mlx-aimv2 pretrain DATA -o encoder --size large --batch 64 --steps 20000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("data", metavar="DATA", help="folder with metadata.jsonl (file_name, text), or .tar shards of WebDataset")
    add("-o", "--output", required=True, metavar="CHECKPOINT", help="folder to write, in Apple's layout")
    add = parser.add_argument_group("encoder").add_argument
    add("--size", default="large", metavar="S", help=f"{', '.join(WIDTHS)}, or a config.json of your own")
    add("--image-size", type=int, metavar="N", help="side of the images in pixels (default: 224, or the config's)")
    add("--patch-size", type=int, metavar="N", help="side of a patch in pixels (default: 14, or the config's)")
    add("--native", action="store_true", help="an encoder for images of any size: a number of patches for each batch")
    add(
        "--patches",
        type=int,
        nargs=2,
        default=PATCHES,
        metavar=("LEAST", "MOST"),
        help="with --native (default: 128 4096)",
    )
    add = parser.add_argument_group("captions").add_argument
    add("--vocab-size", type=int, default=VOCAB_SIZE, metavar="N", help="largest vocabulary trained on the captions")
    add("--tokenizer", metavar="FOLDER", help="take this tokenizer instead of training one on the captions")
    add("--first-caption", type=float, default=0.0, metavar="P", help="how often the first of several captions is read")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch", type=int, default=64, metavar="N", help="examples in a step, on all ranks (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="parts of a batch computed one after another")
    add("--steps", type=int, default=1000, metavar="N", help="updates of the weights (default: %(default)s)")
    add("--learning-rate", type=float, metavar="R", help="highest rate (default: the paper's, by root of batch / 8192)")
    add("--warm-up", type=int, metavar="N", help="steps until then (default: a tenth)")
    add("--weight-decay", type=float, default=WEIGHT_DECAY, metavar="W", help="default: %(default)s")
    add("--alpha", type=float, default=ALPHA, metavar="A", help="weight of the image loss (default: %(default)s)")
    add = parser.add_argument_group("augmentation").add_argument
    add("--min-area", type=float, default=0.4, metavar="A", help="smallest random crop (default: %(default)s)")
    add("--no-flip", action="store_true", help="mirror no images: for data where left and right differ")
    add("--jitter", type=float, default=0.0, metavar="J", help="change brightness, contrast, saturation by up to J")
    add("--grey", type=float, default=0.0, metavar="P", help="share of images without colours (default: %(default)s)")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, metavar="N", help="of weights, order, crops and prefixes (default: %(default)s)")
    add("--dtype", choices=[*DTYPES, AUTO], default=AUTO, help="to compute in (auto: bfloat16 on a GPU, else float32)")
    add("--validation", metavar="DATA", help="held-out data, whose losses are reported")
    add("--validate-every", type=int, default=500, metavar="N", help="steps (default: %(default)s)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between two states (default: %(default)s)")
    add("--samples-every", type=int, default=1000, metavar="N", help="steps between two images of predicted patches")
    add("--start", metavar="CHECKPOINT", help="go on from an earlier run, at another --image-size for example")
    add("--resume", action="store_true", help="go on with an interrupted run of the same settings")


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
        start=arguments.start,
        resume=arguments.resume,
        group=Ranks().group,
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
        first_caption=arguments.first_caption,
        augmentation=Augmentation(arguments.min_area, not arguments.no_flip, arguments.jitter, arguments.grey),
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
