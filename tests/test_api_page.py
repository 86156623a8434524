"""`make docs`: the API page is built without a warning and has every public name."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MODULES = re.search(r"^API := mlx_aimv2 \$\(addprefix mlx_aimv2\.,(.+)\)$", MAKEFILE, re.MULTILINE)

NAMES = ["mlx_aimv2", *(f"mlx_aimv2.{name}" for name in MODULES[1].split())]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, made by the command of `make docs`."""
    pytest.importorskip("pdoc")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "error", "-m", "pdoc", "-t", "docs/pdoc", "-o", str(place), *NAMES]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("module", NAMES)
def test_a_page_has_the_public_names_of_its_module(site, module):
    page = (site / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
    there = set(re.findall(r'<section id="([^"]+)"', page))
    assert set(getattr(import_module(module), "__all__", ())) <= there
    assert str(ROOT) not in page


@pytest.mark.slow
def test_the_page_shows_how_models_are_called_and_what_they_take(site):
    page = (site / "mlx_aimv2.html").read_text(encoding="utf-8")
    for name in ("Aimv2VisionModel", "Aimv2TextModel", "Aimv2Model", "Aimv2Processor", "ZeroShotClassifier"):
        assert f'id="{name}.__call__"' in page
    assert "<code>(B, H, W, 3) -> (B, N, D)</code>" in page.replace("&gt;", ">")
    assert "LitSettings" in (site / "mlx_aimv2" / "pretrain.html").read_text()
