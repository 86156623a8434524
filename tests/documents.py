"""Reads the project's documents: their code blocks, links and commands; and sets up the folder that they run in.

A block in `sh` or `python` is run as it is written unless an HTML comment directly above says `not run: REASON`; one
without a language, or in `text`, is output. A document's blocks run in their order in one folder, which holds what
documents speak of: cat.jpg, dog.jpg, photo.jpg, new.jpg, photos/ and held-out/ with a folder for each label, DATA and
HELD_OUT with captions, ~/Pictures. A comment in Python that begins with a shape, as `# (2, 256, 1024)`, is checked.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_aimv2 import bundled
from mlx_aimv2.checkpoint.layouts import layout_for
from mlx_aimv2.config import RELEASED, Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.conversion.folder import config_for
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.objective import initialise
from mlx_aimv2.pretrain.pretraining import write_checkpoint
from tests.loopback import Hub
from tests.small_models import pair_with_words, random_weights, write

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("examples", "benchmarks", "convert", "tools", "tests/mutations")),
]
"""Documents whose blocks are run, and whose commands, flags and targets are looked up."""

LINKED = [
    *DOCUMENTS,
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
    *(ROOT / name for name in ("CHANGELOG.md", "mlx_aimv2/assets/CREDITS.md")),
]
"""Documents whose links are followed."""

RUN = ("sh", "python")
OUTPUT = ("", "text")

FENCE = re.compile(
    r"(?:^ *<!-- not run:(?P<reason>(?:(?!-->).)*)-->\n)?^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)

SHAPE = re.compile(r" # \((\w+(?:, \w+)*)\)")
WIDE = 100
"""A last axis from here on is a width, which small models do not share."""

VISION = Aimv2VisionConfig(64, 128, 2, 2)
TEXT = Aimv2TextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)

OVIS2 = replace(VISION, image_size=448)
OTHERS = {
    "AIDC-AI/Ovis2-1B": (
        "apple",
        "visual_tokenizer.backbone.",
        OVIS2,
        {"model_type": "ovis", "visual_tokenizer_config": {"backbone_config": config_for(OVIS2, "apple")}},
    ),
    "timm/aimv2_large_patch14_224.apple_pt": (
        "timm",
        "",
        replace(VISION, hidden_size=256),  # timm's heads are 128 wide
        {"architecture": "aimv2_large_patch14_224", "pretrained_cfg": {"input_size": [3, 224, 224]}},
    ),
}
"""Another's checkpoint -> layout, prefix of its tensors, sizes, and config.json of a small one."""

LABELS = {"cats": "face", "dogs": "button"}
"""A label's folder -> the emoji in it."""


SERVED = """
import signal, subprocess, sys
with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True) as server:
    is_there = server.stdout.readline().startswith("http://127.0.0.1:")
    server.send_signal(signal.SIGTERM)
    sys.exit(0 if is_there and server.wait() == 128 + signal.SIGTERM else 1)
"""
"""A program that runs a server until it says where it is."""


@dataclass(frozen=True)
class Block:
    """A code block: its language, its code, the line of its fence, and why it is not run, if so."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, also those in lists."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            match["language"],
            textwrap.dedent(match["code"]),
            text[: match.start("language")].count("\n") + 1,
            None if match["reason"] is None else match["reason"].strip(),
        )
        for match in FENCE.finditer(text)
    ]


def prose(document: Path) -> str:
    """What is left of a document without its fenced blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def commands(document: Path) -> list[str]:
    """Every line of shell of a document, in blocks and in code spans; comments are left out, long lines joined."""
    shell = [block.code.replace("\\\n", " ") for block in blocks(document) if block.language == "sh"]
    spans = [
        span for paragraph in prose(document).split("\n\n") for span in re.findall(r"`([^`]+)`", paragraph, re.DOTALL)
    ]
    lines = [line for code in shell for line in code.splitlines()] + [" ".join(span.split()) for span in spans]
    return [line.split("  #")[0].strip() for line in lines]


def with_shapes(code: str) -> str:
    """Python with an assertion below each line whose comment begins with a shape; letters stand for any number."""
    lines = []
    for line in code.splitlines():
        lines.append(line)
        if match := SHAPE.search(line):
            indent, statement = re.match(r"( *)(.*?) *$", line[: match.start()]).groups()
            target = re.match(r"(\w+) = ", statement)
            got = f"({target[1] if target else statement}).shape"
            wanted = [int(axis) if axis.isdigit() else None for axis in match[1].split(", ")]
            if wanted[-1] and wanted[-1] >= WIDE:
                wanted[-1] = None
            lines.append(
                f"{indent}assert all(b in (a, None) for a, b in zip({got}, {wanted}, strict=True)), ({got}, {wanted})"
            )
    return "\n".join(lines) + "\n"


def with_any_numbers(output: str) -> str:
    """The regular expression of what a document shows: BLAS kernels round scores differently, `…` stands for a path."""
    return re.sub(r"\d+\\\.\d+", r"\\d+\\.\\d+", re.escape(output)).replace("…", r"\S*")


def set_up(place: Path) -> None:
    """Fills a folder with what the documents speak of."""
    for name, photograph in zip(("cat.jpg", "dog.jpg", "photo.jpg", "new.jpg"), bundled.photographs(), strict=True):
        shutil.copy(photograph, place / name)
    shutil.copytree(bundled.photographs()[0].parent, place / "Pictures")
    for folder, first, count in (("photos", 0, 6), ("held-out", 6, 3)):
        for label, word in LABELS.items():
            files = [file for file, name in bundled.emoji_images().items() if word in name][first : first + count]
            (place / folder / label).mkdir(parents=True)
            for file in files:
                shutil.copy(file, place / folder / label)
    for folder, first in (("DATA", 0), ("HELD_OUT", 12)):
        (place / folder).mkdir()
        pairs = list(bundled.emoji_images().items())[first : first + 12]
        for file, _ in pairs:
            shutil.copy(file, place / folder)
        lines = [json.dumps({"file_name": file.name, "text": name}) for file, name in pairs]
        (place / folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {**tiny, "num_hidden_layers": 1}
    (place / "tiny.json").write_text(json.dumps({**tiny, "image_size": 56, "decoder_config": decoder}))
    (place / "mlx_aimv2").mkdir()  # the root of a clone, as far as documents name its files
    (place / "mlx_aimv2" / "assets").symlink_to(bundled.ASSETS)
    programs = place / "bin"
    programs.mkdir()
    for name, arguments in (("mlx-aimv2", " -m mlx_aimv2"), ("python", ""), ("python3", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "served").write_text(f"#!{sys.executable}\n{SERVED}")
    (programs / "served").chmod(0o755)


def until_it_serves(code: str) -> str:
    """Commands whose servers end, and open no browser, as soon as they have said where they are."""
    return re.sub(r"^(mlx-aimv2 serve [^#\n]*)", r"served \1 --no-open --port 0 ", code, flags=re.MULTILINE)


def publish(hub: Hub, place: Path, document: Path) -> None:
    """Puts small random checkpoints on the Hub under those of Apple's names that a document has."""
    text = document.read_text(encoding="utf-8")
    for name, checkpoint in RELEASED.items():
        if name not in text:
            continue
        folder = place / name
        size = checkpoint.config.vision.image_size
        config = replace(VISION, image_size=size, is_native=size is None)
        if name.endswith("-lit"):
            pair_with_words(folder, Aimv2Config(replace(config, use_head=True), TEXT, projection_dim=48))
        else:
            model = Aimv2VisionModel(config)
            initialise(model, config.num_hidden_layers, seed=3)
            write_checkpoint(model, folder)
        (folder / "LICENSE").write_text("terms")
        hub.publish(f"apple/{name}", checkpoint.commit, folder)
    for name, (layout, prefix, vision, config) in OTHERS.items():
        if name in text:
            tensors = dict(layout_for(layout, pair=False).to_source(random_weights(vision).items()))
            write(place / name, {prefix + key: array for key, array in tensors.items()}, config)
            hub.publish(name, "f" * 40, place / name)
