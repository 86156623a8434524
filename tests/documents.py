"""Reads the project's documents: their code blocks, links and commands; and sets up the folder that they run in.

A block in `sh` or `python` is run as it is written unless an HTML comment directly above says `not run: REASON`. A
document's blocks run in their order in one folder, which holds what documents speak of: cat.jpg, dog.jpg, photo.jpg,
new.jpg, photos/ and held-out/ with a folder for each label, DATA and HELD_OUT with captions, ~/Pictures.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_aimv2 import bundled
from mlx_aimv2.config import RELEASED, Aimv2VisionConfig
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.objective import initialise
from mlx_aimv2.pretrain.train import write_encoder
from tests.loopback import Hub

ROOT = Path(__file__).parent.parent
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Documents whose blocks are run."""

ALL = [*RUN, ROOT / "CONTRIBUTING.md", *(ROOT / name / "README.md" for name in ("examples", "benchmarks", "convert"))]
"""Documents whose links, flags and targets are looked up."""

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?P<language>sh|python)\n(?P<code>.*?)```", re.DOTALL)

PUBLISHED = ("large-patch14-224", "large-patch14-native", "large-patch14-224-lit")
"""Checkpoints that the Hub of the test has, under Apple's names, small and with random weights; the pair for LiT."""

LABELS = {"cats": "face", "dogs": "button"}
"""A label's folder -> the emoji in it."""


@dataclass(frozen=True)
class Block:
    """A code block: its language, its code, and why it is not run, if so."""

    language: str
    code: str
    reason: str | None


def blocks(document: Path) -> list[Block]:
    """The blocks of a document in `sh` and `python`."""
    found = BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [Block(match["language"], match["code"], match["reason"]) for match in found]


def commands(document: Path) -> list[str]:
    """Every line of shell of a document, in blocks and in code spans; comments are left out, long lines joined."""
    text = document.read_text(encoding="utf-8")
    lines = [line for block in BLOCK.finditer(text) if block["language"] == "sh" for line in block["code"].splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.split("  #")[0].strip() for line in (*lines, *spans)]


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
    programs = place / "bin"
    programs.mkdir()
    for name, arguments in (("mlx-aimv2", " -m mlx_aimv2"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (programs / name).chmod(0o755)


def publish(hub: Hub, place: Path) -> None:
    """Puts small checkpoints under Apple's names on the Hub, at the pinned commits."""
    for name in PUBLISHED:
        checkpoint = RELEASED[f"aimv2-{name}"]
        folder = place / name
        if name.endswith("-lit"):
            shutil.copytree(bundled.emoji_checkpoint(), folder)
        else:
            size = checkpoint.vision.image_size
            config = Aimv2VisionConfig(64, 128, 2, 2, image_size=size, is_native=size is None)
            model = Aimv2VisionModel(config)
            initialise(model, 2, seed=3)
            write_encoder(model, folder)
        (folder / "LICENSE").write_text("terms")
        hub.publish(f"apple/aimv2-{name}", checkpoint.commit, folder)
