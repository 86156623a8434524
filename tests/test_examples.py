"""Every example runs on the embedded checkpoint and ends in an image or a number, in at most sixty lines."""

import importlib.util
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import bundled, load, plot
from mlx_aimv2.index import Match
from mlx_aimv2.serve import plane

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(file for file in FOLDER.glob("*.py") if file.stem not in ("demo_picture", "make_scenes"))

PIXELS = mx.random.normal((1, 84, 84, 3), key=mx.random.key(1))


def imported(file: Path):
    spec = importlib.util.spec_from_file_location(f"example_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, capsys, *flags: str) -> str:
    imported(FOLDER / f"{name}.py").main([str(flag) for flag in flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_one_short_idea_and_is_listed(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60
    assert f"`{file.name}`" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_features_are_printed_and_end_in_two_maps_beside_the_photograph(tmp_path, capsys):
    out = run("features", capsys, "--output", tmp_path / "features.png")
    assert "(1, 576, 192)" in out
    with Image.open(tmp_path / "features.png") as image:
        assert image.size == (3 * 672 + 2 * 8, 672)
        seen, colours, similar = (np.asarray(image)[:, left : left + 672] for left in (0, 680, 1360))
    assert (colours[:28, :28] == colours[0, 0]).all() and (colours[:28, 28:56] != colours[0, 0]).any()
    assert tuple(similar[8 * 28, 12 * 28]) == plot.PAPER
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 10_000


def test_words_and_an_image_rank_images(tmp_path, capsys):
    flags = ["--output", tmp_path / "search.png"]
    out = run("search", capsys, *flags)
    cosines = [float(line.split()[0]) for line in out.splitlines()]
    assert len(cosines) == 60 and cosines == sorted(cosines, reverse=True)
    photographs = bundled.photographs()
    out = run("search", capsys, photographs[2], *photographs, *flags)
    assert out.splitlines()[0].split() == ["1.0000", str(photographs[2])]
    with Image.open(tmp_path / "search.png") as image:
        assert image.width == 4 * 106 + 10


def test_labels_are_drawn_below_their_images(tmp_path, capsys):
    out = run("zero_shot", capsys, "--output", tmp_path / "labels.png")
    labels = [line.split(": ")[1].split()[0] for line in out.splitlines()]
    assert labels == ["animal", "plant", "face", "hand", "square", "animal", "plant", "face"]
    with Image.open(tmp_path / "labels.png") as image:
        assert image.width == 8 * 106 + 10


def test_converting_to_half_precision_hardly_turns_the_feature(capsys):
    out = run("convert_and_load", capsys, "--dtype", "float16")
    assert 0.999 < float(re.search(r"feature (\d\.\d+)", out)[1]) < 1.0000005
    assert "7.61 MB" in out


@pytest.mark.slow
@pytest.mark.parametrize(("task", "score"), [("segment", "miou"), ("detect", "ap")])
def test_a_head_for_masks_and_boxes_ends_in_overlays(task, score, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    flags = ["--scenes", "12", "--iters", "2", "--image-size", "56", "--output", tmp_path / "overlays.jpg"]
    out = run("masks_and_boxes", capsys, "--task", task, *flags)
    assert re.search(rf"^{score} \d+\.\d+ % on 2 test images", out, re.MULTILINE)
    with Image.open(tmp_path / "overlays.jpg") as image:
        assert image.height == 2 * 300 + 8


@pytest.mark.parametrize("kind", ["linear", pytest.param("lora", marks=pytest.mark.slow)])
def test_labels_are_learned_and_end_in_a_score_and_a_confusion_matrix(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    steps = ["--iters", 4] if kind == "lora" else []
    out = run("probe", capsys, "--fine-tune-type", kind, *steps, "--output", tmp_path / "head")
    assert float(re.search(r"top1 ([\d.]+) % on \d+ test images", out)[1]) >= 90
    assert (tmp_path / "head" / "adapters.safetensors").is_file() == (kind == "lora")
    with Image.open(tmp_path / "head" / "confusion.png") as image:
        assert image.width > 300


@pytest.mark.slow
def test_images_are_completed_and_named(tmp_path, capsys):
    out = run("complete", capsys, "--iters", 2, "--output", tmp_path / "complete.png")
    assert len(re.findall(r"^seen: .+ is called '", out, re.MULTILINE)) == 2
    assert len(re.findall(r"^never seen: .+ is called '", out, re.MULTILINE)) == 2
    with Image.open(tmp_path / "complete.png") as image:
        assert image.width > 3 * 168 and image.height > 4 * 168


@pytest.mark.slow
def test_a_loop_of_ones_own_learns_and_leaves_a_checkpoint(tmp_path, capsys):
    out = run("own_loop", capsys, "--output", tmp_path / "tuned")
    first, last = (float(loss) for loss in re.findall(r"loss (\d+\.\d+)", out))
    assert last < 0.7 * first
    assert int(re.search(r"(\d+)% of 100 held-out digits", out)[1]) >= 40
    tuned, before = (
        load(folder)[0].encode_image(PIXELS) for folder in (tmp_path / "tuned", bundled.emoji_checkpoint())
    )
    assert not mx.allclose(tuned, before, atol=1e-3)


@pytest.mark.slow
def test_a_connected_language_model_learns_the_names_of_images(capsys):
    out = run("connector", capsys)
    first, last = (float(loss) for loss in re.findall(r"loss (\d+\.\d+)", out))
    assert last < 0.5 * first


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo, started in a folder of its own, with few steps of t-SNE."""
    monkeypatch.setattr(plane, "STEPS", 5)
    monkeypatch.chdir(tmp_path)
    return imported(FOLDER / "demo.py")


@pytest.mark.slow
def test_the_demo_replaces_an_earlier_one_and_what_it_draws_is_right(demo, tmp_path, capfd, monkeypatch):
    drawn = {}
    draw = demo.demo_picture.draw
    monkeypatch.setattr(demo.demo_picture, "draw", lambda *found: drawn.update(found=found) or draw(*found))
    (tmp_path / "demo-output" / "emoji-mlx").mkdir(parents=True)
    (tmp_path / "demo-output" / "emoji-mlx" / "old.txt").touch()
    demo.main()
    out = capfd.readouterr().out
    assert "300 images (300 embedded)" in out
    assert re.search(r"top1 \d+\.\d+ % on 100 test images", out)
    output = tmp_path / "demo-output"
    assert (output / "emoji-mlx" / "model.safetensors").is_file()
    assert not (output / "emoji-mlx" / "old.txt").exists()
    assert "<img" in (output / "search.html").read_text(encoding="utf-8")
    with Image.open(output / "demo.png") as image:
        assert image.width > 1200
    _, found, stored, classes, _ = drawn["found"]
    hits = {words: {Path(path).stem for path in paths} for words, paths in found.items()}
    assert hits["animal"] == {"horse-face", "cockroach", "blowfish", "cow", "kangaroo"}
    assert hits["plant"] == {"leaf-fluttering-in-wind", "four-leaf-clover", "shamrock", "bouquet", "hibiscus"}
    assert list(classes.values()) == list(demo.LABELLED.values())
    assert len(stored) == 300


@pytest.mark.slow
def test_the_demo_fails_where_features_are_wrong(demo, monkeypatch):
    monkeypatch.setattr(demo.Index, "search", lambda index, *query, **how: [Match(next(iter(index.paths())), 1.0)])
    with pytest.raises(SystemExit, match="this installation computes wrong"):
        demo.main()
