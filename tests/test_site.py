"""`make docs`: the site is built without a warning, asks nobody else, and has every public name and every document."""

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mlx_aimv2
from tests.documents import LINKED, blocks

ROOT = Path(__file__).parent.parent

COMMAND = re.search(r"-m sphinx (.+) -d \S+ \. site$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

INTERNAL = {"mlx_aimv2.backend", "mlx_aimv2.cli"}
"""Packages whose `__all__` is for the other packages alone."""

MODULES = {
    f"mlx_aimv2.{'.'.join(file.relative_to(ROOT / 'mlx_aimv2').with_suffix('').parts)}".replace(".__init__", "")
    for file in (ROOT / "mlx_aimv2").rglob("*.py")
    if "\n__all__ = " in file.read_text(encoding="utf-8")
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, made by the command of `make docs`."""
    pytest.importorskip("furo")
    place = tmp_path_factory.mktemp("site")
    words = [
        sys.executable,
        "-m",
        "sphinx",
        *COMMAND[1].split(),
        "-d",
        str(place / "doctrees"),
        ".",
        str(place / "site"),
    ]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    return place / "site"


def names_on(page):
    return set(re.findall(r'<dt class="sig[^>]* id="([^"]+)"', page.read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(MODULES - INTERNAL))
def test_the_reference_has_the_public_names_of_a_module(site, module):
    public = {name: getattr(import_module(module), name) for name in import_module(module).__all__}
    wanted = {
        f"{module}.{name}" for name, thing in public.items() if inspect.isclass(thing) or inspect.isroutine(thing)
    }
    assert wanted and wanted <= names_on(site / "docs" / "api.html")


@pytest.mark.slow
def test_the_reference_shows_how_models_are_called_and_what_they_take(site):
    names = names_on(site / "docs" / "api.html")
    for name in ("Aimv2VisionModel", "Aimv2TextModel", "Aimv2Model", "Aimv2Processor", "ZeroShotClassifier"):
        assert f"mlx_aimv2.{name}.__call__" in names
    text = re.sub(r"<[^>]+>", "", (site / "docs" / "api.html").read_text(encoding="utf-8")).replace("&gt;", ">")
    assert "(B, H, W, 3) -> (B, N, D)" in text and "`" not in text
    assert "image_size: int | None = 224" in text and "learning_rate: float | None = None" in text


@pytest.mark.slow
def test_every_document_is_a_page_and_the_readme_the_first(site):
    for document in LINKED:
        assert (site / document.relative_to(ROOT)).with_suffix(".html").exists(), document
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()


@pytest.mark.slow
def test_the_pages_name_no_local_path_and_load_nothing_from_elsewhere(site):
    for file in site.rglob("*"):
        assert not file.is_file() or str(ROOT).encode() not in file.read_bytes(), file
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//', text), page
        assert not re.search(r'<link[^>]* href="(?:https?:)?//', text), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site):
    for page in sorted(set(site.rglob("*.html")) - set((site / "_modules").rglob("*"))):
        for path, anchor in re.findall(r'href="(?!\w+:)([^"#?]*)(?:#([^"]*))?"', page.read_text(encoding="utf-8")):
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{page.name}: {path}"
            if anchor and target.suffix == ".html":
                assert f'id="{anchor}"' in target.read_text(encoding="utf-8"), f"{page.name}: {path}#{anchor}"


def test_the_packages_docstring_shows_lines_that_are_run():
    shown = inspect.cleandoc("".join(re.findall(r"^(?: {4}.*)?\n", mlx_aimv2.__doc__, re.MULTILINE)))
    assert shown.count("\n") == 3
    assert shown + "\n" in [block.code for block in blocks(ROOT / "docs" / "api.md") if block.reason is None]
