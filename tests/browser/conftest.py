"""A running server and a page of it in Debian's Chromium, driven by playwright (extra `browser`; `make browser`)."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from mlx_aimv2 import bundled
from mlx_aimv2.cli import main
from tests.programs import running

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
TOKEN = "the-token"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder with an index of 300 emoji and four photographs, one of them twice."""
    folder = tmp_path_factory.mktemp("browser")
    for file in [*bundled.emoji_images(), *bundled.photographs()]:
        shutil.copy(file, folder / file.name)
    cat = bundled.photographs()[1]
    shutil.copy(cat, folder / "copy-of-a-cat.jpg")
    assert main(["embed", str(folder), "-m", str(bundled.emoji_checkpoint()), "-o", str(folder / "photos.db")]) == 0
    return folder


@pytest.fixture(scope="session")
def address(photographs):
    """The address that `mlx-aimv2 serve` prints, while it runs."""
    command = ["-m", "mlx_aimv2", "serve", str(photographs / "photos.db"), "--port", "0", "--token", TOKEN, "--no-open"]
    with running(sys.executable, *command) as process:
        yield process.stdout.readline().strip()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.fail("there is no Chromium: apt-get install chromium, or set CHROMIUM to its path")
    with playwright.sync_playwright() as started:
        own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # OpenBLAS is not for it
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"], env=own
        )
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a window, `open_page(width, scheme) -> page`; afterwards the page must have had no complaint
    and must have asked nobody else.
    """
    complaints, contexts = [], []
    own = address.partition("?")[0]

    def said(kind, text):
        if kind in ("error", "warning") and "willReadFrequently" not in text:  # the tests read what is painted
            complaints.append(text)

    def opened(width=1400, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda one: said(one.type, one.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((own, "blob:", "data:")) or complaints.append(asked.url))
        page.goto(address)
        page.wait_for_selector(".card")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core, which finds what people with a screen reader or weak eyes cannot use."""
    import axe_core_python

    return next(Path(axe_core_python.__file__).parent.rglob("axe.min.js")).read_text(encoding="utf-8")
