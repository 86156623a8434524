"""Weights are cut into shards within their size, and a model goes back to PyTorch's layouts without losing a bit."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open

from mlx_aimv2 import load
from mlx_aimv2.checkpoint.read import read
from mlx_aimv2.conversion.folder import save_weights, write_safetensors
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import read_source
from tests.small_models import FIXED, NATIVE, write_lit

LAYOUTS = ("apple", "transformers")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    lit = write_lit(tmp_path_factory.mktemp("lit") / "lit")
    return {"fixed": FIXED, "native": NATIVE, "lit": lit}


def exported(source: Path, target: Path, layout: str, **flags) -> Path:
    return convert(source, target, export_layout=layout, verify=False, **flags)


def same_weights(a: Path, b: Path) -> bool:
    first, second = read_source(a).weights, read_source(b).weights
    return first.keys() == second.keys() and all(mx.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["fixed", "native", "lit"])
def test_round_trips_through_every_layout_are_exact(kind, sources, tmp_path):
    steps = [sources[kind]]
    for i, layout in enumerate(("apple", None, "transformers", None, "apple")):
        step = tmp_path / str(i)
        if layout is None:
            convert(steps[-1], step, verify=False)
        else:
            exported(steps[-1], step, layout)
        assert read_source(step).layout == (layout or "mlx-aimv2")
        assert read_source(step).config == read_source(sources[kind]).config
        steps.append(step)
    assert all(same_weights(sources[kind], step) for step in steps[1:])


@pytest.mark.parametrize("kind", ["fixed", "native", "lit"])
def test_apples_layout_comes_back_as_apple_wrote_it(kind, sources, tmp_path):
    folder = exported(sources[kind], tmp_path / "apple", "apple")
    wanted, found = read(sources[kind]), read(folder)
    assert found.shapes == wanted.shapes
    assert all(mx.array_equal(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors)
    same = {key: value for key, value in found.config.items() if key not in ("vision_config", "text_config")}
    assert same.items() <= wanted.config.items()
    for part in ("vision_config", "text_config"):
        missing = found.config.get(part, {}).items() - wanted.config.get(part, {}).items()
        assert {key for key, _ in missing} <= {"attention_dropout", "projection_dropout"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pytorch_folder_looks_like_one(layout, sources, tmp_path):
    folder = exported(sources["fixed"], tmp_path / layout, layout, dtype="float16")
    assert sorted(file.name for file in folder.iterdir() if file.name != "README.md") == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float16"


def test_transformers_spelling_names_the_class_and_the_head(sources, tmp_path):
    vision = json.loads((exported(sources["native"], tmp_path / "v", "transformers") / "config.json").read_text())
    assert vision["architectures"] == ["Aimv2VisionModel"]
    assert (vision["model_type"], vision["use_head"], vision["is_native"]) == ("aimv2_vision_model", False, True)
    pair = json.loads((exported(sources["lit"], tmp_path / "p", "transformers") / "config.json").read_text())
    assert pair["architectures"] == ["Aimv2Model"]
    assert pair["vision_config"]["use_head"] is True
    assert pair["projection_dim"] == 19


def test_apples_spelling_says_native_by_leaving_the_size_out(sources, tmp_path):
    folder = exported(sources["native"], tmp_path / "native", "apple")
    config = json.loads((folder / "config.json").read_text())
    assert not {"image_size", "is_native"} & set(config)
    assert load(folder)[0].config.is_native


def test_large_exports_come_in_shards_with_their_index(sources, tmp_path, monkeypatch):
    monkeypatch.setitem(save_weights.__kwdefaults__, "shard_bytes", 100_000)
    folder = exported(sources["fixed"], tmp_path / "shards", "transformers")
    assert (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    assert same_weights(sources["fixed"], folder)


def test_an_unknown_layout_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="transformers or apple, got timm"):
        exported(tmp_path / "nothing", tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


def test_a_shard_is_closed_before_it_passes_its_size(tmp_path):
    weights = {name: mx.zeros(size) for name, size in {"a": 10, "b": 11, "c": 12, "d": 60, "e": 1}.items()}
    size = save_weights(tmp_path, weights.items(), shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [int(index["weight_map"][name].split("-")[1]) for name in weights]
    assert shards == [1, 1, 2, 3, 4]  # one tensor alone may be larger
    assert size == index["metadata"]["total_size"] == 4 * 94


# The file of weights, beside MLX's own writer


@pytest.fixture
def tensors():
    keys = iter(mx.random.split(mx.random.key(5), 9))
    packed, scales, biases = mx.quantize(mx.random.normal((3, 64), key=next(keys)).astype(mx.float16))
    return {
        "a.odd": mx.random.normal((3,), key=next(keys)).astype(mx.float16),
        "b.turned": mx.random.normal((5, 7), key=next(keys)).T,
        "c.scalar": mx.array(2.5),
        "d.brain": mx.random.normal((11, 2), key=next(keys)).astype(mx.bfloat16),
        "e.packed": packed,
        "f.scales": scales,
        "g.biases": biases,
        "h.bytes": mx.arange(13).astype(mx.uint8),
        "i.view": mx.random.normal((6, 4), key=next(keys))[1:5, ::2],
        "j.ä": mx.zeros((2, 0, 3)),
    }


def test_mlx_and_safetensors_read_what_was_written(tensors, tmp_path):
    wanted, file = dict(tensors), tmp_path / "x.safetensors"
    write_safetensors(file, tensors, metadata={"format": "mlx", "note": "ü"})
    assert not tensors
    found, metadata = mx.load(str(file), return_metadata=True)
    assert metadata == {"format": "mlx", "note": "ü"}
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(found[name], array), name
    with safe_open(file, framework="numpy") as other:
        assert set(other.keys()) == set(wanted)


def test_no_tensor_lies_at_an_odd_address(tensors, tmp_path):
    sizes = {name: array.dtype.size for name, array in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata={})
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    odd = [name for name in sizes if header[name]["data_offsets"][0] % min(sizes[name], 4)]
    assert odd == []


def test_an_empty_file_is_a_file(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {}, metadata={"format": "pt"})
    assert mx.load(str(tmp_path / "x.safetensors")) == {}


def test_mlxs_cache_is_limited_only_meanwhile(tensors, tmp_path):
    before = mx.set_cache_limit(123)
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata={})
    assert mx.set_cache_limit(before) == 123
