"""The page of a search shows every match, and no file name breaks it."""

import base64
import hashlib
import html.parser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from mlx_aimv2.index.page import Card, result_page, thumbnail
from tests.image_files import image, noise
from tests.programs import HANGS

HOSTILE = "<img src=x onerror=alert(1)>.jpg"


def page_of(*cards: Card, title: str = "x", about: str = "y", images: tuple[str, ...] = ()) -> str:
    return result_page([("", cards)], title=title, about=about, images=images)


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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
)


def test_the_page_shows_every_match_and_needs_nothing_else(photo_index, search):
    code, _, _ = search("in/0.png", "--html", "page.html")
    assert code == 0
    text = Path("page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("li")) == 5
    assert len(page.all("img")) == 6  # and the query
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert len(page.all("script")) == 1
    assert "http:" not in text
    assert "https:" not in text
    assert "1.000" in page.texts
    assert [line for line in page.texts if line.isdigit()] == ["1", "2", "3", "4", "5"]


def test_a_page_names_a_checkpoint_of_this_disk_by_its_folder_alone(photo_index, search):
    search("in/0.png", "--html", "page.html")
    (about,) = (line for line in Page(Path("page.html").read_text(encoding="utf-8")).texts if " nearest of " in line)
    assert about == "5 nearest of 5 images · fixed · photos.db"


def test_a_hostile_name_is_text(photo_index, search):
    search("in/0.png", "--html", "page.html")
    page = Page(Path("page.html").read_text(encoding="utf-8"))
    assert HOSTILE in page.texts
    assert not [one for one in page.all("img") if "onerror" in one]
    assert any(link["title"] == str(photo_index / "in" / HOSTILE) for link in page.all("a"))


@pytest.mark.parametrize(
    "name", ['" onload="x', "</title><script>alert(1)</script>", "a\nb", "{title}", "$title", "&amp;", "\udcff"]
)
def test_no_name_breaks_the_page(name):
    page = Page(page_of(Card(f"/x/{name}.jpg", name, 0.5), title=name, about=name, images=(f"/x/{name}.jpg",)))
    assert len(page.all("script")) == 1  # the page's own
    assert [set(link) for link in page.all("a")] == [{"href", "title"}]
    assert not page.all("a")[0]["href"].startswith("javascript")
    assert len(page.all("title")) == 1
    assert "file missing or unreadable" in page.texts


@pytest.mark.parametrize(("score", "bar"), [(-0.25, "0.0"), (0.5, "50.0"), (1.0000001, "100.0")])
def test_a_bar_is_as_long_as_the_score_and_never_shorter_than_nothing(score, bar):
    page = Page(page_of(Card("/p/a.jpg", "", score)))
    assert [one["style"] for one in page.all("i")] == [f"width:{bar}%"]


def test_a_page_may_be_called_in_capitals(photo_index, search):
    assert search("in/0.png", "--html", "PAGE.HTM")[0] == 0
    assert Path("PAGE.HTM").is_file()


def test_the_text_of_a_search_is_its_title():
    page = Page(page_of(title="“<b>two</b> cats”", about="0 of 0"))
    assert "“<b>two</b> cats”" in page.texts
    assert not page.all("b")


def test_the_page_forbids_loading_and_all_scripts_but_its_own():
    text = page_of()
    page = Page(text)
    rules = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules == [f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]


def test_a_link_leads_to_the_file_whatever_its_bytes(tmp_path):
    page = Page(page_of(Card("/p/a b#\udcff.jpg", "")))
    assert page.all("a")[0]["href"] == "file:///p/a%20b%23%FF.jpg"


def test_a_thumbnail_is_small_and_keeps_its_shape(tmp_path):
    Image.new("RGB", (3000, 1500)).save(tmp_path / "a.png")
    data = thumbnail(str(tmp_path / "a.png"))
    (tmp_path / "b.jpg").write_bytes(data)
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.size == (480, 240)
    assert thumbnail(str(tmp_path / "none.png")) is None


def test_what_is_there_of_an_image_is_enough_for_its_thumbnail(tmp_path):
    image(tmp_path / "a.jpg", (500, 300), 1)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    assert thumbnail(str(tmp_path / "a.jpg"))


def test_open_without_a_name_writes_a_page_and_shows_it(photo_index, search, monkeypatch):
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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_a_browser_shows_twelve_images_and_has_nothing_to_complain_of(tmp_path):
    files = [noise(tmp_path / f"{number}.png", number) for number in range(11)]
    files.append(noise(tmp_path / HOSTILE, 11))
    cards = [Card(str(file), "0.9", 0.9 - number / 20) for number, file in enumerate(files)]
    page = tmp_path / "page.html"
    page.write_text(page_of(*cards, images=(str(files[0]),)), encoding="utf-8")
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    image = tmp_path / "page.png"
    command += ["--window-size=1200,1300", f"--screenshot={image}", "--dump-dom", page.as_uri()]
    own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # it aborts with our OpenBLAS
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True, env=own)
    assert "CONSOLE" not in run.stderr  # where a script's errors and refusals of the page's own rules would be
    dom = Page(run.stdout)
    assert len(dom.all("li")) == 12
    assert len(dom.all("img")) == 13
    assert HOSTILE in dom.texts
    with Image.open(image) as image:  # thumbnails are there: the page is more than a few flat colours
        assert len(image.convert("RGB").resize((300, 325)).getcolors(1 << 20)) > 1000
