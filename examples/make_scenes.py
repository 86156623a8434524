"""Makes images to try masks and boxes with: the bundled digits, paper and all, on photographs.

python -m examples.make_scenes FOLDER [--train 1200] [--held-out 200] [--side 112]

FOLDER/masks is for `fit --task segment`, FOLDER/boxes (COCO JSON) for `fit --task detect`. Scenes for val and test hold
digits that no scene for training holds; the four photographs are the same.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_aimv2 import bundled

parser = argparse.ArgumentParser(description="Digits pasted on photographs, with their exact boxes and masks.")
parser.add_argument("folder", type=Path)
parser.add_argument("--train", type=int, default=1200, help="scenes for training (default: %(default)s)")
parser.add_argument("--held-out", type=int, default=200, help="scenes for val, and as many for test")
parser.add_argument("--side", type=int, default=112, help="pixels of a side (default: %(default)s)")


def scene(rng, photograph, scans, labels, side):
    """Up to four scans on a part of a photograph: image, mask of the ink (digit + 1), [(digit, box), …]."""
    part = int(rng.integers(side, min(photograph.size)))
    x, y = (int(rng.integers(0, length - part + 1)) for length in photograph.size)
    pixels = np.asarray(photograph.resize((side, side), box=(x, y, x + part, y + part)), float)
    mask, objects, taken = np.zeros((side, side), np.uint8), [], np.zeros((side, side), bool)
    for _ in range(rng.integers(1, 5)):
        i, size = rng.integers(len(scans)), int(rng.integers(side * 3 // 8, side * 4 // 7))
        y, x = rng.integers(0, side - size + 1, 2)
        place, scan = (slice(y, y + size), slice(x, x + size)), Image.fromarray(scans[i])
        if not taken[place].any():
            levels, taken[place] = np.asarray(scan.resize((size, size), Image.Resampling.BICUBIC)), True
            pixels[place] = levels[..., None] * rng.uniform(0.8, 1, 3)  # paper that is not quite white
            mask[place][levels < 153] = labels[i] + 1  # ink: below three fifths of white
            ink = np.argwhere(levels < 153)[:, ::-1] + np.array([x, y])
            objects.append((int(labels[i]), [*ink.min(axis=0).tolist(), *(np.ptp(ink, axis=0) + 1).tolist()]))
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)), Image.fromarray(mask), objects


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    digits, rng = bundled.digits(), np.random.default_rng(7)
    photographs = [Image.open(path).convert("RGB") for path in bundled.photographs()]
    known, other = (digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)
    half, categories = len(other[0]) // 2, [{"id": n, "name": str(n)} for n in range(10)]
    parts = {"train": known, "val": [array[:half] for array in other], "test": [array[half:] for array in other]}
    for part, data in parts.items():
        boxes, masks = args.folder / "boxes" / part, args.folder / "masks" / part
        for folder in (boxes, masks / "images", masks / "masks"):
            folder.mkdir(parents=True, exist_ok=True)
        images, entries = [], []
        for number in range(args.train if part == "train" else args.held_out):
            image, mask, objects = scene(rng, photographs[rng.integers(len(photographs))], *data, args.side)
            mask.save(masks / "masks" / f"{number:05}.png")
            for folder in (boxes, masks / "images"):
                image.save(folder / f"{number:05}.jpg", quality=95)
            images.append({"id": number, "file_name": f"{number:05}.jpg", "width": args.side, "height": args.side})
            for digit, box in objects:
                entry = {"id": len(entries) + 1, "image_id": number, "category_id": digit, "bbox": box}
                entries.append({**entry, "area": box[2] * box[3], "iscrowd": 0})
        content = {"images": images, "annotations": entries, "categories": categories}
        (boxes / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8")
    (args.folder / "masks" / "classes.txt").write_text("\n".join(["background", *map(str, range(10))]) + "\n")
    print(f"{args.train} scenes for training, {args.held_out} each for val and test: {args.folder}")


if __name__ == "__main__":
    main()
