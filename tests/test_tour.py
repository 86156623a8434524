"""The notebook runs offline, leaves nothing behind, and its kept results are those of this code."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"
KEPT = json.loads(TOUR.read_text(encoding="utf-8"))

EXACT = ("load", "features", "go-on")
"""Cells whose text is the same on every machine: names and shapes."""

NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
BUT_FOR_NUMBERS = ("labels", "learn", "convert")
"""Cells whose numbers are rounded differently elsewhere."""

ON_ANY_MACHINE = {
    "by-image": r"300 images embedded\nangry face, ",
    "by-words": r"animal: .*\bcow\b.*\nplant: .*\bshamrock\b.*\ngreen: .*\bgreen apple\b",
    "labels": r"cow: animal \d+%.*\nbouquet: plant .*\nangry face: face .*\nwaving hand: hand .*\nred square: square ",
    "learn": r"top1 (8|9)\d\.\d+ % on \d+ test images",
    "convert": r"token cosine, mean +0\.999",
}
"""What the text of cells must match on any machine."""


def text_of(cell) -> str:
    outputs = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    assert all(output["name"] == "stdout" for output in outputs), outputs
    return "".join("".join(output["text"]) for output in outputs)


def images_of(cell) -> list[Image.Image]:
    data = [output["data"] for output in cell["outputs"] if "data" in output]
    encoded = ["".join(next(value for key, value in one.items() if key.startswith("image/"))) for one in data]
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in encoded]


def code_cells(notebook):
    return {cell["id"]: cell for cell in notebook["cells"] if cell["cell_type"] == "code"}


def test_each_code_cell_was_run_in_order_and_has_results():
    cells = code_cells(KEPT)
    assert len(cells) == 9
    assert [cell["execution_count"] for cell in cells.values()] == list(range(1, len(cells) + 1))
    for cell in cells.values():
        assert cell["outputs"], cell["id"]
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
        text_of(cell)
    assert sum(len(images_of(cell)) for cell in cells.values()) >= 5
    assert {*EXACT, *ON_ANY_MACHINE} <= set(cells)


def test_the_notebook_is_small_and_says_nothing_of_the_machine_that_ran_it():
    content = TOUR.read_text(encoding="utf-8")
    assert len(content.encode()) < 300_000
    assert KEPT["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not any(cell["metadata"] for cell in KEPT["cells"])
    for cell in code_cells(KEPT).values():
        words = text_of(cell) + "".join(
            "".join(output["data"].get("text/plain", "")) for output in cell["outputs"] if "data" in output
        )
        assert not re.search(r"(^|[\s'\"(=])(~?/\w|[A-Z]:\\)|0x[0-9a-f]{6}", words), words


@pytest.mark.parametrize("cell", (*EXACT, *ON_ANY_MACHINE))
def test_the_kept_results_are_what_the_cells_are_to_show(cell):
    assert re.search(ON_ANY_MACHINE.get(cell, r"\w"), text_of(code_cells(KEPT)[cell]))


@pytest.mark.slow
def test_the_notebook_runs_and_leaves_nothing_behind(tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for variable, name in (("TMPDIR", "temporary"), ("IPYTHONDIR", "ipython"), ("JUPYTER_RUNTIME_DIR", "runtime")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    (tmp_path / "started-in").mkdir()

    from tests.tour import execute, trimmed

    ran, kept = code_cells(trimmed(execute(tmp_path / "started-in"))), code_cells(KEPT)
    for name in EXACT:
        assert text_of(ran[name]) == text_of(kept[name])
    for name in BUT_FOR_NUMBERS:
        assert NUMBER.sub("0", text_of(ran[name])) == NUMBER.sub("0", text_of(kept[name]))
    for name, pattern in ON_ANY_MACHINE.items():
        assert re.search(pattern, text_of(ran[name])), text_of(ran[name])
    for name, cell in ran.items():
        assert [image.size for image in images_of(cell)] == [image.size for image in images_of(kept[name])], name
    assert not list((tmp_path / "started-in").iterdir())
    assert not list((tmp_path / "temporary").iterdir())
