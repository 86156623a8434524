"""The model card gives the origin of the weights, their licence, their fidelity, and how to use them."""

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from PIL import Image

from mlx_aimv2.conversion import model_card
from mlx_aimv2.conversion.fidelity import compare, rows
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import read_source
from tests.small_models import FIXED, pair_with_words

APPLES_CARD = """---
library_name: transformers
license: apple-amlr
license_name: apple-ascl
license_link: LICENSE
model-index: [{name: another, results: []}]
---
# Introduction
"""


@pytest.fixture
def apples(tmp_path) -> Path:
    """The reference checkpoint with a card and terms like Apple's."""
    folder = Path(shutil.copytree(FIXED, tmp_path / "apples"))
    (folder / "README.md").write_text(APPLES_CARD)
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = [tmp_path / "photograph.jpg", tmp_path / "b.jpg"]
    for seed, path in enumerate(paths):
        Image.effect_noise((61 + seed, 47), 80).convert("RGB").save(path)
    return paths


def card_of(source: Path, target: Path, *, repo: str | None = None, report=None, config=None, **names) -> Path:
    read = read_source(source)
    if repo:
        read.origin.repo, read.origin.commit = repo, "c" * 40
    target.mkdir(exist_ok=True)
    config = read.config.to_dict() | {"torch_dtype": "float16"} | (config or {})
    model_card.write(target, source=read, config=config, report=report, **names)
    return target / "README.md"


def test_the_front_matter_carries_the_licence_and_the_base(apples, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(apples / "LICENSE", tmp_path / "out")
    written = card_of(apples, tmp_path / "out", repo="apple/aimv2-large-patch14-224")
    assert metadata_load(written) == {
        "library_name": "mlx",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["mlx", "aimv2", "vision"],
        "base_model": "apple/aimv2-large-patch14-224",
        "license": "apple-amlr",
        "license_name": "apple-ascl",
        "license_link": "LICENSE",
    }
    assert "The weights keep the terms of their source: apple-ascl. See LICENSE." in written.read_text()
    assert f"commit `{'c' * 40}`" in written.read_text()


def test_a_licence_file_that_is_not_there_is_linked_at_the_source(apples, tmp_path):
    written = card_of(apples, tmp_path / "out", repo="apple/aimv2")
    assert metadata_load(written)["license_link"] == f"https://huggingface.co/apple/aimv2/blob/{'c' * 40}/LICENSE"


@pytest.mark.parametrize("head", ["", "---\nlicense: [\n---\n", "---\n---\n", "---\njust words\n---\n"])
def test_a_source_without_a_readable_card_invents_no_licence(apples, tmp_path, head):
    (apples / "README.md").write_text(head)
    written = card_of(apples, tmp_path / "out")
    assert "license" not in metadata_load(written)
    assert "names no licence" in written.read_text()


def test_a_pair_classifies_and_a_quantized_one_says_so(tmp_path):
    written = card_of(
        FIXED.parent / "lit", tmp_path / "out", repo="a/b", config={"quantization": {"bits": 4, "mode": "affine"}}
    )
    head = metadata_load(written)
    assert (head["pipeline_tag"], head["base_model_relation"]) == ("zero-shot-image-classification", "quantized")
    assert "quantized, affine, 4 bits" in written.read_text()


def test_a_conversion_of_a_conversion_keeps_the_first_base(apples, tmp_path):
    (apples / "README.md").write_text("---\nbase_model: apple/aimv2\n---\n")
    assert metadata_load(card_of(apples, tmp_path / "out"))["base_model"] == "apple/aimv2"


def test_the_fidelity_table_is_in_it(apples, images, tmp_path):
    target = convert(apples, tmp_path / "mlx", dtype="float16", verify=False)
    report = compare(apples, target, images=images)
    text = card_of(apples, tmp_path / "out", report=report).read_text()
    for what, value in rows(report).items():
        assert f"| {what} | {value} |" in text
    assert "Not measured" in card_of(apples, tmp_path / "none").read_text()


def test_warnings_of_the_comparison_are_in_it(apples, images, tmp_path):
    report = compare(apples, apples, images=images) | {"warnings": ["block 3 leaves float16"]}
    assert "- block 3 leaves float16" in card_of(apples, tmp_path / "out", report=report).read_text()


def snippet(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize("kind", ["vision", "pair"])
def test_the_snippet_runs(kind, apples, images, tmp_path, capsys, monkeypatch):
    source = apples if kind == "vision" else pair_with_words(tmp_path / "pair")
    target = convert(source, tmp_path / "mlx", verify=False)
    code = snippet(card_of(source, tmp_path / "out", hub_name=str(target)).read_text())
    monkeypatch.chdir(images[0].parent)
    exec(code, {})
    assert capsys.readouterr().out


def test_the_shape_in_the_snippet_is_the_shape(apples, tmp_path):
    assert "# (1, 9, 96)" in card_of(apples, tmp_path / "out").read_text()


@pytest.mark.parametrize(
    ("layout", "library"), [("transformers", "from transformers import"), ("apple", "pixels = processor(")]
)
def test_an_export_is_a_pytorch_card(apples, tmp_path, layout, library):
    written = card_of(apples, tmp_path / "out", layout=layout)
    head = metadata_load(written)
    assert (head["library_name"], head["tags"]) == ("transformers", ["aimv2", "vision"])
    assert library in snippet(written.read_text())
    assert f"a PyTorch folder in the {layout} layout" in written.read_text()
    assert "\n# apples for PyTorch\n" in written.read_text()


def test_a_published_folder_is_named_by_its_repository(apples, tmp_path):
    text = card_of(apples, tmp_path / "out", hub_name="somebody/aimv2-large-8bit").read_text()
    assert "\n# aimv2-large-8bit\n" in text
    assert 'load("somebody/aimv2-large-8bit")' in text
