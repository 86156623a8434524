"""Each layer gets the bits that were asked for, and is read back as it was stored."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_aimv2 import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig, load
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import build, read_source
from mlx_aimv2.quantize import MODES, check, layers, pack, packed, plan, resolve, unpack
from tests.small_encoder import small_encoder
from tests.small_models import edit_config, edit_weights

pytestmark = pytest.mark.rounding

ENCODER = small_encoder()
REFERENCE = Path(__file__).parent / "golden" / "reference"
VISION = Aimv2VisionConfig(64, 192, 17, 2, image_size=28)
PAIR = Aimv2Config(
    Aimv2VisionConfig(64, 192, 2, 2, image_size=28, use_head=True),
    Aimv2TextConfig(131, 96, 160, 3, 3, max_position_embeddings=11, eos_token_id=130),
    projection_dim=32,
)
ALL_MODES = [(mode, group, bits) for mode, known in MODES.items() for group in known[0] for bits in known[1]]


def quantized(tmp_path, *, source=ENCODER, **options):
    folder = convert(source, tmp_path / "mlx", quantize=True, verify=False, **options)
    return folder, json.loads((folder / "config.json").read_text())["quantization"]


def pixels(model, seed=3):
    size = model.vision.config.image_size
    return mx.random.normal((2, size, size, 3), key=mx.random.key(seed))


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("affine", 64, 4), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_group_size_and_bits_default_to_the_modes_own(mode, group_size, bits):
    assert resolve(mode) == {"group_size": group_size, "bits": bits, "mode": mode}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 7}, "q_bits must be 2, 3, 4, 5, 6 or 8 with q_mode affine, got 7"),
        ({"group_size": 16}, "q_group_size must be 32, 64 or 128 with q_mode affine, got 16"),
        ({"mode": "mxfp4", "bits": 8}, "q_bits must be 4 with q_mode mxfp4, got 8"),
        ({"mode": "nvfp4", "group_size": 32}, "q_group_size must be 16 with q_mode nvfp4, got 32"),
        ({"mode": "int8"}, "q_mode must be affine, mxfp4, nvfp4, mxfp8, got int8"),
    ],
)
def test_settings_that_mlx_has_not_are_refused_with_those_it_has(asked, message):
    with pytest.raises(ValueError, match=message):
        resolve(**asked)


@pytest.mark.parametrize(("mode", "group_size", "bits"), ALL_MODES)
def test_the_table_of_modes_is_mlxs_own(mode, group_size, bits):
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    weight = mx.random.normal((3, 256), key=mx.random.key(0))
    again = unpack(pack(weight, settings, mx.float32), settings)
    # Numbers on a grid of 2^bits steps err by 0.54 % at 8 bits, twice as much with each bit less; mxfp8 has a float's.
    assert mx.linalg.norm(again - weight) / mx.linalg.norm(weight) < (0.03 if mode == "mxfp8" else 2.0**-bits * 3)


@pytest.mark.parametrize("bits", [3, 6])
def test_folders_hold_the_bits_that_were_asked_for(tmp_path, bits):
    folder, section = quantized(tmp_path, q_bits=bits, q_group_size=32, dtype="float16")
    assert section == {"group_size": 32, "bits": bits, "mode": "affine"}
    stored = load_file(folder / "model.safetensors")
    assert stored["blocks.0.mlp.down.weight"].shape == (128, 256 * bits // 32)  # 32-bit words
    assert stored["blocks.0.mlp.down.scales"].shape == (128, 256 // 32)
    assert stored["blocks.0.mlp.down.scales"].dtype == np.float16


def test_the_section_stands_twice_in_config_json(tmp_path):
    folder, section = quantized(tmp_path)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == section


def test_patches_norms_and_positions_stay_dense_to_the_bit(tmp_path):
    folder, _ = quantized(tmp_path, q_bits=2)
    stored, source = mx.load(str(folder / "model.safetensors")), read_source(ENCODER).weights
    dense = [name for name in source if not any(part in name for part in (".attn.", ".mlp."))]
    assert len(dense) == 4 + 2 * 4 + 1
    assert all(mx.array_equal(stored[name], source[name]) for name in dense)
    assert {name.removesuffix(".scales") for name in stored if name.endswith(".scales")} == {
        f"blocks.{i}.{layer}" for i in range(4) for layer in ("attn.qkv", "attn.proj", "mlp.gate", "mlp.up", "mlp.down")
    }


def test_of_a_pair_the_head_the_projections_and_the_scale_stay_dense_and_say_so():
    section = plan(build(PAIR), resolve(group_size=32))
    dense = {path for path, entry in section.items() if entry is False}
    head = {f"vision_model.head.{name}" for name in ("k", "v", "linear")}
    assert dense == head | {"visual_projection", "text_projection"}
    weights = {"text_model.token_embed.weight": mx.ones((131, 96)), "logit_scale": mx.array(2.0)}
    names = [name for name, _ in packed(weights.items(), layers(build(PAIR)), section, dtype=mx.float32)]
    assert names == [f"text_model.token_embed.{part}" for part in ("weight", "scales", "biases")] + ["logit_scale"]


@pytest.mark.parametrize(
    "options",
    [
        {"q_bits": 8},
        {"q_bits": 5, "q_group_size": 128},
        {"q_mode": "mxfp4"},
        {"q_mode": "nvfp4"},
        {"q_mode": "mxfp8"},
        {"quant_predicate": "mixed_3_6"},
        pytest.param(
            {"quant_predicate": lambda path, layer: {"bits": 8} if "attn" in path else False}, id="attention in 8 bits"
        ),
    ],
    ids=str,
)
def test_kept_packed_and_made_dense_a_folder_gives_the_same_features(tmp_path, options):
    folder, _ = quantized(tmp_path, **options)
    dense, kept = load(folder)[0], load(folder, keep_quantized=True)[0]
    inputs = pixels(dense)
    np.testing.assert_allclose(dense.encode_image(inputs), kept.encode_image(inputs), atol=2e-5)
    assert any(isinstance(layer, nn.QuantizedLinear) for layer in kept.modules())
    assert not any(isinstance(layer, nn.QuantizedLinear) for layer in dense.modules())


@pytest.mark.parametrize("keep_quantized", [False, True])
def test_a_quantized_pair_loads_both_ways(tmp_path, keep_quantized):
    folder, _ = quantized(tmp_path, source=REFERENCE / "lit", q_bits=8, q_group_size=32)
    model, _ = load(folder, keep_quantized=keep_quantized)
    original, _ = load(REFERENCE / "lit")
    ids = mx.array([[1, 17, 210]])
    a, b = (np.array(m.encode_text(ids, normalize=True))[0] for m in (model, original))
    assert 0.999 < a @ b < 0.9999999
    assert isinstance(model.text_model.token_embed, nn.QuantizedEmbedding) == keep_quantized


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_half_precision_reaches_every_part_of_a_quantized_folder(tmp_path, dtype, mode):
    folder, _ = quantized(tmp_path, q_mode=mode, q_bits=8, dtype=dtype)
    for keep_quantized in (False, True):
        model, _ = load(folder, keep_quantized=keep_quantized)
        assert model(pixels(model)).last_hidden_state.dtype == model.dtype == getattr(mx, dtype)


def test_8_bits_err_by_about_half_a_percent_and_4_bits_by_9():
    weight = mx.random.normal((64, 512), key=mx.random.key(1))
    for bits, low, high in ((8, 0.004, 0.0065), (4, 0.08, 0.1)):
        again = unpack(pack(weight, resolve(bits=bits), mx.float16), resolve(bits=bits))
        assert low < (mx.linalg.norm(again - weight) / mx.linalg.norm(weight)).item() < high


def test_unpacking_rounds_nothing_but_once_to_float32():
    weight, scales, biases = pack(mx.random.normal((3, 64), key=mx.random.key(3)), resolve(), mx.float16)
    words = (
        np.array(weight)[:, :, None] >> np.arange(0, 32, 4) & 15
    )  # eight numbers of 4 bits in a word, low ones first
    exact = np.array(scales).astype(float) * words.reshape(3, 64) + np.array(biases).astype(float)
    np.testing.assert_allclose(np.array(unpack([weight, scales, biases], resolve())), exact, rtol=1e-6, atol=1e-6)


def test_bfloat16_scales_are_known_when_numbers_are_rounded_to_them():
    weight, settings = mx.random.normal((64, 512), key=mx.random.key(1)), resolve(bits=8)
    afterwards = [
        part.astype(mx.bfloat16) if part.dtype == mx.float32 else part for part in mx.quantize(weight, bits=8)
    ]
    errors = [
        mx.linalg.norm(unpack(parts, settings) - weight).item()
        for parts in (pack(weight, settings, mx.bfloat16), afterwards)
    ]
    assert errors[0] < 0.95 * errors[1]


def test_layers_whose_rows_do_not_divide_are_named_with_what_would_fit(tmp_path):
    with pytest.raises(
        ValueError, match=r"blocks.\{0-2\}.mlp.down \(rows of 160, groups of 64\).*32 would fit"
    ) as caught:
        convert(REFERENCE / "fixed", tmp_path / "mlx", quantize=True)
    assert "attn.qkv" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_layer_of_ones_own_is_named_too():
    with pytest.raises(ValueError, match=r"blocks.3.mlp.up \(rows of 64, groups of 128\)"):
        plan(build(VISION), resolve(), lambda path, layer: {"group_size": 128} if path == "blocks.3.mlp.up" else True)


@pytest.mark.parametrize(("recipe", "low", "high"), [("mixed_2_6", 2, 6), ("mixed_3_4", 3, 4), ("mixed_4_6", 4, 6)])
def test_recipes_give_more_bits_to_values_and_down_at_both_ends_and_each_third_between(recipe, low, high):
    model = build(VISION)
    section = plan(model, resolve(), recipe)
    assert {key: section[key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 64,
        "bits": low,
        "mode": "affine",
    }
    own = {path: entry for path, entry in section.items() if isinstance(entry, dict)}
    # 17 blocks: the first two (17 // 8), those from 7 * 17 // 8 on, and every third one from the fifth.
    blocks = [0, 1, 4, 7, 10, 13, 14, 15, 16]
    assert sorted(own) == sorted(f"blocks.{i}.{layer}" for i in blocks for layer in ("attn.qkv", "mlp.down"))
    assert all(entry == {"group_size": 64, "bits": high, "mode": "affine"} for entry in own.values())


def test_a_recipes_towers_have_depths_of_their_own():
    section = plan(build(PAIR), resolve(group_size=32), "mixed_2_6")
    assert section["text_model.token_embed"]["bits"] == 6
    # Of three blocks only the last: it is beyond 7 * 3 // 8, where the vision encoder with its two has none.
    assert "text_model.blocks.2.mlp.down" in section
    assert (
        "text_model.blocks.0.mlp.down" not in section
    )  # of three blocks the last two: 7 * 3 // 8 is 2, (1 - 0) % 3 ..


def test_a_predicate_decides_layer_by_layer(tmp_path):
    def predicate(path, layer):
        return {"bits": 8, "group_size": 32} if path.endswith("down") else path != "blocks.1.attn.proj"

    folder, section = quantized(tmp_path, q_bits=3, quant_predicate=predicate)
    assert section["blocks.2.mlp.down"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert section["blocks.1.attn.proj"] is False
    stored = load_file(folder / "model.safetensors")
    assert stored["blocks.1.attn.proj.weight"].shape == (128, 128)
    assert stored["blocks.0.attn.proj.weight"].shape == (128, 12)
    assert stored["blocks.2.mlp.down.scales"].shape == (128, 8)


def test_dequantizing_gives_the_numbers_that_the_packed_weights_stand_for(tmp_path):
    folder, _ = quantized(tmp_path, q_bits=4)
    dense = convert(folder, tmp_path / "dense", dequantize=True, verify=False)
    assert "quantization" not in json.loads((dense / "config.json").read_text())
    a, b = load(folder)[0], load(dense)[0]
    assert mx.array_equal(a.encode_image(pixels(a)), b.encode_image(pixels(b)))


def test_under_the_shared_settings_a_layer_is_quantized_if_it_has_scales(tmp_path):
    folder, section = quantized(tmp_path, quant_predicate=lambda path, layer: path != "blocks.0.mlp.up")
    del section["blocks.0.mlp.up"]  # as peers write it, who look for scales alone
    edit_config(folder, quantization=section)
    assert isinstance(load(folder, keep_quantized=True)[0].blocks[0].mlp.up, nn.Linear)


def test_a_null_group_size_means_the_modes_own(tmp_path):
    folder, section = quantized(tmp_path)
    edit_config(folder, quantization={**section, "group_size": None})
    assert mx.isfinite(load(folder)[0].blocks[0].mlp.up.weight).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "of another shape"),
        ({"group_size": 32}, "of another shape"),
        ({"bits": 7}, "q_bits must be"),
        ({"blocks.0.mlp.up": False}, "blocks.0.mlp.up.scales"),
    ],
)
def test_config_json_and_packed_weights_must_agree(tmp_path, change, message):
    folder, section = quantized(tmp_path)
    edit_config(folder, quantization=section | change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_scales_that_are_missing_are_named(tmp_path):
    folder, _ = quantized(tmp_path, quant_predicate=lambda path, layer: {"bits": 8} if "up" in path else True)
    edit_weights(folder, lambda tensors: {name: tensors[name] for name in tensors if name != "blocks.0.mlp.up.scales"})
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"missing blocks.0.mlp.up.scales"):
        load(folder)


def test_check_passes_what_divides():
    check(build(VISION), resolve(group_size=64))
