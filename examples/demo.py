"""Runs the whole pipeline offline, in a minute: convert, features, embed, search, classify, learn, and one picture.

python -m examples.demo        (or: make demo)

The tiny pair in the package was trained on emoji alone. Those here are Noto's, a style that it has never seen, and the
words are some of the few that it knows.
"""

import os
import shutil
import sys
from pathlib import Path

from examples import demo_picture, features
from examples.demo_picture import LABELLED, PATCHES, QUERY, WORDS
from examples.probe import write_digits
from mlx_aimv2 import bundled, cli, load, zero_shot
from mlx_aimv2.index import Index
from mlx_aimv2.learn import fit

NOTO, OUTPUT = Path(os.path.relpath(bundled.ASSETS / "noto")), Path("demo-output")


def command(*words: object) -> None:
    """Prints a command as it is typed, and runs it."""
    print("\nmlx-aimv2", *words, flush=True)
    if code := cli.main([str(word) for word in words]):
        raise SystemExit(code)


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    folder, index, head, digits = (OUTPUT / name for name in ("emoji-mlx", "emoji.db", "digits-probe", "digits"))
    command("convert", "--hf-path", os.path.relpath(bundled.emoji_checkpoint()), "--mlx-path", folder)
    larger, photographs = load(folder, dtype="auto", image_size=336), bundled.ASSETS / "photographs"
    maps = [image for name, at in PATCHES.items() for image in features.maps(*larger, photographs / name, at, cell=6)]

    command("embed", NOTO, "-m", folder, "-o", index)
    command("search", index, WORDS[0], "-k", 6, "--html", OUTPUT / "search.html")
    model, processor = load(folder, dtype="auto")
    queries = dict(zip(WORDS, model.encode_text(processor.tokenize(WORDS)), strict=True))
    queries["like the first image"] = model.encode_image(processor(NOTO / QUERY))
    with Index.open(index) as opened:
        found = {words: [match.path for match in opened.search(query, k=5)] for words, query in queries.items()}
        stored = {one.path: one.vector for one in opened.embeddings()}

    files, labels = [NOTO / f"{name}.webp" for name in LABELLED], sorted(set(LABELLED.values()))
    classes = {file: one.label for file, one in zip(files, zero_shot(model, processor, files, labels), strict=True)}
    write_digits(digits / "train", per_class=15)
    write_digits(digits / "test", per_class=10, held_out=True)
    fitted = fit(digits, folder, head, image_size=42, cache=OUTPUT / "cache")  # scans of 8 x 8 pixels need no more
    print(f"\nhandwritten digits: {fitted.line}")
    demo_picture.draw(maps, found, stored, classes, fitted).save(OUTPUT / "demo.png")
    print(f"\n{OUTPUT}/demo.png shows it all; mlx-aimv2 is {Path(sys.executable).parent}/mlx-aimv2 in a shell")
    if not found["like the first image"][0].endswith(QUERY) or fitted.scores["test"]["top1"] < 0.6:
        raise SystemExit("an image was not most like itself, or few digits right: this installation computes wrong")


if __name__ == "__main__":
    main()
