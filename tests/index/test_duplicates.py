"""Images that are there more than once are found by their pixels; different ones that a model confuses are not."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mlx_aimv2.bundled import photographs
from mlx_aimv2.cli import main
from mlx_aimv2.index.page import GENERATOR
from mlx_aimv2.index.reader import Embedding
from mlx_aimv2.index.writer import IndexWriter
from tests.small_index import MADE, WIDTH


def resized(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    return image.resize((round(width * share), round(height * share)), Image.Resampling.LANCZOS)


def cropped(image: Image.Image, *, left: float = 0.0, top: float = 0.0, right: float = 0.0) -> Image.Image:
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round((1 - right) * width), height))


def noisy(image: Image.Image) -> Image.Image:
    levels = np.asarray(image, np.float32) + np.random.default_rng(0).normal(0, 8, (*image.size[::-1], 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


COPIES = {
    "half.png": (lambda image: resized(image, 0.5), {}),
    "three.png": (lambda image: resized(image, 1.6), {}),
    "poor.jpg": (lambda image: image, {"quality": 30}),
    "crop.png": (lambda image: cropped(image, left=0.03, top=0.03, right=0.03), {}),
    "edge.png": (lambda image: cropped(image, right=0.05), {}),
    "noise.png": (noisy, {}),
}


def clock(hour: int, size: int = 150) -> Image.Image:
    """A clock, of which a model may not see the hour."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((5, 5, size - 5, size - 5), outline="black", width=6)
    angle = np.pi * (hour / 6 - 0.5)
    middle, length = size / 2, 0.35 * size
    draw.line((middle, middle, middle + length * np.cos(angle), middle + length * np.sin(angle)), fill="black", width=7)
    return image


def indexed(name: str | Path, vectors: dict[Path, np.ndarray]) -> None:
    with IndexWriter.create(name, provenance=MADE, width=WIDTH, dtype="float32") as index:
        index.add(
            Embedding(
                str(path.absolute()),
                path.stat().st_size,
                path.stat().st_mtime_ns,
                hashlib.sha256(path.read_bytes()).digest(),
                vector,
            )
            for path, vector in vectors.items()
        )


@pytest.fixture
def found(tmp_path, monkeypatch, capsys):
    """Runs the verb on files that all have nearly the same vector: `found(paths, *flags) -> exit code, groups, err`."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)

    def run(paths: list[Path], *flags: str) -> tuple[int, list[tuple[str, list[str]]], str]:
        indexed("photos.db", {path: np.ones(WIDTH) + rng.normal(0, 0.01, WIDTH) for path in paths})
        code = main(["duplicates", "photos.db", "--json", *flags])
        out, err = capsys.readouterr()
        groups = json.loads(out)["groups"]
        return code, [(one["kind"], [Path(image["path"]).name for image in one["images"]]) for one in groups], err

    return run


def test_copies_in_another_size_quality_or_crop_are_one_image(tmp_path, found):
    paths = []
    for photograph in photographs():
        with Image.open(photograph) as opened:
            image = resized(opened.convert("RGB"), 0.4)
        original = tmp_path / f"{photograph.stem}-original.png"
        image.save(original)
        paths.append(original)
        for name, (change, options) in COPIES.items():
            paths.append(tmp_path / f"{photograph.stem}-{name}")
            change(image).save(paths[-1], **options)
    code, groups, err = found(paths)
    assert code == 0
    assert err == ""
    assert [kind for kind, _ in groups] == ["image"] * len(photographs())
    for _, names in groups:
        assert len(names) == 1 + len(COPIES)
        assert len({name.split("-")[0] for name in names}) == 1
        assert names[0].endswith("three.png")  # the one with the most pixels is to be kept


def test_two_drawings_that_differ_in_a_hand_are_two(tmp_path, found):
    paths = []
    for hour in range(1, 12, 2):
        paths.append(tmp_path / f"{hour}.png")
        clock(hour).save(paths[-1])
    assert found(paths)[1] == []


def test_small_versions_do_not_join_what_their_originals_keep_apart(tmp_path, found):
    """At 24 pixels the mark is hardly there: a small version belongs to one of the two drawings, or to none."""
    paths = []
    for place in (40, 100):
        image = clock(3)
        ImageDraw.Draw(image).rectangle((place, 100, place + 5, 105), fill=(120, 120, 120))
        paths += [tmp_path / f"{place}.png", tmp_path / f"{place}-small.png"]
        image.save(paths[-2])
        resized(image, 0.16).save(paths[-1])
    _, groups, _ = found(paths)
    assert groups
    assert not any({"40.png", "100.png"} <= set(names) for _, names in groups)


def test_kinds_are_told_apart_and_one_of_each_group_is_similar(tmp_path, found):
    clock(3).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    clock(8).save(tmp_path / "c.png")
    clock(8).save(tmp_path / "d.jpg", quality=90)
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png", "d.jpg")]
    same = [
        ("file", ["a.png", "b.png"]),
        ("image", sorted(["c.png", "d.jpg"], key=lambda name: -(tmp_path / name).stat().st_size)),
    ]
    assert found(paths)[1] == same
    (tmp_path / "photos.db").unlink()
    assert found(paths, "--similar")[1] == [
        *same,
        ("similar", sorted(["a.png", same[1][1][0]], key=lambda name: -(tmp_path / name).stat().st_size)),
    ]
    (tmp_path / "photos.db").unlink()
    assert found(paths, "--similar", "1")[1] == same


def test_what_could_go_is_a_list_for_the_shell_and_nothing_goes(tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    clock(3).save(tmp_path / "in" / "a\n.png")
    shutil.copy(tmp_path / "in" / "a\n.png", tmp_path / "b.png")
    paths = [tmp_path / "in" / "a\n.png", tmp_path / "b.png"]
    indexed("photos.db", {path: np.ones(WIDTH) for path in paths})
    assert main(["duplicates", "photos.db", "-0"]) == 0
    assert capfdbinary.readouterr().out == bytes(paths[0]) + b"\0"
    assert main(["duplicates", "photos.db", "-0", "--under", "in"]) == 0
    assert capfdbinary.readouterr().out == b""
    assert main(["duplicates", "photos.db"]) == 0
    text = capfdbinary.readouterr().out.decode()
    assert "the same file, 2 files" in text
    assert f"keep        150 x 150         {paths[1].stat().st_size:,}  {paths[1]}" in text
    assert "1 group; all but the first of each, not counting the similar ones, take 0.0 MB" in text
    assert all(path.is_file() for path in paths)


def test_the_page_has_the_groups_and_their_sizes(tmp_path, found):
    clock(3).save(tmp_path / "a.png")
    resized(clock(3), 2).save(tmp_path / "b.png")
    found([tmp_path / "a.png", tmp_path / "b.png"], "--html", "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert GENERATOR.decode() in page
    assert "<h2>The same image, 2 files</h2>" in page
    assert page.index("300 × 300") < page.index("150 × 150")


def test_an_image_that_is_gone_is_named_and_the_others_are_compared(tmp_path, monkeypatch, capsys):
    for name in "abc":
        resized(clock(3), ord(name) / 100).save(tmp_path / f"{name}.png")
    indexed(tmp_path / "photos.db", {tmp_path / f"{name}.png": np.ones(WIDTH) for name in "abc"})
    (tmp_path / "a.png").rename(tmp_path / "gone.png")
    monkeypatch.chdir(tmp_path)
    assert main(["duplicates", "photos.db", "--similar", "3"]) == 2
    assert "--similar must be a cosine from -1 to 1, got 3" in capsys.readouterr().err
    assert main(["duplicates", "photos.db", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == f"mlx-aimv2: {tmp_path / 'a.png'} is missing or unreadable\n"
    assert [Path(one["path"]).name for one in json.loads(out)["groups"][0]["images"]] == ["c.png", "b.png"]


def test_an_index_with_one_image_has_no_duplicates(tmp_path, found):
    clock(3).save(tmp_path / "a.png")
    assert found([tmp_path / "a.png"])[:2] == (0, [])
