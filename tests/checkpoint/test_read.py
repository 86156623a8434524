"""A checkpoint loads from every form it is published in, or says in one line why it cannot."""

import builtins
import json
import re
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
from tests.small_models import FIXED, LIT, edit_weights, random_weights, write

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


LLM = {"model_type": "llava_qwen", "hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2}
LLM |= {"rms_norm_eps": 1e-6, "vocab_size": 9, "hidden_act": "silu", "rope_theta": 1e6, "num_key_value_heads": 2}
LLAVA = {**LLM, "mm_vision_tower": "apple/aimv2-large-patch14-448"}
SECTION = {key: value for key, value in APPLE.items() if key != "model_type"} | {"num_attention_heads": 4}


@pytest.mark.parametrize(
    ("layout", "prefix", "config", "heads"),
    [
        ("transformers", "model.vision_tower.vision_tower.", LLAVA, 2),
        ("transformers", "model.vision_tower.vision_tower.vision_model.", LLAVA, 2),
        ("apple", "vision_model.", LLM | {"vision_config": {**APPLE, "model_type": "sailvit"}}, 2),
        ("apple", "vision_model.", LLM | {"llm_config": LLM, "vit_config": SECTION}, 4),
        ("apple", "vision_model.", {"llm_config": LLM, "vision_config": {"num_attention_heads": 4}}, 4),
        ("transformers", "base_model.model.vision_encoder.", {**SECTION, "text_config": LLM}, 4),
        ("timm", "visual.trunk.", LLM | {"text_config": LLM}, 2),
        ("timm", "module.visual.", TIMM, 2),
    ],
    ids=["LLaVA", "LLaVA, one deeper", "SAIL-VL", "FlashVL", "heads alone", "wrapped", "visual.trunk", "module"],
)
def test_sizes_come_from_the_towers_section_or_its_tensors_never_from_the_language_model(
    layout, prefix, config, heads, tmp_path
):
    similar = {
        f"projector.blocks.{i}.{part}.weight": mx.zeros((8, 8)) for i in range(9) for part in ("norm1", "attn.qkv")
    }
    folder = write(tmp_path / "a", in_layout(layout, prefix=prefix) | LANGUAGE_MODEL | similar, config)
    assert is_the_encoder(folder)
    assert (found := load(folder)[0].config).num_attention_heads == heads
    assert (found.rms_norm_eps, found.image_size) == (1e-5, 15)


def test_heads_that_nothing_says_are_asked_for_with_the_place_to_say_them(tmp_path):
    weights = random_weights(Aimv2VisionConfig(96, 13, 2, 2, image_size=15, patch_size=5))
    tensors = in_layout("transformers", weights, "model.vision_tower.vision_tower.")
    folder = write(tmp_path / "a", tensors | LANGUAGE_MODEL, LLAVA)
    message = refusal(folder)
    assert 'as "vision_config": {"num_attention_heads": …}' in message
    (folder / "config.json").write_text(json.dumps(LLAVA | {"vision_config": {"num_attention_heads": 3}}))
    assert load(folder)[0].config.num_attention_heads == 3


@pytest.mark.parametrize("layout", ["apple", "timm"])
def test_an_encoder_at_the_root_of_a_larger_model_is_taken_with_the_rest_counted_aloud(layout, tmp_path):
    rest = LANGUAGE_MODEL | {
        f"llm.model.{name}.weight": mx.zeros((8,)) for name in ("embed_tokens", "rotary", "a", "b")
    }
    folder = write(tmp_path / "a", in_layout(layout) | rest, {"vision_config": APPLE})
    with pytest.warns(UserWarning, match=r"the rest of a larger model is left out \(llm\..* and 2 more\)"):
        assert is_the_encoder(folder)


def two_encoders(folder: Path) -> Path:
    other = {name: 2 * array for name, array in in_layout("timm", prefix="teacher.").items()}
    del other["teacher.pos_embed"]  # they need not be equally complete
    return write(folder, in_layout("apple", prefix="vision_model.") | other, {"vision_config": APPLE})


def test_of_two_encoders_config_json_chooses_one(tmp_path):
    folder = two_encoders(tmp_path / "a")
    message = refusal(folder)
    assert "as teacher. and as vision_model.:" in message
    assert 'choose one in its config.json, for example "encoder_prefix": "teacher."' in message
    (folder / "config.json").write_text(json.dumps({"vision_config": APPLE, "encoder_prefix": "vision_model."}))
    assert is_the_encoder(folder)
    (folder / "config.json").write_text(json.dumps({"vision_config": APPLE, "encoder_prefix": ["teacher."]}))
    assert "encoder_prefix: ['teacher.']" in refusal(folder)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_of_a_larger_model_in_shards_only_those_with_the_encoder_are_opened(index, tmp_path, monkeypatch):
    prefix = "model.vision_tower.vision_tower."
    language = {f"model.layers.{i}.mlp.up_proj.weight": mx.zeros((64, 64)) for i in range(9)}
    folder = write(tmp_path / "a", in_layout("transformers", prefix=prefix) | language, LLAVA)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [sorted(name for name in tensors if name.startswith(prefix)), sorted(map(str, language))]
    files = ["first.safetensors", "second.safetensors", "third.safetensors"]
    parts = [names[0][::2], names[0][1::2] + names[1][:1], names[1][1:]]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    opened = []
    monkeypatch.setattr(
        mx, "load", lambda file, *args, load=mx.load, **more: opened.append(file) or load(file, *args, **more)
    )
    assert is_the_encoder(folder)
    assert {Path(file).name for file in opened} == set(files[:2])
    (folder / "third.safetensors").unlink()
    assert is_the_encoder(folder)


def test_a_list_of_shards_without_an_encoder_is_refused_before_any_shard_is_looked_for(tmp_path):
    folder = write(tmp_path / "a", {}, LLM)
    (folder / "model.safetensors").unlink()
    weight_map = {f"model.layers.{i}.mlp.up_proj.weight": f"part-{i}.safetensors" for i in range(9)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "unknown layout" in refusal(folder)
    weight_map = dict.fromkeys(in_layout("apple", prefix="a.") | in_layout("timm", prefix="b."), "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "as a. and as b." in refusal(folder)


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


INDEX, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"


def written(content: bytes, name: str = INDEX):
    return lambda folder: (folder / name).write_bytes(content)


def kept(count: int):
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:count])


def lists_more(folder: Path) -> None:
    shard(folder, 2)
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["trunk.blocks.9.norm_1.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(content))


def holds_twice(folder: Path) -> None:
    first, second = shard(folder, 2)
    name, array = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: array}, second)


def with_tensor(name: str, change):
    return lambda folder: edit_weights(folder, lambda tensors: tensors | {name: change(tensors[name])})


NO_SAFETENSORS = "truncated or not a safetensors file .*; fetch it again"
NO_MAP = "no weight_map of tensor names to file names"
FC1, POSITIONS = "trunk.blocks.1.mlp.fc1.weight", "preprocessor.pos_embed"
DAMAGES = {
    "a shard is gone": (
        lambda folder: shard(folder, 3)[1].unlink(),
        f"{INDEX} names shards that are missing: model-00002-of-00003",
    ),
    "the index lists a tensor more": (lists_more, "lists tensors that no shard contains: trunk.blocks.9.norm_1.weight"),
    "a tensor is in two shards": (holds_twice, "are also in another shard: "),
    "the index is gone": (lambda folder: shard(folder, 2) and (folder / INDEX).unlink(), f"has shards but no {INDEX}"),
    "the index is cut": (written(b"{"), "not JSON"),
    "the index is a list": (written(b"[]"), "wanted an object, got a list"),
    "the index is empty": (written(b"{}"), NO_MAP),
    "the index maps to a number": (written(b'{"weight_map": {"a": 1}}'), NO_MAP),
    "the index leads out": (
        written(b'{"weight_map": {"a": "../elsewhere.safetensors"}}'),
        "which is not a weight file in its folder",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"no weights; looked for {INDEX}"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "a config that is no text": (written(b"\xff\xfe", "config.json"), "config.json"),
    "empty": (kept(0), NO_SAFETENSORS),
    "no header": (kept(7), NO_SAFETENSORS),
    "cut in the header": (kept(2000), NO_SAFETENSORS),
    "one byte short": (kept(-1), NO_SAFETENSORS),
    "a pointer of git-lfs": (
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", WEIGHTS_FILE),
        NO_SAFETENSORS,
    ),
    "zeros": (written(bytes(999), WEIGHTS_FILE), NO_SAFETENSORS),
    "whole numbers": (
        with_tensor(FC1, lambda array: array.astype(np.int8)),
        f"must be float32, float16, bfloat16, got {FC1} is int8",
    ),
    "double precision": (with_tensor(FC1, lambda array: array.astype(np.float64)), "F64"),
    "positions without their first axis": (  # of another shape, and not of another size
        with_tensor(POSITIONS, lambda array: array[0]),
        rf"of another shape {POSITIONS} \(wanted \(1, 9, 96\), got \(9, 96\)\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_in_one_line(folder, damage):
    make, message = DAMAGES[damage]
    make(folder)
    assert re.search(message, refusal(folder))


def test_a_model_of_another_depth_names_its_block_once(folder):
    edit_weights(folder, lambda tensors: {name: array for name, array in tensors.items() if "blocks.1." not in name})
    assert refusal(folder).count("trunk.blocks.1.") == 7


def test_a_file_of_another_kind(folder):
    (folder / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a weight file; wanted .safetensors, .bin, .pt, .pth"):
        load(folder / "weights.npz")


# Pickled weights


def test_without_torch_a_pickled_file_says_how_to_read_it(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    original = builtins.__import__

    def without_torch(name, *rest, **more):
        if name == "torch":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert "only torch can read safely; install it (pip install torch)" in refusal(folder)
