"""Shows what the package does, offline and in a minute: convert, embed, search by words and images, classify, learn.

python -m examples.demo        (or: make demo)

The embedded checkpoint is a small AIMv2 with a text encoder, pre-trained and tuned on emoji by `make train`. It goes
through everything that a published one goes through. The emoji it is shown are Noto's, a style it has never seen.
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

from examples import tsne
from examples.probe import write_digits
from examples.titled import titled
from mlx_aimv2 import bundled, load, plot, zero_shot
from mlx_aimv2.index import Index
from mlx_aimv2.learn import fit, predict
from mlx_aimv2.plot import below, contact_sheet
from mlx_aimv2.serve.plane import neighbour_plane

ROOT = Path(__file__).parent.parent

PHRASES = ("crying", "fruit", "a hand", "arrow", "animal")
"""What is searched for: words as they stand in captions. The small pair understands few sentences."""

QUERY = "police-car.webp"
LABELS = ("animal", "fruit", "face", "arrow", "hand", "clock", "square", "button")
CLASSIFIED = (
    *("bear", "cow", "lime", "peach", "angry-face", "weary-face"),
    *("left-arrow", "waving-hand", "nine-oclock", "red-square", "free-button", "kangaroo"),
)
LEARNED, JUDGED = 15, 10
"""Scans of each digit that the probe learns from, and others that it is judged on."""

FOUND, SIDE, PLANE = 6, 66, 940
RIGHT, WRONG = (60, 160, 90), (214, 69, 65)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert the embedded checkpoint, search with it, draw the result.")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder (default: %(default)s)")
    output: Path = parser.parse_args(argv).output
    began = time.perf_counter()
    folder, index, head, page = (output / name for name in ("emoji-mlx", "emoji.db", "digits-probe", "search.html"))
    clear(output, folder, head, index, page)
    names = bundled.emoji_images()

    say("Convert: a PyTorch checkpoint in Apple's layout becomes an MLX folder")
    command("convert", "--hf-path", bundled.emoji_checkpoint(), "--mlx-path", folder)

    say(f"Embed: {len(names)} emoji in a style that training never saw")
    command("embed", bundled.ASSETS / "noto", "-m", folder, "-o", index)

    say("Search by words, none of which names an image, and by an image")
    model, processor = load(folder, dtype="auto")
    with Index.open(index) as opened:
        rows = {phrase: found(opened, model.encode_text(processor.tokenize([phrase]))) for phrase in PHRASES}
        query = bundled.ASSETS / "noto" / QUERY
        rows[f"like the {names[query]}"] = found(opened, model.encode_image(processor([query])))
        plane = neighbour_plane(vectors_of(opened, names))
    for phrase, files in rows.items():
        print(f"{phrase}: {', '.join(names[file] for file in files)}")
    command("search", index, PHRASES[0], "-k", "24", "--html", page, shown=False)

    say("Classify: labels in words, nothing is trained")
    some = [bundled.ASSETS / "noto" / f"{name}.webp" for name in CLASSIFIED]
    labels = [prediction.label for prediction in zero_shot(model, processor, some, LABELS)]
    print("; ".join(f"{names[file]}: {label}" for file, label in zip(some, labels, strict=True)))

    say("Learn: a linear probe on handwritten digits, of which the encoder has never seen one")
    digits = output / "digits"
    write_digits(digits / "train", per_class=LEARNED)
    write_digits(digits / "test", per_class=JUDGED, held_out=True)
    fitted = fit(digits, folder, head, dtype="auto", cache=output / "cache")
    print(fitted.line)
    accuracy = fitted.scores["test"]["top1"]

    say("Draw")
    lower = [draw_classes(some, labels), draw_digits(digits, head, accuracy)]
    upper = [draw_rows(rows), draw_plane(plane, names)]
    picture = below([plot.beside(upper), plot.beside(lower)])
    ImageOps.expand(picture, 28, plot.PAPER).save(output / "demo.png")
    for path, what in (
        (folder, "the converted model"),
        (index, "the index of the images"),
        (head, "what was learned of digits"),
        (page, "the results of a search"),
        (output / "demo.png", "the picture to look at"),
    ):
        print(f"{short(path)}  {what}")
    program = short(Path(sys.executable).parent / "mlx-aimv2")
    print(f"done in {time.perf_counter() - began:.0f} s; for images of your own, type {program} instead of mlx-aimv2")
    check(rows, names, accuracy)


def say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def short(path: Path) -> Path:
    """The path from where the demo was started, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def clear(output: Path, *results: Path) -> None:
    """Removes an earlier demo's results: the commands replace nothing."""
    output.mkdir(parents=True, exist_ok=True)
    for result in (*results, output / "digits"):
        if result.is_dir():
            shutil.rmtree(result)
        result.unlink(missing_ok=True)


def command(*words: object, shown: bool = True) -> None:
    """Runs `mlx-aimv2 …` as a user would, and prints what was typed."""
    texts = [str(short(word)) if isinstance(word, Path) else str(word) for word in words]
    print("mlx-aimv2", *(f'"{text}"' if " " in text else text for text in texts), flush=True)
    subprocess.run(
        [sys.executable, "-m", "mlx_aimv2", *map(str, words)], check=True, stdout=None if shown else subprocess.DEVNULL
    )


def found(index: Index, vectors: object) -> list[Path]:
    """The files most like the first of the vectors."""
    return [Path(match.path) for match in index.search(np.array(vectors)[0], k=FOUND)]


def vectors_of(index: Index, names: dict[Path, str]) -> np.ndarray:
    """The stored vectors (n, D) in the order of the names."""
    stored = {Path(one.path).name: one.vector for one in index.embeddings()}
    return np.array([stored[file.name] for file in names], np.float64)


def draw_rows(rows: dict[str, list[Path]]) -> Image.Image:
    """A row of images for each query."""
    drawn = [
        titled(contact_sheet([[Image.open(file) for file in files]], side=SIDE, gap=14), query, size=18)
        for query, files in rows.items()
    ]
    return titled(below(drawn, gap=6), "Words and images find images", subtitle="the best six of 300, in order")


def draw_plane(plane: np.ndarray, names: dict[Path, str]) -> Image.Image:
    """All images where their features lie."""
    images = [Image.open(file).convert("RGB").resize((34, 34), Image.Resampling.LANCZOS) for file in names]
    drawn = tsne.scatter(plane, images, size=(PLANE, PLANE - 160))
    title = f"{len(names)} emoji in a style that training never saw, where their features lie"
    return titled(drawn, title, subtitle="drawn by t-SNE, which sees neither names nor pixels")


def draw_classes(files: list[Path], labels: list[str]) -> Image.Image:
    """Images and the label that each was given."""
    half = len(files) // 2
    images = [Image.open(file) for file in files]
    drawn = contact_sheet([images[:half], images[half:]], captions=[labels[:half], labels[half:]], side=SIDE, gap=14)
    return titled(drawn, "Classified by words", subtitle=f"as one of: {', '.join(LABELS)}", size=18)


def draw_digits(digits: Path, head: Path, accuracy: float) -> Image.Image:
    """Two scans of each digit that were held out, and what the probe takes them for."""
    files = [sorted((digits / "test" / str(digit)).iterdir())[number] for number in (0, 1) for digit in range(10)]
    taken = {Path(path): str(prediction.best(1)[0]) for path, prediction in predict(head, files)}
    rows = [files[:10], files[10:]]
    drawn = contact_sheet(
        [[Image.open(file) for file in row] for row in rows],
        captions=[[taken[file] for file in row] for row in rows],
        frames=[[RIGHT if file.parent.name == taken[file] else WRONG for file in row] for row in rows],
        side=SIDE,
        gap=22,
    )
    about = f"a linear probe on {10 * LEARNED} scans; {accuracy:.0%} of {10 * JUDGED} others are right"
    return titled(drawn, "Handwritten digits, learned in seconds", subtitle=about, size=18)


def check(rows: dict[str, list[Path]], names: dict[Path, str], accuracy: float) -> None:
    """Ends with an error where the results are not those of the trained weights."""
    first = rows[f"like the {names[bundled.ASSETS / 'noto' / QUERY]}"][0]
    if first.name != QUERY or accuracy < 0.6:
        raise SystemExit(
            f"an image must be most like itself (found {first.name}) and 60 % of the digits right "
            f"(are {accuracy:.0%}): something is wrong with this installation"
        )


if __name__ == "__main__":
    main()
