"""What README and docs say is true: every block runs, every link, flag, target and module exists."""

import contextlib
import functools
import importlib.util
import io
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import sizes
from mlx_aimv2.cli import main
from mlx_aimv2.cli.dispatch import VERBS
from mlx_aimv2.cli.info_compare_export_upload import memory as needed
from mlx_aimv2.config import RELEASED
from tests import documents
from tests.documents import DOCUMENTS, LINKED, OUTPUT, ROOT, RUN
from tests.loopback import TOKEN, serve
from tests.programs import HANGS

SMALLER = (
    ("--iters 20000", "--iters 2"),
    ("--iters 2000", "--iters 2"),
    (
        "--size large --batch-size 64",
        "--size tiny.json --batch-size 4 --vocab-size 600",
    ),  # a caption's tokenizer is trained
    ("--start encoder --image-size 336", "--start encoder --size tiny.json --image-size 84 --batch-size 4"),
    ("--encoder encoder -o pair", "--encoder encoder -o pair --iters 2 --batch-size 4 --vocab-size 600"),
    ("--encoder pair -o better-pair", "--encoder pair -o better-pair --iters 2 --batch-size 4"),
)
"""What a document's training says -> the same in seconds. Everything else runs as it is written."""

SCRIPTS = ("benchmarks", "convert", "examples")
"""Folders of programs that `python -m` runs."""

OF_OTHERS = {"--help": "every verb", "--workers": "uvicorn", "--hostfile": "mlx.launch", "--shell": "shtab"}
"""Flags in the text that no verb's help lists, and whose they are."""


def name_of(document):
    return str(document.relative_to(ROOT))


LOADS = re.compile(r"^from mlx_aimv2 import .*\bload\b", re.MULTILINE)


README = ROOT / "README.md"
SHOWN = {
    above: shown
    for above, shown in itertools.pairwise(documents.blocks(README))
    if shown.language in OUTPUT and above.language in RUN
}
"""A block of README -> what it prints, where the next block shows it."""


def to_run(document):
    return [block for block in documents.blocks(document) if block.language in RUN and block.reason is None]


@pytest.mark.slow
@pytest.mark.parametrize("document", list(filter(to_run, DOCUMENTS)), ids=name_of)
def test_every_block_runs(document, tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    documents.set_up(place)
    with serve() as hub:
        documents.publish(hub, tmp_path, document)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment = inherited | hub.environment(tmp_path / "hub-cache", HF_TOKEN=TOKEN)
        environment |= {"HOME": str(place), "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
        environment |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        earlier = ""
        for block in to_run(document):
            code = block.code
            if block.language == "sh":
                for said, smaller in SMALLER:
                    code = code.replace(said, smaller)
                code = documents.until_it_serves(code)
                command = ["bash", "-e", "-o", "pipefail", "-c", code]
            else:  # a document's later blocks use the names of earlier ones, unless they load what they use themselves
                earlier = documents.with_shapes(code) if LOADS.search(code) else earlier + documents.with_shapes(code)
                command = ["python", "-W", "error::SyntaxWarning", "-c", earlier]
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
            )
            about = f"{name_of(document)}:{block.line}\n{code}\n{done.stdout}\n{done.stderr}"
            assert done.returncode == 0, about
            if document == README and block in SHOWN:
                assert re.search(documents.with_any_numbers(SHOWN[block].code), done.stdout), about


def test_what_is_made_smaller_is_said_somewhere():
    shell = [block.code for document in DOCUMENTS for block in to_run(document) if block.language == "sh"]
    for said, _ in SMALLER:
        assert any(said in code for code in shell), said


def test_what_is_not_run_says_why():
    found = [(name_of(document), block) for document in DOCUMENTS for block in documents.blocks(document)]
    reasons = [f"{name}:{block.line}: {block.reason}" for name, block in found if block.reason is not None]
    print(*reasons, sep="\n")
    assert all(len(block.reason) > 10 for _, block in found if block.reason is not None), reasons
    assert len(reasons) <= 15, "more and more is not run"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_all_code_is_in_fences_of_a_known_language(document):
    for block in documents.blocks(document):
        assert block.language in (*RUN, *OUTPUT), f"{name_of(document)}:{block.line}"
        if block.language == "python":
            compile(block.code, name_of(document), "exec")
    rest = documents.prose(document)
    assert "```" not in rest, "a fence that does not close"
    assert "<!-- not run" not in rest, "wanted directly above a fence: <!-- not run: REASON -->"
    assert not re.search(r"\n\n {4,}\S", rest), "code by indentation, which nothing runs: put it into a fence"


@pytest.mark.parametrize(
    ("line", "shape", "holds"),
    [
        ("x  # (2, 5), words", (2, 5), True),
        ("y = x  # (2, 5): words", (2, 3), False),
        ("x  # (2, 5)", (2, 5, 3), False),
        ("x  # (B, 5, 1024) words", (3, 5, 7), True),
        ("if True:\n    x  # (2, L)", (3, 5), False),
        ("x  # depth + 1 (2, 5)", (3,), True),
    ],
)
def test_a_comment_that_begins_with_a_shape_is_checked(line, shape, holds):
    names = {"x": np.zeros(shape)}
    with contextlib.nullcontext() if holds else pytest.raises((AssertionError, ValueError)):
        exec(documents.with_shapes(line), names)


@pytest.mark.parametrize("document", LINKED, ids=name_of)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = document.parent / path if path else document
            assert file.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_verb_flag_target_and_module_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    every_flag = OF_OTHERS.keys() | set().union(*map(flags_of_verb, VERBS), *map(flags_of_scripts, SCRIPTS))
    for line in documents.commands(document):
        for target in re.findall(r"^make ([a-z][a-z-]*)", line):
            assert target in targets, line
        for named in re.findall(r"(?:mlx-aimv2|'\.)\[([\w,]+)\]", line):
            assert all(f"\n{extra} = [" in extras for extra in named.split(",")), line
        for module in re.findall(r"\bpython3? -m ([a-z][\w.]*)", line):
            assert importlib.util.find_spec(module) is not None, line
        for flag in re.findall(r"^--[a-z][\w-]*", line):
            assert flag in every_flag, line
        for program, rest in re.findall(r"(mlx-aimv2\)? [a-z]+|python -m [a-z][\w.]*)([^|;&]*)", line):
            known = known_flags(program)
            for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", rest):
                assert known is None or flag in known, f"{line}: {flag}"


def known_flags(program):
    """The flags of `mlx-aimv2 VERB` or `python -m MODULE`, None where the module is none of ours."""
    name = program.split()[-1]
    if program.startswith("mlx-aimv2"):
        assert name in VERBS, program
        return flags_of_verb(name)
    if name == "mlx_aimv2.convert":
        return flags_of_verb("convert")
    folder = name.partition(".")[0]
    return flags_of_scripts(folder) if folder in SCRIPTS else None


@functools.cache
def flags_of_verb(verb):
    """What is written with one or two hyphens in its help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text.getvalue()))


@functools.cache
def flags_of_scripts(folder):
    """What is written with one or two hyphens as a string in its files."""
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / folder).glob("*.py")]
    return {flag for text in texts for flag in re.findall(r'"(--?[a-z][\w-]*)"', text)}


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_shows_what_a_command_prints():
    assert SHOWN


@pytest.mark.slow
def test_the_readmes_python_is_short_and_passes_mypy_strict(tmp_path):
    (code,) = [block.code for block in documents.blocks(README) if block.language == "python"]
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "readme.py").write_text(code)
    settings = ("--strict", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, tmp_path / "readme.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_choice_of_checkpoints_has_the_numbers_of_info():
    rows = re.findall(r"\| `(apple/\S+)` \| (\S+) GB \| (\S+) GB \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert 4 <= len(rows) <= 5
    for name, download, memory in rows:
        checkpoint = RELEASED[name.removeprefix("apple/")]
        held = needed(checkpoint.config, checkpoint.parameters)["memory_of_a_pass"]["float16 or bfloat16"]
        assert (download, memory) == (f"{4 * checkpoint.parameters / 1e9:.2f}", f"{held / 1e9:.2f}"), name


def test_every_checkpoint_is_listed_with_its_sizes():
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    assert {sizes.row(name, checkpoint) for name, checkpoint in RELEASED.items()} <= set(lines)


def test_sizes_are_those_that_a_conversion_writes(tmp_path):
    from mlx_aimv2.convert import convert
    from tests.small_encoder import CONFIG, small_encoder

    folder = convert(small_encoder(), tmp_path / "out", quantize=True, q_bits=4, dtype="float16", verify=False)
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    written = (folder / "model.safetensors").stat().st_size - header
    assert sizes.quantized_bytes(CONFIG, 4) == written
