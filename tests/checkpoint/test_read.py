"""A checkpoint loads from every form it is published in, or says in one line why it cannot."""

import builtins
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from mlx_aimv2 import load
from mlx_aimv2.checkpoint.layouts import LAYOUTS, layout_for
from mlx_aimv2.checkpoint.read import read
from mlx_aimv2.config import DTYPES, Aimv2VisionConfig
from mlx_aimv2.conversion.folder import config_for
from tests.small_models import FIXED, LIT, random_weights, write

VISION = Aimv2VisionConfig(256, 13, 2, 2, image_size=15, patch_size=5)  # two heads of 128: timm does not say how many
WEIGHTS = random_weights(VISION)
APPLE = {"hidden_size": 256, "intermediate_size": 13, "num_hidden_layers": 2, "num_attention_heads": 2}
APPLE |= {"image_size": 15, "patch_size": 5, "model_type": "aimv2"}
TIMM = {"architecture": "aimv2_tiny", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 15, 15]}}
LANGUAGE_MODEL = {
    "llm.model.layers.0.self_attn.q_proj.bias": mx.zeros((8,)),
    "llm.model.layers.0.mlp.qweight": mx.zeros((8, 8), dtype=mx.int32),
    "vte.weight": mx.zeros((9, 8)),
}
# The processor speaks up about a folder without preprocessing, and these tests are about the weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*preprocessor_config.json")


def in_layout(layout: str, weights=WEIGHTS, prefix: str = "") -> dict[str, mx.array]:
    return {prefix + name: array for name, array in layout_for(layout, pair=False).to_source(weights.items())}


def is_the_encoder(path: Path, **flags) -> bool:
    found = dict(tree_flatten(load(path, **flags)[0].parameters()))
    return found.keys() == WEIGHTS.keys() and all(mx.array_equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_as_the_same_encoder(layout, tmp_path):
    config = {"timm": TIMM, "apple": APPLE, "apple-mlx": APPLE}.get(layout, config_for(VISION, "transformers"))
    assert is_the_encoder(write(tmp_path / "a", in_layout(layout), config))


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS.values() if layout.pair])
def test_every_layout_of_the_pair_loads_as_the_same_pair(layout, tmp_path):
    weights = random_weights(LIT)
    tensors = dict(layout_for(layout, pair=True).to_source(weights.items()))
    format_name = "apple" if layout.startswith("apple") else "transformers"
    model, _ = load(write(tmp_path / "a", tensors, config_for(LIT, format_name)))
    found = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(found[name], weights[name]) for name in weights)
    assert model.config == LIT


OVIS2 = {
    "model_type": "ovis",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "visual_tokenizer_config": {
        "backbone_config": {**APPLE, "qkv_bias": False, "use_bias": False, "torch_dtype": "bfloat16"},
        "hidden_stride": 2,
        "model_type": "aimv2_visual_tokenizer",
        "vocab_size": 9,
    },
}
OVIS2_IN_TRANSFORMERS = {
    "model_type": "ovis2",
    "hidden_size": 8,
    "text_config": {"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1, "rope_theta": 1e6},
    "vision_config": {**APPLE, "model_type": "ovis2_vision", "hidden_stride": 2, "vocab_size": 9, "mlp_bias": False},
}


@pytest.mark.parametrize(
    ("layout", "prefix", "config"),
    [
        ("apple", "visual_tokenizer.backbone.", OVIS2),
        ("ovis2", "model.vision_tower.transformer.", OVIS2_IN_TRANSFORMERS),
        ("ovis2", "vision_tower.transformer.", OVIS2_IN_TRANSFORMERS),
    ],
    ids=["Ovis2", "transformers' ovis2", "transformers' ovis2, older"],
)
def test_the_encoder_is_taken_out_of_a_larger_model(layout, prefix, config, tmp_path):
    folder = write(tmp_path / "a", in_layout(layout, prefix=prefix) | LANGUAGE_MODEL, config)
    assert is_the_encoder(folder)
    assert read(folder).shapes.keys() >= LANGUAGE_MODEL.keys()


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_float16_and_bfloat16_are_kept(dtype, tmp_path):
    tensors = {name: array.astype(getattr(mx, dtype)) for name, array in in_layout("apple").items()}
    model, _ = load(write(tmp_path / "a", tensors, APPLE))
    assert model.dtype == getattr(mx, dtype)
    assert mx.array_equal(model.norm.weight, WEIGHTS["norm.weight"].astype(getattr(mx, dtype)))


def shard(folder: Path, count: int, index: str = "model.safetensors.index.json") -> list[Path]:
    """Splits model.safetensors into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::count]}, file)
    weight_map = {name: files[j % count].name for j, name in enumerate(names)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


@pytest.fixture
def folder(tmp_path):
    """A copy of a reference checkpoint that a test may damage."""
    return Path(shutil.copytree(FIXED, tmp_path / "checkpoint"))


def test_shards_load_as_the_whole(folder):
    shard(folder, 3)
    whole, parts = load(FIXED)[0], load(folder)[0]
    pixels = mx.random.normal((1, 42, 42, 3), key=mx.random.key(2))
    assert mx.array_equal(whole.encode_image(pixels), parts.encode_image(pixels))


def refusal(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_a_shard_that_is_not_there_is_named(folder):
    shard(folder, 3)[1].unlink()
    assert "model.safetensors.index.json names shards that are not there: model-00002-of-00003" in refusal(folder)


def test_a_tensor_that_the_index_lists_and_no_shard_holds_is_named(folder):
    shard(folder, 2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["trunk.blocks.9.norm_1.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert "lists tensors that no shard holds: trunk.blocks.9.norm_1.weight" in refusal(folder)


def test_a_tensor_in_two_shards_is_named(folder):
    first, second = shard(folder, 2)
    twice = next(iter(load_file(first)))
    save_file(load_file(second) | {twice: load_file(first)[twice]}, second)
    assert f"another shard holds too: {twice}" in refusal(folder)


def test_shards_without_their_index(folder):
    shard(folder, 2)
    (folder / "model.safetensors.index.json").unlink()
    assert "has shards but no model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "wanted an object, got a list"),
        ("{}", "no weight_map of tensor names to file names"),
        ('{"weight_map": {"a": 1}}', "no weight_map of tensor names to file names"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "which is no file of weights in its folder"),
    ],
)
def test_an_index_that_is_none(folder, content, message):
    (folder / "model.safetensors.index.json").write_text(content)
    assert message in refusal(folder)


def test_a_folder_without_weights_says_what_was_looked_for(folder):
    (folder / "model.safetensors").unlink()
    assert "no weights; looked for model.safetensors.index.json" in refusal(folder)


def test_a_folder_without_config_says_so(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"], ids=["cut", "a list", "not text"])
def test_a_config_that_is_none(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 7, 2000, -1], ids=["empty", "no header", "cut in the header", "one byte short"])
def test_a_truncated_file_is_recognised(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "truncated or not a safetensors file" in refusal(folder)
    assert "fetch it again" in refusal(folder)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"\x00" * 999])
def test_garbage_is_recognised(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "truncated or not a safetensors file" in refusal(folder)


def test_a_file_of_another_kind(folder):
    (folder / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a weight file; wanted .safetensors, .bin, .pt, .pth"):
        load(folder / "weights.npz")


def test_whole_numbers_in_the_encoder_are_refused_by_name(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["trunk.blocks.1.mlp.fc1.weight"] = tensors["trunk.blocks.1.mlp.fc1.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    assert "must be float32, float16, bfloat16, got trunk.blocks.1.mlp.fc1.weight is int8" in refusal(folder)


def test_double_precision_is_refused(folder):
    tensors = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert "F64" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"qkv_bias": True}, "no biases"),
        ({"hidden_act": "gelu"}, "uses silu"),
        ({"disable_rope": False, "preserve_original_pe": True}, "rotary positions"),
        ({"fullatt_block_indexes": [3, 7]}, "windows"),
    ],
    ids=["biases", "gelu", "RoPE (AndesVL)", "windows"],
)
def test_what_only_config_json_says_of_another_network_counts_too(config, reason, tmp_path):
    folder = write(tmp_path / "a", in_layout("apple"), APPLE | config)
    assert reason in refusal(folder)


def test_a_cls_token_is_the_reason_and_not_two_hundred_names(tmp_path):
    folder = write(tmp_path / "a", in_layout("timm") | {"cls_token": mx.zeros((1, 1, 256))}, TIMM)
    assert "a CLS token (cls_token): AIMv2 has none, so this is another network" in refusal(folder)


def test_an_unknown_layout_names_the_known_ones(tmp_path):
    message = refusal(write(tmp_path / "a", {"w": mx.zeros((3, 5))}, APPLE))
    assert "fit none of apple, apple-mlx, transformers" in message
    assert "the first names are w" in message


def test_a_position_table_without_its_first_axis_is_of_another_shape_and_not_of_another_size(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["preprocessor.pos_embed"] = tensors["preprocessor.pos_embed"][0]
    save_file(tensors, folder / "model.safetensors")
    assert "of another shape preprocessor.pos_embed (wanted (1, 9, 96), got (9, 96))" in refusal(folder)


def test_a_model_of_another_depth_names_its_block_once(folder):
    tensors = {
        name: array for name, array in load_file(folder / "model.safetensors").items() if "blocks.1." not in name
    }
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder)
    assert message.count("trunk.blocks.1.") == 7


# Pickled weights


def test_without_torch_a_pickled_file_says_how_to_read_it(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    original = builtins.__import__

    def without_torch(name, *rest, **more):
        if name == "torch":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert "only torch reads safely; install it (pip install torch)" in refusal(folder)
