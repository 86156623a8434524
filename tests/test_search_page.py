"""Does search find what it should, refuse what cannot be compared, and draw a page that no file name can break?"""

import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from mlx_aimv2.index.html import result_page, thumbnail
from mlx_aimv2.index.reader import Index, Match
from mlx_aimv2.index.writer import IndexWriter
from tests.small_lit import COLOURS, colour_lit, write

REFERENCE = Path(__file__).parent / "golden" / "reference"
HOSTILE = "<img src=x onerror=alert(1)>.jpg"


def plain(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (50, 44), colour).save(path)
    return path


def noise(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(low).resize((60, 50), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """An index of five images, one of them with a hostile name."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        noise(tmp_path / "in" / f"{number}.png", number)
    noise(tmp_path / "in" / HOSTILE, 9)
    assert main(["embed", "in", "-m", str(REFERENCE / "fixed"), "-o", "photos.db"]) == 0
    return tmp_path


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """An index made with a LiT model that knows three colours by name."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "lit", model=colour_lit())
    for axis, name in enumerate(COLOURS):
        plain(tmp_path / "in" / f"{axis}.png", tuple(220 if i == axis else 20 for i in range(3)))
        assert name
    assert main(["embed", "in", "-m", "lit", "-o", "photos.db"]) == 0
    return tmp_path


@pytest.fixture
def search(capsys):
    """Runs `mlx-aimv2 search photos.db …`: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["search", "photos.db", *arguments])
        return code, *capsys.readouterr()

    return run


def test_an_image_of_the_index_is_found_without_a_model(photos, search, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.embed.provenance.load_with_origin", None)
    code, out, err = search("in/2.png", "-k", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0] == f" 1.0000  {photos / 'in' / '2.png'}"
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)


def test_any_other_image_goes_through_the_model(photos, search):
    shutil.copy("in/1.png", "query.png")
    _, out, _ = search("query.png", "-k", "1", "--json")
    found = json.loads(out)
    assert found["query"] == "query.png"
    assert found["images"] == 5
    assert found["matches"] == [{"path": str(photos / "in" / "1.png"), "score": pytest.approx(1, abs=1e-5)}]


def test_an_image_that_changed_since_is_embedded_as_it_is_now(photos, search):
    shutil.copy("in/1.png", "in/0.png")
    _, out, _ = search("in/0.png", "-k", "1", "--json")
    assert json.loads(out)["matches"][0]["path"].endswith("1.png")


@pytest.mark.parametrize("word", COLOURS)
def test_a_text_finds_the_images_it_fits(colours, search, word):
    code, out, _ = search(f"something {word}", "-k", "1", "--json")
    assert code == 0
    assert Path(json.loads(out)["matches"][0]["path"]).name == f"{COLOURS.index(word)}.png"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("a cat", "a text cannot be compared with: give an image, or embed with apple/aimv2-large-patch14-224-lit"),
        ("cat.jpg", "cat.jpg does not exist: give an image or a text"),
        ("./cat", "does not exist"),
        ("in", "is a folder"),
        (" ", "empty"),
        ("notes.txt", "is not an image"),
    ],
)
def test_a_query_that_cannot_be_is_one_line(photos, search, query, message):
    Path("notes.txt").write_text("no image")
    code, out, err = search(query)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_other_weights_are_refused_by_name(photos, search):
    noise(photos / "query.png", 30)
    code, _, err = search("query.png", "-m", str(REFERENCE / "outlier"))
    assert code == 2
    assert "the weights" in err
    assert str(REFERENCE / "outlier") in err
    assert "width: 96 there, 128 here" in err


def test_the_same_weights_at_other_bits_are_a_note(photos, search):
    noise(photos / "query.png", 30)
    _, dense, _ = search("query.png", "--json")
    convert(REFERENCE / "fixed", "eight", quantize=True, q_bits=8, q_group_size=32, verify=False)
    code, out, err = search("query.png", "--json", "-m", "eight")
    assert code == 0
    assert "quantization: none there, bits=8 group_size=32 mode=affine here" in err
    assert [one["path"] for one in json.loads(out)["matches"]] == [one["path"] for one in json.loads(dense)["matches"]]


def test_a_model_that_moved_is_asked_for(tmp_path, monkeypatch, search):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REFERENCE / "fixed", "model")
    noise(tmp_path / "in" / "0.png", 0)
    assert main(["embed", "in", "-m", "model", "-o", "photos.db"]) == 0
    Path("model").rename("moved")
    noise(tmp_path / "query.png", 1)
    code, _, err = search("query.png")
    assert code == 2
    assert "-m says where it is now" in err
    assert search("query.png", "-m", "moved")[0] == 0


def test_an_index_from_python_without_a_description_is_refused(tmp_path, monkeypatch, search):
    monkeypatch.chdir(tmp_path)
    IndexWriter.create("photos.db", provenance={}, width=5, dtype="float16").close()
    code, _, err = search(str(noise(tmp_path / "query.png", 1)))
    assert code == 2
    assert "does not say which model made it" in err


def test_maps_cannot_be_searched(tmp_path, monkeypatch, search):
    monkeypatch.chdir(tmp_path)
    noise(tmp_path / "in" / "0.png", 0)
    assert main(["embed", "in", "-m", str(REFERENCE / "fixed"), "-o", "photos.db", "--pool", "map"]) == 0
    code, _, err = search("in/0.png")
    assert code == 2
    assert "holds a map for each image" in err


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: elements, texts, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_shows_every_match_and_needs_nothing_else(photos, search):
    code, _, _ = search("in/0.png", "--html", "page.html")
    assert code == 0
    text = Path("page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("li")) == 5
    assert len(page.all("img")) == 6  # and the query
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not page.all("script")
    assert "http:" not in text
    assert "https:" not in text
    assert "1.000" in page.texts


def test_a_hostile_name_is_text(photos, search):
    search("in/0.png", "--html", "page.html")
    page = Page(Path("page.html").read_text(encoding="utf-8"))
    assert HOSTILE in page.texts
    assert not [one for one in page.all("img") if "onerror" in one]
    assert any(link["title"] == str(photos / "in" / HOSTILE) for link in page.all("a"))


@pytest.mark.parametrize(
    "name", ['" onload="x', "</title><script>alert(1)</script>", "a\nb", "{title}", "$title", "&amp;", "\udcff"]
)
def test_no_name_breaks_the_page(name):
    page = Page(result_page([Match(f"/x/{name}.jpg", 0.5)], image=f"/x/{name}.jpg", about=name))
    assert not page.all("script")
    assert [set(link) for link in page.all("a")] == [{"href", "title"}]
    assert not page.all("a")[0]["href"].startswith("javascript")
    assert len(page.all("title")) == 1
    assert "cannot be read any more" in page.texts


def test_the_text_of_a_search_is_its_title():
    page = Page(result_page([], text="<b>two</b> cats", about="0 of 0"))
    assert "“<b>two</b> cats”" in page.texts
    assert not page.all("b")


def test_the_page_forbids_scripts_and_loading():
    page = Page(result_page([], text="x", about="y"))
    rules = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert rules == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_link_leads_to_the_file_whatever_its_bytes(tmp_path):
    page = Page(result_page([Match("/p/a b#\udcff.jpg", 0.1)], text="x", about="y"))
    assert page.all("a")[0]["href"] == "file:///p/a%20b%23%FF.jpg"


def test_a_thumbnail_is_small_and_keeps_its_shape(tmp_path):
    Image.new("RGB", (3000, 1500)).save(tmp_path / "a.png")
    data = thumbnail(str(tmp_path / "a.png"))
    (tmp_path / "b.jpg").write_bytes(data)
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.size == (480, 240)
    assert thumbnail(str(tmp_path / "none.png")) is None


def test_open_without_a_name_writes_a_page_and_shows_it(photos, search, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    code, _, err = search("in/0.png", "--open")
    assert code == 0
    (address,) = opened
    page = Path(address.removeprefix("file://"))
    assert str(page) in err
    assert len(Page(page.read_text(encoding="utf-8")).all("li")) == 5
    page.unlink()
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    _, _, err = search("in/0.png", "--open", "--html", "page.html")
    assert "no browser could be opened: open page.html yourself" in err


def test_info_says_what_an_index_holds(photos, capsys):
    capsys.readouterr()
    assert main(["info", "photos.db", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 5
    assert facts["pool"] == "mean"
    assert facts["checkpoint"] == str(REFERENCE / "fixed")
    assert facts["holds"] == "one vector for each image, width 96, float16"
    assert main(["info", "photos.db"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"images +5", line) for line in lines)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("fixed", {"layout": "apple", "width": 96, "encoders": "vision", "bits_per_weight": 32.0}),
        ("native", {"images": "any size (native)", "projection": None}),
        ("lit", {"encoders": "vision and text", "pooling_head": True, "projection": 40}),
    ],
)
def test_info_says_what_a_checkpoint_holds(capsys, name, facts):
    assert main(["info", str(REFERENCE / name), "--json"]) == 0
    assert facts.items() <= json.loads(capsys.readouterr().out).items()
    assert main(["info", str(REFERENCE / name)]) == 0


def test_info_says_how_a_folder_was_quantized(tmp_path, capsys):
    convert(REFERENCE / "fixed", tmp_path / "q", quantize=True, q_group_size=32, verify=False)
    assert main(["info", str(tmp_path / "q"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "mlx-aimv2"
    assert found["quantization"]["bits"] == 4
    assert found["parameters"] == 307008
    assert 4 < found["bits_per_weight"] < 16


def test_info_about_nothing_is_one_line(tmp_path, capsys):
    assert main(["info", str(tmp_path / "none.db")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_index_module_reads_what_the_command_wrote(photos):
    with Index.open("photos.db") as index:
        query = index.vector(str(photos / "in" / "3.png"))
        assert [Path(match.path).name for match in index.search(query, 1)] == ["3.png"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_a_browser_shows_twelve_images_and_has_nothing_to_complain_of(tmp_path):
    files = [noise(tmp_path / f"{number}.png", number) for number in range(11)]
    files.append(noise(tmp_path / HOSTILE, 11))
    matches = [Match(str(file), 0.9 - number / 20) for number, file in enumerate(files)]
    page = tmp_path / "page.html"
    page.write_text(result_page(matches, image=str(files[0]), about="12 of 12"), encoding="utf-8")
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    image = tmp_path / "page.png"
    command += ["--window-size=1200,1300", f"--screenshot={image}", "--dump-dom", page.as_uri()]
    own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # it aborts with our OpenBLAS
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=own)
    assert "CONSOLE" not in run.stderr  # where a script's errors and refusals of the page's own rules would be
    dom = Page(run.stdout)
    assert len(dom.all("li")) == 12
    assert len(dom.all("img")) == 13
    assert HOSTILE in dom.texts
    with Image.open(image) as image:  # thumbnails are there: the page is more than a few flat colours
        assert len(image.convert("RGB").resize((300, 325)).getcolors(1 << 20)) > 1000
