"""Trains the embedded pair from nothing, as `make train` does, and prints what it is good for.

emoji of five styles -> mlx-aimv2 pretrain -> encoder -> mlx-aimv2 lit -> pair -> measured on a sixth style, Noto

python -m tools.train_emoji WORK                 everything; WORK keeps the emoji, the encoder and the pair
python -m tools.train_emoji WORK --write         also replaces the pair and the Noto images in the package
python -m tools.train_emoji WORK --measure PAIR  only measures a pair
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_aimv2 import bundled
from mlx_aimv2.cli import main as command_line
from mlx_aimv2.conversion import folder as mlx_folder
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.loading import load, read_source
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.lit_tuning import recall
from mlx_aimv2.pretrain.objective import initialise
from mlx_aimv2.pretrain.pretraining import write_checkpoint
from mlx_aimv2.train.state import STATE_FILE
from tools import make_emoji

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "image_size": 84,
    "patch_size": 14,
    "is_native": False,
    "decoder_config": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    },
}
TEXT = {
    "projection_dim": 192,
    "text_config": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 20,
    },
}
# Left and right differ in arrows and hands, so no image is mirrored; colours vary, since styles differ in them.
SEEN_AS = ("--no-flip", "--jitter", "0.3", "--grey", "0.15", "--min-area", "0.5")
# Decay and warm-up are those that the pair in the package was trained with, which are not the paper's.
PRETRAIN = (
    *("--vocab-size", "2048", "--batch-size", "64", "--learning-rate", "1.5e-3"),
    *("--weight-decay", "1.5e-4", "--warm-up", "380", "--first-caption", "0.5", "--save-every", "250"),
)
LIT = (
    *("--vocab-size", "2048", "--batch-size", "256", "--learning-rate", "1e-3"),
    *("--weight-decay", "1e-7", "--views", "2", "--first-caption", "0.5"),
)
PRETRAIN_STEPS, LIT_STEPS = 3800, 1500

SHIPPED = 300
PHRASES = (
    "something to eat at a birthday",
    "a flag with a red circle",
    "an animal that lives in the sea",
    "it is raining",
    "a person who cooks",
    "a vehicle on rails",
    "a sad face",
    "laughing so hard that tears come",
    "a plant with thorns",
    "a tool for hitting nails",
    "something cold and sweet",
    "a hot drink",
    "love",
    "money",
    "a musical instrument with strings",
    "an insect",
    "the night sky",
    "to keep the rain off",
    "a big cat",
    "playing with a ball",
)
"""Phrases that are no names, written before any result was seen."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded pair on emoji and measure it.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--packages", type=Path, help="npm packages fetched before (default: npm fetches them)")
    parser.add_argument("--steps", type=int, default=PRETRAIN_STEPS)
    parser.add_argument("--lit-steps", type=int, default=LIT_STEPS)
    parser.add_argument("--measure", metavar="PAIR", help="only measure this pair")
    parser.add_argument("--write", action="store_true", help="replace the pair in the package")
    parser.add_argument("--write-images", action="store_true", help="only replace the images in the package")
    arguments = parser.parse_args()
    work, began = arguments.work, time.monotonic()
    if arguments.write_images:
        write_images(work / "emoji" / make_emoji.UNSEEN)
        return
    if arguments.measure:
        measure(Path(arguments.measure), work / "emoji" / make_emoji.UNSEEN)
        return
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "emoji").is_dir():
        emoji(work / "emoji", arguments.packages)
    train(work, steps=arguments.steps, lit_steps=arguments.lit_steps)
    print(f"trained in {(time.monotonic() - began) / 60:.0f} minutes")
    measure(work / "pair", work / "emoji" / make_emoji.UNSEEN)
    compare_with_random(work, lit_steps=arguments.lit_steps)
    if arguments.write:
        write_pair(work / "pair")


def emoji(folder: Path, packages: Path | None) -> None:
    """The emoji as image folders."""
    with tempfile.TemporaryDirectory() as place:
        make_emoji.write(packages or make_emoji.fetch(Path(place)), folder)


def train(work: Path, *, steps: int, lit_steps: int) -> None:
    """The two commands that make the pair."""
    sizes, text = work / "sizes.json", work / "text.json"
    sizes.write_text(json.dumps(SIZES, indent=2), encoding="utf-8")
    text.write_text(json.dumps(TEXT, indent=2), encoding="utf-8")
    data = str(work / "emoji" / "train")
    again = ["--resume"] if (work / "encoder.training" / STATE_FILE).is_file() else []
    if not (work / "encoder").is_dir():
        _run("pretrain", data, "-o", work / "encoder", "--size", sizes, "--iters", steps,
             "--validation", work / "emoji" / make_emoji.UNSEEN, *PRETRAIN, *SEEN_AS, *again)  # fmt: skip
    tune(work, work / "encoder", work / "pair", lit_steps=lit_steps)


def tune(work: Path, encoder: Path, pair: Path, *, lit_steps: int) -> None:
    """LiT tuning, equal for every trunk."""
    if not pair.is_dir():
        _run("lit", work / "emoji" / "train", "--encoder", encoder, "-o", pair, "--config", work / "text.json",
             "--iters", lit_steps, *LIT, *SEEN_AS)  # fmt: skip


def compare_with_random(work: Path, *, lit_steps: int) -> None:
    """The same LiT tuning over a trunk of random weights."""
    trained, _ = load(work / "encoder")
    trunk = Aimv2VisionModel(trained.vision.config)
    initialise(trunk, trunk.config.num_hidden_layers, seed=7)
    if not (work / "random").is_dir():
        write_checkpoint(trunk, work / "random")
    tune(work, work / "random", work / "random-pair", lit_steps=lit_steps)
    print("the same with a trunk of random weights:")
    measure(work / "random-pair", work / "emoji" / make_emoji.UNSEEN, phrases=())


def measure(pair: Path, unseen: Path, *, phrases: Sequence[str] = PHRASES) -> None:
    """Prints how well names and phrases find images of the unseen style, and a linear probe on the digits."""
    model, processor = load(pair)
    rows = read_rows(unseen)
    images = embed_images(model, processor, [unseen / row["file_name"] for row in rows])
    names = [row["text"][0] for row in rows]
    texts = embed_texts(model, processor, names)
    scores = images @ texts.T
    print(f"{len(rows)} images of the unseen style, their own name among all: {_ranks(scores)}")
    shipped = [i for i, row in enumerate(rows) if row["file_name"] in set(shipped_files(rows))]
    print(f"the {len(shipped)} that ship, among their own names: {_ranks(scores[np.ix_(shipped, shipped)])}")
    print(f"the {len(shipped)} that ship, found by their name: {_ranks(scores[np.ix_(shipped, shipped)].T)}")
    for phrase in phrases:
        best = np.argsort(-(images[shipped] @ embed_texts(model, processor, [phrase])[0]))[:5]
        print(f"  {phrase!r}: {', '.join(names[shipped[i]] for i in best)}")
    print(f"linear probe on the digits, mean token of the trunk: {probe_digits(model.vision, processor):.2%}")


def _ranks(scores: np.ndarray[Any, Any]) -> str:
    first, of_five = recall(scores)
    return f"first {first:.1%}, among the first five {of_five:.1%}"


def embed_images(model: Any, processor: Aimv2Processor, files: Sequence[Path]) -> np.ndarray[Any, Any]:
    """Unit vectors (n, E) of image files."""
    batches = (list(files[i : i + 64]) for i in range(0, len(files), 64))
    return np.concatenate(
        [np.array(model.encode_image(processor(batch), normalize=True).astype(mx.float32)) for batch in batches]
    )


def embed_texts(model: Any, processor: Aimv2Processor, texts: Sequence[str]) -> np.ndarray[Any, Any]:
    """Unit vectors (n, E) of texts."""
    batches = (list(texts[i : i + 64]) for i in range(0, len(texts), 64))
    return np.concatenate(
        [np.array(model.encode_text(processor.tokenize(b), normalize=True).astype(mx.float32)) for b in batches]
    )


def probe_digits(encoder: Aimv2VisionModel, processor: Aimv2Processor) -> float:
    """Logistic regression on the mean tokens of 1,198 digits, judged on the 599 held-out ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scans = bundled.digits()
    features = [
        np.concatenate([np.array(encoder.encode_image(processor(list(part[i : i + 64]))).astype(mx.float32))
                        for i in range(0, len(part), 64)])
        for part in (scans.train_images, scans.test_images)
    ]  # fmt: skip
    scaler = StandardScaler().fit(features[0])
    probe = LogisticRegression(max_iter=3000).fit(scaler.transform(features[0]), scans.train_labels)
    return float(probe.score(scaler.transform(features[1]), scans.test_labels))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """metadata.jsonl of an image folder."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def shipped_files(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the files that ship: emoji in everyday use, no persons in three genders, spread evenly."""
    leading = (
        "man-",
        "woman-",
        "person-",
        "women-",
        "men-",
        "people-",
        "family",
        "couple",
        "kiss",
        "letter-",
        "keycap",
    )
    chosen = [row["file_name"] for row in rows if not row["file_name"].startswith(leading)]
    places = np.linspace(0, len(chosen) - 1, SHIPPED).round().astype(int)
    return [chosen[i] for i in dict.fromkeys(places.tolist())]


def write_pair(pair: Path) -> None:
    """Replaces the pair in the package, in float16."""
    target = bundled.ASSETS / "emoji"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    source = read_source(pair)
    mlx_folder.save_pytorch(source.config, source.weights.items(), target, layout="apple", dtype=mx.float16)
    mlx_folder.save_beside(target, source)


def write_images(unseen: Path) -> None:
    """Replaces the Noto images in the package: lossless WebP, and their names in metadata.jsonl."""
    from PIL import Image

    rows = {row["file_name"]: row for row in read_rows(unseen)}
    target = bundled.ASSETS / "noto"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    lines = []
    for file in shipped_files(list(rows.values())):
        name = f"{Path(file).stem}.webp"
        with Image.open(unseen / file) as image:
            image.convert("RGB").save(target / name, lossless=True, method=6)
        lines.append(json.dumps({"file_name": name, "text": rows[file]["text"][0]}, ensure_ascii=False))
    (target / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run(*words: object) -> None:
    code = command_line([str(word) for word in words])
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
