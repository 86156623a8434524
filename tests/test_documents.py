"""What README and docs say is true: every block runs, every link, flag, target and module exists."""

import importlib.util
import os
import re
import subprocess

import pytest

from benchmarks import sizes
from mlx_aimv2 import cli
from mlx_aimv2.config import RELEASED
from tests import documents
from tests.documents import ALL, ROOT, RUN
from tests.loopback import serve

SMALLER = (
    ("--steps 20000", "--steps 2"),
    ("--steps 2000", "--steps 2"),
    ("--size large --batch 64", "--size tiny.json --batch 4 --vocab-size 600"),  # a caption's tokenizer is trained
    ("--start encoder --image-size 336", "--start encoder --size tiny.json --image-size 84 --batch 4"),
    ("--encoder encoder -o pair", "--encoder encoder -o pair --steps 2 --batch 4 --vocab-size 600"),
)
"""What a document's training says -> the same in seconds. Everything else runs as it is written."""


def name_of(document):
    return str(document.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("document", [one for one in RUN if documents.blocks(one)], ids=name_of)
def test_every_block_runs(document, tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    documents.set_up(place)
    with serve() as hub:
        documents.publish(hub, tmp_path)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment = inherited | hub.environment(tmp_path / "hub-cache")
        environment |= {"HOME": str(place), "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
        environment |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        earlier = ""
        for block in documents.blocks(document):
            if block.reason is not None:
                continue
            code = block.code
            if block.language == "sh":
                for said, smaller in SMALLER:
                    code = code.replace(said, smaller)
                command = ["bash", "-e", "-o", "pipefail", "-c", code]
            else:  # a document's later blocks use the names of earlier ones
                earlier += code
                command = ["python", "-W", "error::SyntaxWarning", "-c", earlier]
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_what_is_not_run_says_why():
    reasons = [block.reason for document in RUN for block in documents.blocks(document) if block.reason is not None]
    assert all(len(reason) > 10 for reason in reasons)
    assert len(reasons) <= 6, "more and more is not run"


@pytest.mark.parametrize("document", ALL, ids=name_of)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = document.parent / path if path else document
            assert file.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("document", ALL, ids=name_of)
def test_every_verb_flag_target_and_module_exists(document, capsys):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in documents.commands(document):
        for target in re.findall(r"^make ([a-z][a-z-]*)", line):
            assert target in targets, line
        for module in re.findall(r"\bpython3? -m ([\w.]+)", line):
            assert importlib.util.find_spec(module) is not None, line
        if match := re.search(r"mlx-aimv2 ([a-z]+)(.*)", line):
            verb, rest = match.groups()
            assert verb in cli.VERBS, line
            known = help_of(verb, capsys)
            for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", rest.split(" | ")[0]):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known), f"{line}: {flag}"


def help_of(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    return capsys.readouterr().out


def test_the_readme_is_short_and_lists_every_checkpoint_with_its_sizes():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert {sizes.row(name, checkpoint) for name, checkpoint in RELEASED.items()} <= set(lines)


def test_sizes_are_those_that_a_conversion_writes(tmp_path):
    from mlx_aimv2.convert import convert
    from tests.small_encoder import CONFIG, small_encoder

    folder = convert(small_encoder(), tmp_path / "out", quantize=True, q_bits=4, dtype="float16", verify=False)
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    written = (folder / "model.safetensors").stat().st_size - header
    assert sizes.quantized_bytes(CONFIG, 4) == written
