"""What does a small encoder make of half an image, with the decoder that it was pre-trained with?

python -m examples.complete [--iters N] [--output IMAGE]

Trains on a few emoji from nothing, then draws the rest of emoji after their first half and names them: the upper rows
were in the training, which has them by heart; the lower ones it never saw, and there it makes up what it knows.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from mlx_aimv2 import Aimv2VisionConfig, bundled, plot
from mlx_aimv2.pretrain import Settings, generate, open_data, pretrain
from mlx_aimv2.pretrain.objective import DecoderConfig
from mlx_aimv2.train.augment import Augmentation

parser = argparse.ArgumentParser(description="Pre-train a small encoder and let its decoder complete emoji.")
parser.add_argument("--iters", type=int, default=600, help="steps (default: %(default)s)")
parser.add_argument("--output", default="complete.png", help="image to write (default: %(default)s)")
TRAINED, SHOWN, PREFIX = 8, 2, 18


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    names = dict(list(bundled.emoji_images().items())[:: 300 // (TRAINED + SHOWN)])
    files = list(names)
    seen, unseen = files[:TRAINED], files[TRAINED : TRAINED + SHOWN]
    settings = Settings(
        vision=Aimv2VisionConfig(96, 256, 3, 3, image_size=84),
        decoder=DecoderConfig(96, 256, 2, 3, vocab_size=700, max_position_embeddings=20),
        generative=True, alpha=1.0, batch_size=TRAINED, iters=args.iters, learning_rate=3e-3, steps_per_report=50,
        samples_every=0, augmentation=Augmentation(min_area=1, flip=False),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        data.mkdir()
        rows = [{"file_name": shutil.copy(file, data).rpartition("/")[2], "text": names[file]} for file in seen]
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pretrain(open_data(data), Path(temporary) / "encoder", settings=settings, report=print)
        shown = [*seen[:SHOWN], *unseen]
        found = generate(Path(temporary) / "encoder", shown, prefix=PREFIX)
    given = found.images.copy()
    given[:, 84 * PREFIX // 36 :] = 255
    sides = zip(shown, given, found.images, strict=True)
    drawn = [[Image.open(file), *map(Image.fromarray, pair)] for file, *pair in sides]
    words = [[names[file][:18], "prefix", caption[:18]] for file, caption in zip(shown, found.captions, strict=True)]
    plot.contact_sheet(drawn, captions=words, side=168).save(args.output)
    for file, (name, _, caption) in zip(shown, words, strict=True):
        print(f"{'seen' if file in seen else 'never seen'}: {name} is called {caption!r}")
    print(f"image, prefix and completion drawn in {args.output}")


if __name__ == "__main__":
    main()
