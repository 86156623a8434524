"""Every example runs on the embedded checkpoint and ends in an image or a number, in under sixty lines."""

import importlib.util
import re
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

from mlx_aimv2 import bundled, load
from mlx_aimv2.serve import plane

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(
    file for file in FOLDER.glob("*.py") if file.stem not in ("demo", "titled", "tsne", "make_scenes", "__init__")
)

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
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60
    assert f"`{file.name}`" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_features_end_in_a_map(tmp_path, capsys):
    out = run("features", capsys, "--output", tmp_path / "map.png")
    assert "(1, 36, 192)" in out
    with Image.open(tmp_path / "map.png") as image:
        assert image.size == (672, 672)


def test_the_faces_are_ranked_by_their_likeness_to_the_first(tmp_path, capsys):
    out = run("most_similar", capsys, "--output", tmp_path / "ranking.png")
    cosines = [float(number) for number in re.findall(r"^ *\d+  (\d\.\d+)", out, re.MULTILINE)]
    assert len(cosines) == 8
    assert cosines == sorted(cosines, reverse=True)
    query, best = re.search(r"most like (.+): (.+); drawn", out).groups()
    assert query != best
    assert {query, best} <= set(bundled.emoji_images().values())
    assert (tmp_path / "ranking.png").is_file()


def test_an_image_is_most_like_itself(tmp_path, capsys):
    cat, coffee = bundled.photographs()[1:3]
    out = run("most_similar", capsys, cat, coffee, cat, "--output", tmp_path / "ranking.png")
    assert out.splitlines()[0].endswith(f"1.000  {cat}")


def test_a_patch_finds_its_likes(tmp_path, capsys):
    out = run("patch_similarity", capsys, "--patch", "0,3", "--output", tmp_path / "map.png")
    assert re.search(r"most like patch 0,3 is [0-3],[0-3] \(cosine -?0\.\d+\)", out)
    with Image.open(tmp_path / "map.png") as image:
        assert image.size == (672, 672)


def test_converting_to_half_precision_hardly_turns_the_feature(capsys):
    out = run("convert_and_load", capsys, "--dtype", "float16")
    assert 0.999 < float(re.search(r"feature (\d\.\d+)", out)[1]) < 1.0000005
    assert "7.61 MB" in out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "score"), [("segmentation", "miou"), ("detection", "ap")])
def test_a_head_for_masks_and_boxes_ends_in_overlays(name, score, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    flags = ["--scenes", "12", "--iters", "2", "--image-size", "56", "--output", tmp_path / "overlays.jpg"]
    out = run(name, capsys, *flags)
    assert re.search(rf"^{score} \d+\.\d+ % on 2 test images", out, re.MULTILINE)
    with Image.open(tmp_path / "overlays.jpg") as image:
        assert image.height == 2 * 300 + 8


def test_a_probe_ends_in_its_score_and_a_confusion_matrix(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    out = run("probe", capsys, "--output", tmp_path / "head")
    assert float(re.search(r"top1 ([\d.]+) % on \d+ test images", out)[1]) >= 90
    with Image.open(tmp_path / "head" / "confusion.png") as image:
        assert image.width > 300


@pytest.mark.slow
def test_lora_ends_in_a_score_and_a_fused_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    out = run("lora", capsys, "--output", tmp_path / "head", "--iters", 4)
    assert float(re.search(r"top1 ([\d.]+) % on \d+ test images", out)[1]) >= 90
    assert (tmp_path / "head-fused" / "model.safetensors").is_file()


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


def test_the_demo_fails_where_features_are_wrong(monkeypatch):
    demo = imported(FOLDER / "demo.py")
    names = bundled.emoji_images()
    query, other = bundled.ASSETS / "noto" / demo.QUERY, next(iter(names))
    row = f"like the {names[query]}"
    demo.check({row: [query]}, names, 0.9)
    for found, accuracy in ((other, 0.9), (query, 0.5)):
        with pytest.raises(SystemExit, match="something is wrong with this installation"):
            demo.check({row: [found]}, names, accuracy)


@pytest.mark.slow
def test_the_demo_replaces_an_earlier_one_and_says_where_everything_lies(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(plane, "STEPS", 5)
    (tmp_path / "emoji-mlx").mkdir()
    (tmp_path / "emoji-mlx" / "old.txt").touch()
    imported(FOLDER / "demo.py").main(["--output", str(tmp_path)])
    out = capfd.readouterr().out
    assert "300 images (300 embedded)" in out
    assert re.search(r"top1 \d+\.\d+ % on 100 test images", out)
    assert str(tmp_path / "demo.png") in out
    assert (tmp_path / "emoji-mlx" / "model.safetensors").is_file()
    assert not (tmp_path / "emoji-mlx" / "old.txt").exists()
    assert "<img" in (tmp_path / "search.html").read_text(encoding="utf-8")
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 1200
