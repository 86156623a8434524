"""Does the house stand as designed: imports one way, nothing heavy at import, every public name explained?"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_aimv2

PACKAGE = Path(mlx_aimv2.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of_ours(file: Path) -> set[str]:
    """Modules of this package that a file imports at its top level, functions and type hints left out."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mlx_aimv2"):
            rest = node.module.removeprefix("mlx_aimv2").lstrip(".")
            found |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
    return found


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, mlx_aimv2; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "huggingface_hub", "PIL", "tokenizers", "safetensors"} & set(loaded)


def test_imports_go_one_way():
    graph = {name_of(file): imports_of_ours(file) for file in FILES}
    graph.pop("__init__")

    def reachable(name: str, seen: set[str]) -> set[str]:
        for other in graph.get(name, set()) - seen:
            reachable(other, seen | {other})
            seen |= {other}
        return seen

    cycles = [name for name in graph if any(name in reachable(other, {other}) for other in graph[name])]
    assert not cycles


@pytest.mark.parametrize("name", ["config", "cores", "index", "plane", "plot"])
def test_the_ground_floor_imports_nothing_of_ours(name):
    assert not imports_of_ours(PACKAGE / f"{name}.py")


@pytest.mark.parametrize(("name", "other"), [("names", "config"), ("ops", "cores")])
def test_the_first_floor_stands_on_one_file(name, other):
    assert imports_of_ours(PACKAGE / f"{name}.py") <= {other}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_file_says_which_question_it_answers(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_needs_torch_at_import(file):
    tops = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {alias.name for node in tops for alias in node.names} | {getattr(node, "module", None) for node in tops}
    assert not {name for name in names if name and name.split(".")[0] in ("torch", "transformers", "timm")}


@pytest.mark.parametrize("name", mlx_aimv2.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(mlx_aimv2, name).__doc__


def test_the_converter_is_not_reexported():
    # `python -m mlx_aimv2.convert` would warn that the module is already loaded
    assert not hasattr(mlx_aimv2, "convert") or "convert" not in mlx_aimv2.__all__
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mlx_aimv2.convert", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr


def test_contributing_places_every_file():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    placed = {name for line in table for name in re.findall(r"`(\w+)`", line)}
    assert placed == {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "__main__"}


def test_every_file_is_short_enough_to_answer_one_question():
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {name: length for name, length in lengths.items() if length > 330}
