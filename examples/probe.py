"""How well does an encoder learn my labels, frozen or fine-tuned?

python -m examples.probe [DATA] [--fine-tune-type lora] [--model MODEL] [--output HEAD]

DATA is a folder with a folder of images for each label. Without it: a few of the handwritten digits that ship with the
package, of which its pair has never seen one. `mlx-aimv2 fuse` makes a checkpoint of what `lora` has learned.
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from mlx_aimv2 import bundled
from mlx_aimv2.learn import fit, predict

parser = argparse.ArgumentParser(description="Learn labels from an encoder's features, or with the encoder.")
parser.add_argument("data", nargs="?", help="folder with a folder of images for each label")
parser.add_argument("--fine-tune-type", default="linear", help="linear, attentive, knn, lora, dora or full")
parser.add_argument("--iters", type=int, help="steps of attentive, lora, dora and full")
parser.add_argument("--model", default=bundled.emoji_checkpoint(), help="Hub name or checkpoint folder")
parser.add_argument("--output", default="probe", help="folder for the head and its card (default: %(default)s)")


def write_digits(folder: Path, *, per_class: int = 30, held_out: bool = False) -> Path:
    """A folder for each digit with so many scans, of those for training or of those held out."""
    scans = bundled.digits()
    images, labels = (scans.test_images, scans.test_labels) if held_out else (scans.train_images, scans.train_labels)
    for label in range(10):
        place = folder / str(label)
        place.mkdir(parents=True)
        for number, scan in enumerate(images[labels == label][:per_class]):
            Image.fromarray(scan).save(place / f"{number:03}.png")
    return folder


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(args.data) if args.data else write_digits(Path(temporary) / "digits")
        how = {"fine_tune_type": args.fine_tune_type, "iters": args.iters}
        fitted = fit(data, args.model, args.output, dtype="auto", say=print, **how)
        image = next(data.rglob("*.png"), None)
        for path, prediction in predict(args.output, [image] if image else []):
            print(f"{Path(path).parent.name}/{Path(path).name}: class {prediction.label}")
    print(f"{fitted.line}; drawn in {Path(args.output) / 'confusion.png'}")


if __name__ == "__main__":
    main()
