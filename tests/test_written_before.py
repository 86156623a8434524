"""Files that commit 94fe4ed wrote are read by the code of today: MLX folders, an index, heads of every type, adapters.

They lie in tests/golden/written with what that commit predicted from them. `write` made them, called there as
`python -c "from tests.test_written_before import write; write()"`; it is here so that one can see how.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import Aimv2VisionConfig, load
from mlx_aimv2.cli import main
from mlx_aimv2.index import Index
from mlx_aimv2.learn import fit, predict
from tests.small_training import WRITERS, write_encoder

WRITTEN = Path(__file__).parent / "golden" / "written"
IMAGES = sorted((WRITTEN / "images").glob("*.png"))
FLOAT32 = 2.0**-23

CONFIG = Aimv2VisionConfig(32, 32, 1, 2, image_size=12, patch_size=4)
"""The smallest that can be quantized in groups of 32."""

SHORT = {"iters": 2, "batch_size": 4}
HEADS = {
    "classify-linear": {},
    "classify-knn": {},
    "classify-attentive": SHORT,
    "classify-lora": SHORT | {"lora_rank": 2},
    "classify-dora": SHORT | {"lora_rank": 2},
    "classify-full": SHORT,
    "segment-linear": SHORT,
    "segment-decoder": SHORT,
    "detect-decoder": SHORT,
}
"""Task and type -> how it was trained."""


def write(place: Path = Path("/written")) -> None:
    """Makes all files at a place that says nothing of the machine, takes them into the tests, and what they predict."""
    source = write_encoder(place / "source", CONFIG, seed=5)
    own = ["convert", "--hf-path", source, "--dtype", "float32", "--no-verify", "--mlx-path"]
    rng = np.random.default_rng(6)
    (place / "images").mkdir()
    for number in range(3):
        level = np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3), np.uint8), 4, axis=0), 4, axis=1)
        Image.fromarray(level).save(place / "images" / f"{number}.png")
    commands = [
        [*own, place / "encoder"],
        [*own, place / "quantized", "-q", "--q-bits", "4", "--q-group-size", "32"],
        ["embed", place / "images", "-m", place / "encoder", "-o", place / "photos.db"],
    ]
    for command in commands:
        assert main([str(word) for word in command]) == 0
    for name, settings in HEADS.items():
        task, kind = name.split("-")
        data = place / task
        if not data.exists():
            WRITERS[task](data, side=16)
        fit(data, place / "encoder", place / name, task=task, fine_tune_type=kind, cache=place / "cache", **settings)
        for file in (place / name).iterdir():
            if file.suffix not in (".json", ".safetensors"):
                file.unlink()  # the card
    for name in ("images", "encoder", "quantized", "photos.db", *HEADS):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copy
        copy(place / name, WRITTEN / name)
    images = sorted((WRITTEN / "images").glob("*.png"))
    found = {name: tokens_of(name, images) for name in ("encoder", "quantized")}
    for name in HEADS:
        found |= {f"{name}/{i}/{key}": array for i, one in enumerate(told(name, images)) for key, array in one.items()}
    np.savez_compressed(WRITTEN / "expected.npz", **found)


def tokens_of(name: str, images: list[Path]) -> np.ndarray:
    """The tokens of all images by a folder's encoder."""
    model, processor = load(WRITTEN / name)
    return np.array(model(processor(images)).last_hidden_state)


def told(name: str, images: list[Path]) -> list[dict[str, np.ndarray]]:
    """What a head says of each image."""
    names = ("probabilities", "labels", "confidence", "boxes", "scores")
    predictions = predict(WRITTEN / name, [str(path) for path in images], model=str(WRITTEN / "encoder"))
    return [
        {key: np.array(getattr(one, key)) for key in names if isinstance(getattr(one, key, 0), np.ndarray)}
        for _, one in predictions
    ]


@pytest.fixture(scope="module")
def expected():
    with np.load(WRITTEN / "expected.npz") as file:
        return dict(file)


def assert_near(found, wanted):
    """Equal but for what another order of float32's sums does, with room for a hundred of them."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max(initial=0) <= 1000 * FLOAT32 * max(1, np.abs(wanted).max(initial=0))


@pytest.mark.parametrize("name", ["encoder", "quantized"])
def test_an_mlx_folder_is_read(name, expected):
    assert_near(tokens_of(name, IMAGES), expected[name])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_read_and_says_the_same(name, expected):
    for i, one in enumerate(told(name, IMAGES)):
        for key, array in one.items():
            wanted = expected[f"{name}/{i}/{key}"]
            if key == "labels":
                assert array.shape == wanted.shape and (array == wanted).mean() > 0.98  # but for ties
            else:
                assert_near(array, wanted)


def test_an_index_is_read_and_gone_on_with(tmp_path, monkeypatch, capsys):
    index = shutil.copy(WRITTEN / "photos.db", tmp_path / "photos.db")
    with Index.open(index) as found:
        paths = list(found.paths())
        assert [Path(path).name for path in paths] == [image.name for image in IMAGES]
        vectors = [found.vector(path) for path in paths]
        assert [match.path for match in found.search(vectors[1], k=1)] == [paths[1]]
    model, processor = load(WRITTEN / "encoder")
    for vector, own in zip(vectors, np.array(model.encode_image(processor(IMAGES))), strict=True):
        cosine = vector @ own / np.linalg.norm(vector) / np.linalg.norm(own)
        assert cosine > 1 - 2.0**-10  # it is stored in half precision
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (17, 19), (9, 99, 200)).save(tmp_path / "more.png")
    assert main(["embed", "more.png", "-m", str(WRITTEN / "encoder"), "-o", "photos.db"]) == 0
    capsys.readouterr()
    assert main(["search", "photos.db", "more.png", "-m", str(WRITTEN / "encoder"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == len(found["matches"]) == 4
    assert found["matches"][0]["path"] == str(tmp_path / "more.png")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_fused_and_gone_on_with(kind, tmp_path, expected):
    head = WRITTEN / f"classify-{kind}"
    fused = tmp_path / "fused"
    assert main(["fuse", "--adapter-path", str(head), "-m", str(WRITTEN / "encoder"), "--save-path", str(fused)]) == 0
    model, processor = load(fused)
    assert np.array(model(processor(IMAGES)).last_hidden_state).shape == expected["encoder"].shape
    data = WRITERS["classify"](tmp_path / "data", side=16)
    fit(
        data, WRITTEN / "encoder", tmp_path / "more", fine_tune_type=kind, adapter_path=str(head), iters=1,
        batch_size=4, cache=tmp_path / "cache",
    )  # fmt: skip
