"""Small data and encoders for tests of training, and runs of it through its public door: the command and `learn.fit`.

Nothing here knows how training is done inside, so what is found with it holds however that is rewritten.
"""

import itertools
import json
import math
import re
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel, load
from mlx_aimv2.cli import main
from mlx_aimv2.learn import fit
from tests.small_models import FIXED, config_for, layout_for, write

ENCODER = Aimv2VisionConfig(22, 13, 2, 2, image_size=42)
"""Nine patches of 14 pixels; a block that is the first and one that is the last."""

TINY = 1e-12
"""A learning rate that changes no weight of float32: what is logged is of the weights at the start."""

WORDS = ("apple", "bear", "cloud", "door", "eagle", "fish", "grape", "house")


def write_encoder(folder: Path, config: Aimv2VisionConfig = ENCODER, *, seed: int = 3) -> Path:
    """A folder in Apple's layout with random weights, norms near one and biases near zero."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, array in tree_flatten(Aimv2VisionModel(config).parameters()):
        spread = 0.1 if array.ndim < 2 else math.prod(array.shape[1:]) ** -0.5
        values = rng.normal(float(name.endswith("norm.weight") or ".norm" in name), spread, array.shape)
        made[name] = mx.array(values.astype(np.float32))
    source = layout_for("apple", pair=False).to_source(made.items())
    write(folder, dict(source), config_for(config, "apple") | {"torch_dtype": "float32"})
    preprocessing = json.loads((FIXED / "preprocessor_config.json").read_text())
    if (size := config.image_size) is not None:
        preprocessing |= {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def arrays(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, in float32."""
    return {name: np.array(array.astype(mx.float32)) for name, array in mx.load(str(file)).items()}


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a checkpoint folder under our names."""
    model, _ = load(folder)
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def result(folder: Path) -> dict[str, bytes]:
    """All weights that a run has written, file by file, to compare them to the bit."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


# Labelled data


def _levels(rng: np.random.Generator, level: float, side: int, *, noise: float = 10) -> np.ndarray:
    return np.clip(rng.normal(level, noise, (side, side, 3)), 0, 255).astype(np.uint8)


def write_labels(folder: Path, *, per_class: int = 6, side: int = 47, seed: int = 11) -> Path:
    """A folder for each of three classes, which noise hardly hides; of six images four are for training."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(("dark", "grey", "light")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(_levels(rng, 70 + 55 * number, side, noise=40)).save(folder / name / f"{i}.png")
    return folder


def write_masks(folder: Path, *, side: int = 47) -> Path:
    """Images of which one part, of another place and size each, is light and of class 1; seven to train, three each."""
    rng = np.random.default_rng(12)
    for part, count in (("train", 7), ("val", 3), ("test", 3)):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = _levels(rng, 30, side), np.zeros((side, side), np.uint8)
            left, top, right, bottom = _box(rng, side)
            image[top:bottom, left:right] = _levels(rng, 220, side)[top:bottom, left:right]
            mask[top:bottom, left:right] = 1
            Image.fromarray(image).save(folder / part / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / part / "masks" / f"{i}.png")
    return folder


def write_boxes(folder: Path, *, side: int = 47) -> Path:
    """The like with boxes in COCO's JSON."""
    rng = np.random.default_rng(13)
    for part, count in (("train", 7), ("val", 3), ("test", 3)):
        (folder / part).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            image = _levels(rng, 30, side)
            left, top, right, bottom = _box(rng, side)
            image[top:bottom, left:right] = _levels(rng, 220, side)[top:bottom, left:right]
            Image.fromarray(image).save(folder / part / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": side, "height": side})
            box = [left, top, right - left, bottom - top]
            annotations.append(
                {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            )
        categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / part / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def _box(rng: np.random.Generator, side: int) -> tuple[int, int, int, int]:
    left, top = (int(x) for x in rng.integers(0, side // 3, 2))
    width, height = (int(x) for x in rng.integers(side // 2, 2 * side // 3, 2))
    return left, top, left + width, top + height


WRITERS = {"classify": write_labels, "segment": write_masks, "detect": write_boxes}


class Workshop:
    """A folder with the encoder and labelled data of every task, and `fit` on them; equal runs are made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encoder = write_encoder(folder / "encoder")
        self.data = {task: write(folder / task) for task, write in WRITERS.items()}
        self.heads: dict[object, Path] = {}
        self.numbers = itertools.count()

    def new(self) -> Path:
        """A path at which nothing stands yet."""
        return self.folder / f"out-{next(self.numbers)}"

    def head(self, task: str, kind: str, **settings) -> Path:
        """The head folder of a run."""
        key = (task, kind, *sorted(settings.items()))
        if key not in self.heads:
            self.heads[key] = self.new()
            fit(
                self.data[task], self.encoder, self.heads[key],
                task=task, fine_tune_type=kind, cache=self.folder / "cache", **settings,
            )  # fmt: skip
        return self.heads[key]

    def bits(self, task: str, kind: str, **settings) -> dict[str, bytes]:
        """All that the run has learned."""
        return result(self.head(task, kind, **settings))

    def info(self, task: str, kind: str, **settings) -> dict:
        """head.json of a run."""
        return json.loads((self.head(task, kind, **settings) / "head.json").read_text())

    def losses(self, task: str, kind: str, **settings) -> list[float]:
        """The loss of each step; the weights are those of the start where the rate is `TINY`."""
        history = self.info(task, kind, steps_per_eval=1, patience=0, **settings)["history"]
        return [entry["loss"] for entry in history if entry["step"] > 0]


# Images with captions

VISION = {"hidden_size": 20, "intermediate_size": 13, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 5}
DECODER = {"hidden_size": 26, "intermediate_size": 17, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER |= {"max_position_embeddings": 11}
TEXT = {"hidden_size": 14, "intermediate_size": 17, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 11}


def write_captions(folder: Path, *, captions: int = 1, count: int = 7, side: int = 23) -> Path:
    """Images whose left and right differ, each with so many captions of its own."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(8)
    rows = []
    for number, word in enumerate(WORDS[:count]):
        small = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((side, side)).save(folder / f"{number}.png")
        texts = [f"{word} {number}", f"one more {word}", f"{word} {word} there"][:captions]
        rows.append({"file_name": f"{number}.png", "text": texts})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class CaptionWorkshop:
    """A folder with captioned images, and `pretrain` and `lit` on them by the command; equal runs are made once."""

    def __init__(self, folder: Path, *, count: int = 7) -> None:
        self.folder = folder
        self.encoder = write_encoder(folder / "encoder", Aimv2VisionConfig(22, 13, 1, 2, image_size=15, patch_size=5))
        self.data = {
            captions: write_captions(folder / f"captions-{captions}", captions=captions, count=count)
            for captions in (1, 3)
        }
        self.size = folder / "size.json"
        self.size.write_text(json.dumps(VISION | {"image_size": 15, "is_native": False, "decoder_config": DECODER}))
        self.native = folder / "native.json"
        self.native.write_text(json.dumps(VISION | {"is_native": True, "decoder_config": DECODER}))
        self.text = folder / "text.json"
        self.text.write_text(json.dumps({"projection_dim": 19, "text_config": TEXT}))
        self.made: dict[object, Path] = {}
        self.numbers = itertools.count()

    def new(self) -> Path:
        """A path at which nothing stands yet."""
        return self.folder / f"out-{next(self.numbers)}"

    def words(self, verb: str, *flags: object, captions: int = 1) -> list[str]:
        """The command without its output; flags that come later count."""
        own = {
            "pretrain": ["--size", self.size, "--samples-every", 0, "--save-every", 0],
            "pretrain --native": [
                "--size", self.native, "--native", "--patches", 4, 30, "--samples-every", 0, "--save-every", 0,
            ],
            "lit": ["--encoder", self.encoder, "--config", self.text],
        }[verb]  # fmt: skip
        common = ["--batch-size", 3, "--iters", 4, "--warm-up", 1, "--learning-rate", 3e-3, "--seed", 5]
        common += ["--vocab-size", 700]
        return [str(word) for word in (verb.split()[0], self.data[captions], *own, *common, *flags)]

    def run(self, verb: str, *flags: object, captions: int = 1) -> Path:
        """The folder that a run has written."""
        key = (verb, captions, *flags)
        if key not in self.made:
            self.made[key] = self.new()
            assert main([*self.words(verb, *flags, captions=captions), "-o", str(self.made[key])]) == 0
        return self.made[key]

    def bits(self, verb: str, *flags: object, captions: int = 1) -> dict[str, bytes]:
        """All that the run has learned."""
        return result(self.run(verb, *flags, captions=captions))

    def weights(self, verb: str, *flags: object, captions: int = 1) -> dict[str, np.ndarray]:
        """The weights of the result."""
        return weights(self.run(verb, *flags, captions=captions))

    def log(self, verb: str, *flags: object, captions: int = 1) -> list[dict]:
        """The entries of log.jsonl beside the result."""
        output = self.run(verb, *flags, captions=captions)
        text = (output.with_name(f"{output.name}.training") / "log.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


# Runs that are interrupted


def stopping_at(steps: int):
    """An `on_progress` for `fit` that interrupts once so many steps are done."""

    def on_progress(done: int, total: int, unit: str) -> None:
        if unit == "steps" and done >= steps:
            raise KeyboardInterrupt

    return on_progress


class _Stderr:
    """A stderr on which a line that holds some words interrupts whoever writes it."""

    def __init__(self, words: str) -> None:
        self.words = words

    def write(self, text: str) -> int:
        if self.words in text:
            raise KeyboardInterrupt
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


@contextmanager
def stopped_by(words: str):
    """A command in this process is interrupted when it says these words."""
    before, sys.stderr = sys.stderr, _Stderr(words)
    try:
        yield
    finally:
        sys.stderr = before


@contextmanager
def files_of_at_most(size: int):
    """Whatever this process writes beyond so many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, float]:
    """How far the values of each tensor went at most."""
    assert before.keys() == after.keys()
    return {name: float(np.abs(after[name] - before[name]).max()) for name in before}


def length_of_moments(state: Path) -> float:
    """The length of the first moments in a state file, all together: of a first step's gradients, but for a factor."""
    found = [array for name, array in arrays(state).items() if re.search(r"^first/|\.m$", name)]
    assert found, sorted(arrays(state))
    return float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in found)))
