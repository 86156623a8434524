"""transformers loads what is exported, without a key too many or too few, and gives the same features."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlx_aimv2 import load
from mlx_aimv2.convert import convert
from tests.exact import APART

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
CLASSES = {"lit": "Aimv2Model", "fixed": "Aimv2VisionModel", "native": "Aimv2VisionModel"}


def export(kind: str, folder: Path, dtype: str) -> tuple[Path, torch.nn.Module, dict]:
    convert(REFERENCE / kind, folder, export_layout="transformers", dtype=dtype, verify=False)
    reference, report = getattr(transformers, CLASSES[kind]).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    return folder, reference.eval(), report


@pytest.fixture(scope="module", params=CLASSES)
def exported(request, tmp_path_factory):
    return request.param, *export(request.param, tmp_path_factory.mktemp("export") / request.param, "float32")


def pixels(kind: str) -> np.ndarray:
    with np.load(REFERENCE / kind / "expected.npz") as expected:
        return expected["pixel_values"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", CLASSES)
def test_no_key_is_missing_unexpected_or_misshaped_in_any_dtype(kind, dtype, tmp_path):
    _, reference, report = export(kind, tmp_path / "exported", dtype)
    assert {key: list(names) for key, names in report.items() if names} == {}
    assert {str(parameter.dtype) for parameter in reference.parameters()} == {f"torch.{dtype}"}


def test_the_automatic_class_is_the_right_one(exported):
    kind, folder, *_ = exported
    assert type(transformers.AutoModel.from_pretrained(folder)).__name__ == CLASSES[kind]


def test_image_features_are_the_same(exported):
    kind, folder, reference, _ = exported
    vision = reference.vision_model if kind == "lit" else reference
    with torch.no_grad():
        wanted = vision(torch.from_numpy(pixels(kind)))
    output = load(folder)[0].vision(mx.array(pixels(kind).transpose(0, 2, 3, 1)))
    pairs = [(output.last_hidden_state, wanted.last_hidden_state)]
    if kind == "lit":
        pairs.append((output.pooler_output, wanted.pooler_output))
    for actual, expected in pairs:
        assert np.linalg.norm(np.array(actual) - expected.numpy()) <= APART * np.linalg.norm(expected.numpy())


def test_the_pair_gives_the_same_logits(tmp_path):
    kind = "lit"
    folder, reference, _ = export(kind, tmp_path / kind, "float32")
    with np.load(REFERENCE / kind / "expected.npz") as expected:
        ids = expected["input_ids"]
    with torch.no_grad():  # only with eager attention and a mask is transformers' text encoder causal, as Apple's is
        wanted = reference(
            pixel_values=torch.from_numpy(pixels(kind)),
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
        ).logits_per_image.numpy()
    actual = load(folder)[0](mx.array(pixels(kind).transpose(0, 2, 3, 1)), mx.array(ids.astype(np.int32)))
    assert np.abs(np.array(actual.logits_per_image) - wanted).max() <= APART * np.abs(wanted).max()


def test_what_transformers_saves_again_is_read_back_bit_for_bit(exported, tmp_path):
    kind, folder, reference, _ = exported
    reference.save_pretrained(tmp_path / "again")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "again")
    first, second = load(folder)[0], load(tmp_path / "again")[0]
    image = mx.array(pixels(kind).transpose(0, 2, 3, 1))
    assert mx.array_equal(first.encode_image(image), second.encode_image(image))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [CLASSES[kind]]
