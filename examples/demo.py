"""Shows what the package does, offline and in a minute: convert, load, embed, draw.

python -m examples.demo        (or: make demo)

The embedded checkpoint, a small encoder trained on handwritten digits and stored as Apple stores AIMv2, goes through
everything that a published one goes through.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from examples import digits, tsne
from examples.titled import titled
from mlx_aimv2 import Aimv2Processor, Aimv2VisionModel, bundled, load, plot
from mlx_aimv2.learn import drawing
from mlx_aimv2.learn.drawing import below, contact_sheet

ROOT = Path(__file__).parent.parent
TILE = 56
"""The side of the images that the embedded checkpoint takes."""

RIGHT, WRONG = (60, 160, 90), (214, 69, 65)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert the embedded checkpoint, embed images, draw one.")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder (default: %(default)s)")
    output: Path = parser.parse_args(argv).output
    began = time.perf_counter()

    say("Convert: a PyTorch checkpoint in Apple's layout becomes an MLX folder")
    folder = convert(output / "digits-mlx")

    say("Load and embed: 1,797 handwritten digits, a third of which training never saw")
    model, processor = load(folder)
    scans = bundled.digits()
    start = time.perf_counter()
    bank = digits.encode(model, processor, scans.train_images)
    queries = digits.encode(model, processor, scans.test_images)
    print(f"{len(bank)} + {len(queries)} images in {time.perf_counter() - start:.1f} s, {bank.shape[1]} numbers each")

    say("Nearest neighbours: held-out digits among those of training")
    nearest = np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :5]
    examples = [int(np.flatnonzero(scans.test_labels == digit)[0]) for digit in range(10)]
    for i in examples:
        cosines = "  ".join(f"{scans.train_labels[j]} ({queries[i] @ bank[j]:.3f})" for j in nearest[i])
        print(f"a held-out {scans.test_labels[i]}:  {cosines}")
    found = digits.vote(bank, scans.train_labels, queries)
    wrong = np.flatnonzero(found != scans.test_labels)
    accuracy = f"{len(queries) - len(wrong)} of {len(queries)} held-out digits ({1 - len(wrong) / len(queries):.1%})"
    print(f"a 5-nearest-neighbour vote classifies {accuracy} correctly")
    if len(wrong) > 0.05 * len(queries):
        raise SystemExit("at least 95 % were expected: something is wrong with this installation")

    say("Photographs: the same path, though this small model knows nothing but digits")
    images = bundled.photographs()
    vectors = np.array(model.encode_image(processor(images), normalize=True))
    for image, row in zip(images, vectors @ vectors.T, strict=True):
        print(f"{image.name:14}", "  ".join(f"{cosine:6.3f}" for cosine in row))

    say("Draw")
    neighbours = draw_neighbours(scans, examples, nearest)
    mistakes = draw_mistakes(scans, wrong, found)
    whole_plane = draw_plane(scans, queries)
    maps = [plot.side_by_side(tile_maps(model, processor, image), height=168, gap=4) for image in images]
    page = compose(scans, neighbours, mistakes, whole_plane, maps, accuracy)
    page.save(output / "demo.png")
    for path, what in ((folder, "the converted model"), (output / "demo.png", "the image to look at")):
        print(f"{short(path)}  {what}")
    print(f"done in {time.perf_counter() - began:.0f} s; your own images: examples/README.md")


def say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def short(path: Path) -> Path:
    """The path from where the demo was started, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def convert(target: Path) -> Path:
    """Converts the embedded checkpoint with the command that converts any other, and lists what was written."""
    shutil.rmtree(target, ignore_errors=True)  # an earlier demo's; the converter replaces nothing
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["-m", "mlx_aimv2.convert", "--hf-path", str(bundled.digits_checkpoint()), "--mlx-path", str(target)]
    print("python", *(short(Path(word)) if Path(word).is_absolute() else word for word in command), flush=True)
    subprocess.run([sys.executable, *command], check=True)
    for file in sorted(target.iterdir()):
        print(f"{file.stat().st_size:>12,} bytes  {file.name}")
    return target


def draw_neighbours(scans: bundled.Digits, chosen: list[int], nearest: np.ndarray) -> Image.Image:
    """A row for each chosen held-out digit: itself, then its nearest ones, framed in green if correct."""
    rows, frames = [], []
    for i in chosen:
        same = [scans.train_labels[j] == scans.test_labels[i] for j in nearest[i]]
        rows.append([image(scans.test_images[i]), *(image(scans.train_images[j]) for j in nearest[i])])
        frames.append([plot.INK, *(RIGHT if right else WRONG for right in same)])
    return contact_sheet(rows, frames=frames, side=62, gap=12)


def draw_mistakes(scans: bundled.Digits, wrong: np.ndarray, found: np.ndarray) -> Image.Image:
    """Every held-out digit that the vote gets wrong, with what it is and what it was taken for."""
    images = [image(scans.test_images[i]) for i in wrong]
    captions = [f"{scans.test_labels[i]} as {found[i]}" for i in wrong]
    rows = range(0, max(len(wrong), 1), 6)
    return contact_sheet(
        [images[start : start + 6] for start in rows],
        captions=[captions[start : start + 6] for start in rows],
        side=62,
        gap=12,
    )


def draw_plane(scans: bundled.Digits, queries: np.ndarray) -> Image.Image:
    """All held-out digits where their features lie, one colour per class."""
    images = [image(scan).resize((24, 24), Image.Resampling.BICUBIC) for scan in scans.test_images]
    colours = [drawing.CLASSES[label] for label in scans.test_labels]
    return tsne.scatter(tsne.neighbour_plane(queries), images, colours, size=(1000, 1000))


def tile_maps(model: Aimv2VisionModel, processor: Aimv2Processor, path: Path) -> list[Image.Image]:
    """A photograph, and colour maps of its patches before and after the first block.

    It is cut into tiles of the small size that the embedded checkpoint takes; deeper blocks know only digits.
    """
    image = Image.open(path).convert("RGB")
    rows, columns = image.height // TILE, image.width // TILE
    image = image.crop((0, 0, columns * TILE, rows * TILE))
    boxes = [(c * TILE, r * TILE, (c + 1) * TILE, (r + 1) * TILE) for r in range(rows) for c in range(columns)]
    states = model(processor([image.crop(box) for box in boxes]), output_hidden_states=True).hidden_states
    maps = []
    for state in states[:2]:
        tokens = np.array(state)  # (tiles, N, D)
        tokens = tokens - tokens.mean(axis=0)  # what one place has in common in all tiles says nothing of the image
        side = int(tokens.shape[1] ** 0.5)
        tokens = tokens.reshape(rows, columns, side, side, -1).transpose(0, 2, 1, 3, 4)
        grid = (rows * side, columns * side)
        maps.append(plot.pca_map(tokens.reshape(grid[0] * grid[1], -1), grid))
    return [image, *maps]


def compose(
    scans: bundled.Digits,
    neighbours: Image.Image,
    mistakes: Image.Image,
    whole_plane: Image.Image,
    maps: list[Image.Image],
    accuracy: str,
) -> Image.Image:
    """The page: neighbours and mistakes at the left, the plane at the right, photographs below."""
    neighbours = titled(
        neighbours,
        "Nearest neighbours",
        subtitle=f"a held-out digit, then the 5 most alike of {len(scans.train_images):,}",
    )
    mistakes = titled(mistakes, "All mistakes", subtitle=f"classified correctly: {accuracy}")
    whole_plane = titled(
        whole_plane,
        f"{len(scans.test_images)} digits that training never saw, where their features lie",
        subtitle="drawn by t-SNE, which sees no labels; a colour is a class",
    )
    upper = plot.beside([below([neighbours, mistakes]), whole_plane])
    photographs = titled(
        below([plot.beside(maps[:2]), plot.beside(maps[2:])]),
        "Features of photographs, patch by patch",
        subtitle=f"patch embedding and first block, in tiles of {TILE} pixels, by an encoder that has seen only digits",
    )
    return ImageOps.expand(below([upper, photographs]), 28, plot.PAPER)


def image(scan: np.ndarray) -> Image.Image:
    return Image.fromarray(scan).resize((TILE, TILE), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main()
