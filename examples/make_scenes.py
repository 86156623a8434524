"""Makes labelled images to try segmentation and detection with: the bundled digits, paper and all, on photographs.

python -m examples.make_scenes FOLDER [--train 1200] [--held-out 200] [--side 112] [--seed 7]

FOLDER/masks is for `fit --task segment` (images and masks), FOLDER/boxes for `fit --task detect` (COCO JSON). Scenes
for val and test hold digits that no scene for training holds; the four photographs are the same.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_aimv2 import bundled

INK = 153
"""Levels below this one are ink, three fifths of white and more are paper."""

parser = argparse.ArgumentParser(description="Digits pasted on photographs, with their exact boxes and masks.")
parser.add_argument("folder", type=Path)
parser.add_argument("--train", type=int, default=1200, help="scenes for training (default: %(default)s)")
parser.add_argument("--held-out", type=int, default=200, help="scenes for val, and as many for test")
parser.add_argument("--side", type=int, default=112, help="pixels of a side (default: %(default)s)")
parser.add_argument("--seed", type=int, default=7)


def scene(rng, photographs, scans, labels, side):
    """Up to four scans of digits on a part of a photograph: image, mask of the ink (digit + 1), [(digit, box), …]."""
    photograph = photographs[rng.integers(len(photographs))]
    part = int(rng.integers(side, min(photograph.size)))
    x, y = (int(rng.integers(0, length - part + 1)) for length in photograph.size)
    pixels = np.asarray(photograph.resize((side, side), box=(x, y, x + part, y + part)), float)
    mask, objects, taken = np.zeros((side, side), np.uint8), [], np.zeros((side, side), bool)
    for _ in range(rng.integers(1, 5)):
        i, size = rng.integers(len(scans)), int(rng.integers(side * 3 // 8, side * 4 // 7))
        y, x = rng.integers(0, side - size + 1, 2)
        scan = np.asarray(Image.fromarray(scans[i]).resize((size, size), Image.Resampling.BICUBIC))
        place, ink = (slice(y, y + size), slice(x, x + size)), scan < INK
        if taken[place].any():
            continue
        taken[place] = True
        pixels[place] = scan[..., None] * rng.uniform(0.8, 1, 3)  # paper that is not quite white
        rows, columns = np.nonzero(ink)
        mask[place][ink] = labels[i] + 1
        box = (x + columns.min(), y + rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)  # left, top, width, height
        objects.append((int(labels[i]), [int(n) for n in box]))
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)), Image.fromarray(mask), objects


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    digits, rng = bundled.digits(), np.random.default_rng(args.seed)
    photographs = [Image.open(path).convert("RGB") for path in bundled.photographs()]
    half = len(digits.test_images) // 2
    parts = {
        "train": (digits.train_images, digits.train_labels, args.train),
        "val": (digits.test_images[:half], digits.test_labels[:half], args.held_out),
        "test": (digits.test_images[half:], digits.test_labels[half:], args.held_out),
    }
    for part, (scans, labels, count) in parts.items():
        boxes, masks = args.folder / "boxes" / part, args.folder / "masks" / part
        for folder in (boxes, masks / "images", masks / "masks"):
            folder.mkdir(parents=True, exist_ok=True)
        coco = {"images": [], "annotations": [], "categories": [{"id": n, "name": str(n)} for n in range(10)]}
        for number in range(count):
            image, mask, objects = scene(rng, photographs, scans, labels, args.side)
            image.save(boxes / f"{number:05}.jpg", quality=95)
            image.save(masks / "images" / f"{number:05}.jpg", quality=95)
            mask.save(masks / "masks" / f"{number:05}.png")
            coco["images"].append(
                {"id": number, "file_name": f"{number:05}.jpg", "width": args.side, "height": args.side}
            )
            for digit, box in objects:
                entry = {"id": len(coco["annotations"]) + 1, "image_id": number, "category_id": digit, "bbox": box}
                coco["annotations"].append({**entry, "area": box[2] * box[3], "iscrowd": 0})
        (boxes / "_annotations.coco.json").write_text(json.dumps(coco), encoding="utf-8")
    names = ["background", *(str(n) for n in range(10))]
    (args.folder / "masks" / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    print(f"{args.train} scenes for training, {args.held_out} each for val and test: {args.folder}")


if __name__ == "__main__":
    main()
