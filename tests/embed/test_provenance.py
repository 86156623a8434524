"""A description distinguishes what cannot be compared, and accepts what can."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_aimv2.convert import convert
from mlx_aimv2.embed.cache import differences
from mlx_aimv2.embed.encode import Embedder, Pooling
from mlx_aimv2.loading import read_source

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"


def described(
    name: object = REFERENCE / "fixed", *, dtype: str | None = None, max_patches: int = 4096, **pooling: object
):
    loaded = read_source(name).load(dtype=dtype)
    description = Embedder(loaded, Pooling.of(loaded.model, **pooling), max_patches).description
    return json.loads(json.dumps(description))  # as it comes back from an index


@pytest.fixture(scope="module")
def fixed():
    return described()


def test_the_same_model_agrees_with_itself(fixed):
    assert differences(fixed, described()) == ([], [])


def test_it_says_where_everything_came_from(fixed):
    assert fixed["checkpoint"] == str(REFERENCE / "fixed")
    assert fixed["commit"] is None
    assert fixed["dtype"] == "float32"
    assert fixed["quantization"] is None
    assert fixed["preprocessing"]["resize"] == 42
    assert set(fixed["versions"]) == {"mlx-aimv2", "mlx", "numpy", "pillow"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_is_a_note(fixed, dtype):
    assert differences(fixed, described(dtype=dtype)) == ([], [f"dtype: float32 there, {dtype} here"])


@pytest.mark.parametrize(("bits", "mode"), [(8, "affine"), (4, "affine"), (2, "affine"), (4, "mxfp4")])
def test_other_bits_are_a_note(fixed, tmp_path, bits, mode):
    convert(REFERENCE / "fixed", tmp_path / "q", quantize=True, q_bits=bits, q_mode=mode, q_group_size=32, verify=False)
    refused, notes = differences(fixed, described(tmp_path / "q"))
    assert not refused
    assert notes == [f"quantization: none there, bits={bits} group_size=32 mode={mode} here"]


def test_another_recipe_is_a_note(tmp_path):
    for name in ("mixed_3_4", "mixed_3_6"):
        convert(
            REFERENCE / "fixed", tmp_path / name, quantize=True, quant_predicate=name, q_group_size=32, verify=False
        )
    refused, notes = differences(described(tmp_path / "mixed_3_4"), described(tmp_path / "mixed_3_6"))
    assert not refused
    assert len(notes) == 1
    assert "recipe=" in notes[0]


def test_the_same_bits_twice_agree(tmp_path):
    for name in ("one", "two"):
        convert(REFERENCE / "fixed", tmp_path / name, quantize=True, q_group_size=32, verify=False)
    assert differences(described(tmp_path / "one"), described(tmp_path / "two")) == ([], [])


def test_a_converted_folder_is_the_same_weights(fixed, tmp_path):
    convert(REFERENCE / "fixed", tmp_path / "mlx", verify=False)
    assert differences(fixed, described(tmp_path / "mlx")) == ([], [])


@pytest.mark.parametrize("name", ["outlier", "native", "lit"])
def test_other_weights_are_refused(fixed, name):
    refused, _ = differences(fixed, described(REFERENCE / name))
    assert "the weights" in refused[0]
    assert str(REFERENCE / name) in refused[0]


def test_weights_trained_a_little_further_are_refused(fixed):
    loaded = read_source(REFERENCE / "fixed").load()
    for block in loaded.model.blocks:
        block.attn.proj.weight = block.attn.proj.weight * mx.array(1.001)
    refused, _ = differences(fixed, Embedder(loaded, Pooling.of(loaded.model)).description)
    assert "though not in the norms" in refused[0]
    loaded.model.norm.weight = loaded.model.norm.weight * mx.array(1.01)
    refused, _ = differences(fixed, Embedder(loaded, Pooling.of(loaded.model)).description | {"dtype": "float16"})
    assert refused[0].startswith("the weights: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "tokens"}, "pool: mean there, tokens here"),
        ({"layer": -2}, "layer: none there, -2 here"),
    ],
)
def test_other_pooling_is_refused(fixed, settings, message):
    assert differences(fixed, described(**settings))[0] == [message]


def test_the_norm_of_a_layer_matters():
    assert differences(described(layer=-2), described(layer=-2, norm=True))[0] == ["norm: False there, True here"]


def test_the_limit_of_patches_matters_to_native_checkpoints_alone(fixed):
    assert differences(fixed, described(max_patches=300)) == ([], [])
    native = described(REFERENCE / "native")
    other = described(REFERENCE / "native", max_patches=300)
    assert differences(native, other)[0] == ["max patches: 4096 there, 300 here"]


def test_of_the_preprocessing_only_what_differs_is_named(fixed):
    other = fixed | {"preprocessing": fixed["preprocessing"] | {"resample": 2, "resize": 48}}
    assert differences(fixed, other)[0] == ["preprocessing: resize=42 resample=3 there, resize=48 resample=2 here"]


def test_versions_alone_do_not_matter(fixed):
    assert differences(fixed, fixed | {"versions": {"mlx": "9"}}) == ([], [])
