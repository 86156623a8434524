"""The package as a whole: imports go one way, importing costs little, every public name is documented."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import mlx_aimv2
import mlx_aimv2.learn
from tests.programs import HANGS

PACKAGE = Path(mlx_aimv2.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, function bodies and type hints included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & set(MODULES)) or {node.module}
    return found


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, mlx_aimv2; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "huggingface_hub", "PIL", "tokenizers", "safetensors"} & set(loaded)


def test_imports_have_no_cycle():
    graph = {module: imports_of(file) for module, file in MODULES.items()}
    graph.pop("mlx_aimv2")  # re-exports lazily
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_every_file_has_a_docstring_and_needs_no_torch_at_import(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    tops = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in tops for alias in node.names} | {getattr(node, "module", None) for node in tops}
    assert not {name for name in names if name and name.split(".")[0] in ("torch", "transformers", "timm")}


@pytest.mark.parametrize("name", mlx_aimv2.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(mlx_aimv2, name).__doc__


def test_public_names_are_not_hidden_by_modules_of_the_same_name():
    code = "import mlx_aimv2.cli; mlx_aimv2.cli.main(['classify', '--help'])"
    after = "import mlx_aimv2\nassert callable(mlx_aimv2.zero_shot), mlx_aimv2.zero_shot"
    run = f"try:\n {code}\nexcept SystemExit: pass\n{after}"
    subprocess.run([sys.executable, "-c", run], capture_output=True, check=True)


@pytest.mark.parametrize("package", [mlx_aimv2, mlx_aimv2.learn], ids=lambda package: package.__name__)
def test_no_file_has_the_name_of_what_its_package_loads_when_it_is_used(package):
    # importing that file would put the module where the function is expected
    files = {file.stem for file in Path(package.__file__).parent.glob("*.py")}
    assert not files & set(package.__all__)


DATA = {
    "assets": {".md", ".npz", ".json", ".jsonl", ".safetensors", ".jpg", ".webp"},
    "index": {".html", ".js"},
    "serve": {".html", ".js", ".css", ".svg"},
    "py.typed": {".typed"},
}
"""What lies directly in the package -> suffixes of the files in it that are not Python."""


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(tmp_path):
    pytest.importorskip(
        "hatchling", reason="hatchling, which builds the wheel, is not installed: pip install '.[test]'"
    )
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == f"mlx_aimv2-{mlx_aimv2.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 10_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
    about = {name for name in names if name.parts[0] == f"mlx_aimv2-{mlx_aimv2.__version__}.dist-info"}
    assert {name.name for name in about} == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}
    files = (file for file in PACKAGE.rglob("[!.]*") if file.is_file() and file.suffix != ".pyc")
    here = {file.relative_to(ROOT) for file in files}
    assert names - about == here
    data = {name for name in here if name.suffix != ".py"}
    assert {name for name in data if name.suffix not in DATA.get(name.parts[1], ())} == set()


def test_version_and_date_are_the_same_wherever_they_stand():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (mlx_aimv2.__version__, mlx_aimv2.__version__) == (version, citation["version"])
    assert citation["date-released"] == date
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "what CFF 1.2.0 requires"
    assert citation["cff-version"] == "1.2.0"
    for work in citation["references"]:
        assert {"type", "title", "authors"} <= work.keys(), "what CFF 1.2.0 requires of a reference"


WORKFLOWS = sorted((PACKAGE.parent / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_what_a_workflow_runs_is_pinned(file):
    """A tag or a branch of somebody else's repository can move, and the job that publishes may sign as this project."""
    lines = file.read_text(encoding="utf-8").splitlines()
    used = [line.split("uses:", 1)[1].strip() for line in lines if "uses:" in line]
    assert used
    used = [one for one in used if not one.startswith("./")]
    assert [one for one in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)+", one)] == []
    commands = [line.split("pip install ", 1)[1].split() for line in lines if "pip install " in line]
    tools = [tool for words in commands for tool in words if not tool.startswith(("-", "dist/", '"$WHEEL'))]
    assert [tool for tool in tools if not re.fullmatch(r"[\w-]+==[\d.]+", tool)] == []


@pytest.mark.slow
def test_what_is_run_on_an_installed_package_runs(tmp_path):
    """README's commands as the workflow has them; here on the package as it is, not on a wheel."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "installed.yml").read_text(encoding="utf-8"))
    (commands,) = [step["run"] for step in workflow["jobs"]["bare"]["steps"] if "commands" in step.get("name", "")]
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in (("mlx-aimv2", " -m mlx_aimv2"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    bash = ["bash", "-e", "-o", "pipefail", "-c", commands]
    done = subprocess.run(
        bash, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
